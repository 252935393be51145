"""What an action-conditioned world model is trained on: windows of recordings, their latents, actions and past.

Latents are cached once per dataset, where several runs may share them. The first latent frame of a window is the
encoding of its first picture alone, so the earlier frames that are remembered cost nothing to encode. The state at
which a window begins is, as in a dream, what the episode's first state becomes under its commands: a measured one would
say of a gripper how wide the thing is that it holds, which nobody knows in a dream.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dreamgen.core.manifest import fingerprint
from dreamgen.core.seeding import rng_for
from dreamgen.data.cache import Cache
from dreamgen.data.groups import groups_of, held_out
from dreamgen.data.lerobot import Dataset
from dreamgen.data.motion import motion_of, weights
from dreamgen.data.states import commanded_states
from dreamgen.data.video_rate import shown_rows
from dreamgen.data.windows import Windows
from dreamgen.stages.latents import encoding, seen, shard_size, taken
from dreamgen.stages.sharing import grouped
from dreamgen.worlds.action import ActionWorld
from dreamgen.worlds.action_frames import entries_read
from dreamgen.worlds.autoencoder import clips_at_once


class Source:
    """The windows of one dataset with their latents in the cache `root`; some episodes are held out."""

    def __init__(self, world: ActionWorld, dataset: Dataset, *, hop: int, validation: int, root: Path, seed: int,
                 rest: float = 1.0) -> None:  # fmt: skip
        self.world, self.dataset, self.hop = world, dataset, hop
        self.windows = Windows(dataset, world.clock, hop=hop, short="drop")
        self.places = [self.windows.at(k) for k in range(len(self.windows))]
        self.number = {place: k for k, place in enumerate(self.places)}
        key = {"world": world.cache_key(), "data": fingerprint(dataset.root), "hop": hop, "episodes": taken(dataset),
               "views": seen(dataset)}  # fmt: skip
        size = shard_size((world.clock.frames, *world.robot.canvas))
        self.cache = Cache(root, key, count=len(self.windows), size=size)
        groups, order = groups_of(dataset), rng_for(seed, "validation").permutation(len(dataset)).tolist()
        self.held = held_out(groups, min(validation, len(dataset) // 5), order)
        self.read = entries_read(world.robot, maps=world.maps)
        self.states: dict[int, np.ndarray | None] = {}  # of episodes, at every hop-th row, once they are asked for
        self.shown = [shown_rows(dataset.episode(i)) for i in range(len(dataset))]
        new = [k for k in range(len(self.places)) if self._is_new(k)]
        self.kept = [k for k in new if not world.maps or self.state(k).size]
        self.old, self.unknown = len(self.places) - len(new), len(new) - len(self.kept)
        self.train = np.array([k for k in self.kept if self.places[k][0] not in self.held])
        if not len(self.train):
            raise ValueError(
                f"of {len(self.places)} windows of {dataset.root} none is left to train on: {self.old} show pictures "
                f"of earlier rows (labelled at another rate?), {self.unknown} begin in a state that is not known, "
                f"which pose maps need, and {len(self.held)} episodes are held out. Take the rate of the labels "
                "(world_model.video_hz), hold out fewer (stage.validation), or leave out the maps "
                "(stage.world_model.maps=false)."
            )
        motion = motion_of(dataset.robot.action, [dataset.episode(i).action for i in range(len(dataset))])
        spans = (self.places[k] for k in self.train)
        moved = np.array([motion[i][start : start + world.clock.steps].mean() for i, start in spans])
        upto = weights(moved, rest).cumsum()
        self.upto = upto / upto[-1]

    def _is_new(self, k: int) -> bool:
        """Whether each frame of window k is of its own row: the state and the actions of others are later ones."""
        rows = self.windows.rows(*self.places[k])
        return bool((self.shown[self.places[k][0]][rows] == rows).all())

    def encode(self, items: range) -> np.ndarray:
        """Latents of these windows."""
        shape = (self.world.clock.frames, *self.world.robot.canvas)
        size, found = clips_at_once(*shape), []
        with encoding(shape, min(size, len(items))):
            for some in grouped(items, size):
                clips = [self.dataset.canvas(self.places[k][0], self.windows.rows(*self.places[k])) for k in some]
                found.append(self.world.encode(torch.from_numpy(np.stack(clips))).cpu().numpy())
        return np.concatenate(found)

    def draw(self, rng: np.random.Generator) -> int:
        """A window to train on."""
        return int(self.train[self.upto.searchsorted(rng.random(), side="right")])

    def text(self, k: int) -> str:
        return self.dataset.instruction(self.places[k][0])

    def state(self, k: int) -> np.ndarray:
        """The state at which window k begins by the embodiment's rule, empty where an entry that the world model looks
        at is not known when the episode begins."""
        episode, start = self.places[k]
        if episode not in self.states:
            states = commanded_states(self.world.robot, self.dataset.episode(episode), self.read)
            self.states[episode] = None if states is None else states[:: self.hop].copy()
        states = self.states[episode]
        return np.empty(0, np.float32) if states is None else states[start // self.hop]

    def row(self, k: int, frames: int) -> dict[str, np.ndarray]:
        """Latents, features, maps, memory and ages of window k, cut to `frames` frames."""
        world, (episode, start) = self.world, self.places[k]
        source, clock = self.dataset.episode(episode), world.clock.with_frames(frames)
        action, state = source.action[start : start + clock.steps], self.state(k)
        row = {"latents": world.cut(torch.from_numpy(self.cache[k][None].copy()), frames)[0].numpy(),
               "features": world.features(clock.rows, action, state)}  # fmt: skip
        if world.maps:
            row["maps"] = world.drawn(clock.rows, action, state)
        if world.remembered:
            per_second = float(world.robot.rate)
            rows = [0] * world.anchor + [max(0, start - round(age * per_second)) for age in world.history]
            rows = [r - r % self.hop for r in rows]
            first = [self.cache[self.number[episode, r]][: world.world.latent_shape[0], 0] for r in rows]
            row["memory"] = np.stack(first, 1)
            row["ages"] = np.array([(start - self.shown[episode][r]) / per_second for r in rows], np.float32)
        return row


def stacked(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    return {key: torch.from_numpy(np.ascontiguousarray(np.stack([row[key] for row in rows]))) for key in rows[0]}


def scales(world: ActionWorld, sources: Sequence[Source], most: int = 400) -> dict[str, Tensor]:
    """Offset and scale of the features over windows of all datasets; what does not vary keeps scale 1."""
    found = []
    for source in sources:
        for k in np.unique(np.linspace(0, len(source.train) - 1, most).astype(int)):
            found.append(source.row(int(source.train[k]), world.clock.frames)["features"])
    values = np.concatenate(found).astype(np.float64)
    spread = values.std(0)
    return {"offset": torch.from_numpy(values.mean(0)).float(),
            "scale": torch.from_numpy(np.where(spread < 1e-5, 1.0, spread)).float()}  # fmt: skip
