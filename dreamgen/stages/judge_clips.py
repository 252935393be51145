"""The clips that a judge of success learns from: recordings, and how a world model shows them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from dreamgen.core.clip import Clip, Prompt
from dreamgen.core.clock import Clock
from dreamgen.core.protocols import ActionWorldModel
from dreamgen.core.seeding import rng_for, seed_for
from dreamgen.data.lerobot import Dataset
from dreamgen.data.recordings import recorded_clip, whole_clock
from dreamgen.engine.progress import progress
from dreamgen.stages.drawn import frames_within
from dreamgen.stages.sharing import Parts, grouped
from dreamgen.video.sheet import evenly
from dreamgen.worlds.rollout import alike, follow_prompts

SHOWN = "shown"  # the folder of clips as a world model shows them, while their stage runs
Shown = Callable[[Sequence[Clip]], list[np.ndarray]]


def shown_by(world_model: Any, out: Path, seed: int, batch_size: int = 16) -> Shown:
    """How a world model shows recorded clips, up to the last frame that it can end on: one that takes actions dreams
    them from their first frame under their own actions, so that what goes astray in its dreams goes astray here; any
    other returns them through its autoencoder. What is done is kept in `out/shown` by the number of the call and of the
    batch: a stage that was killed takes it up from there, as it asks for the same clips in the same order. The videos
    that it gives are read from there, too, where they are looked at."""
    calls = count()

    def decoded(clip: Clip) -> np.ndarray:
        video = torch.from_numpy(clip.video[: frames_within(world_model, len(clip.video))])
        return world_model.decode(world_model.encode(video[None]))[0].cpu().numpy()

    def prompt(clip: Clip) -> Prompt:
        if Fraction(clip.video_hz) != Fraction(world_model.clock.video_hz):
            raise ValueError(f"clip '{clip.id}' is seen at {clip.video_hz} Hz, the action-conditioned model dreams at "
                             f"{world_model.clock.video_hz}; set stage.video_hz to that")  # fmt: skip
        gaps = getattr(world_model, "gaps", 1)
        frames = (len(clip.video) - 1) // gaps * gaps + 1
        if frames < 2:
            raise ValueError(f"clip '{clip.id}' shows {len(clip.video)} frames, the action-conditioned model dreams "
                             f"{gaps} at a time; leave the episode out")  # fmt: skip
        steps = Clock(robot_hz=world_model.robot.robot_hz, video_hz=clip.video_hz, frames=frames).steps
        return Prompt(id=clip.id, image=clip.video[0].copy(), instruction=clip.instruction, state=clip.state,
                      action=clip.action[:steps], seed=seed_for(seed, "shown", clip.id))  # fmt: skip

    def shown(clips: Sequence[Clip]) -> list[np.ndarray]:
        imagines = isinstance(world_model, ActionWorldModel)
        prompts = [prompt(clip) for clip in clips] if imagines else []
        batches = alike(prompts, batch_size) if imagines else grouped(range(len(clips)), batch_size)
        parts = Parts(Path(out) / SHOWN / str(next(calls)))
        stored = parts.stored()
        left = [number for number in range(len(batches)) if number not in stored]
        for number in progress(left, len(left), "as dreamt", out, unit="batch"):
            if imagines:
                videos = [past.video for past in follow_prompts(world_model, [prompts[k] for k in batches[number]])]
            else:
                videos = [decoded(clips[k]) for k in batches[number]]
            parts.write(number, {str(k): video for k, video in zip(batches[number], videos, strict=True)})
        found = {int(k): video for number in range(len(batches)) for k, video in parts.mapped(number).items()}
        return [found[k] for k in range(len(clips))]

    return shown


class Recorded:
    """Recorded clips with their outcomes, decoded when asked for and kept up to `room` bytes; some also as a
    world model shows them."""

    def __init__(self, datasets: Sequence[Dataset], success: Sequence[Mapping[int, bool]], video_hz: str,
                 room: int = 1 << 30) -> None:  # fmt: skip
        self.datasets, self.video_hz, self.room = datasets, video_hz, room
        self.places = [(d, i) for d, known in enumerate(success) for i in sorted(known)]
        self.success = np.array([success[d][i] for d, i in self.places], bool)
        # episodes of one first state
        self.groups = [f"{d} {datasets[d].episode(i).meta.get('pair') or i}" for d, i in self.places]
        self.returned, self.kept = dict[int, np.ndarray](), dict[int, np.ndarray]()

    def __len__(self) -> int:
        return len(self.places)

    def instruction(self, k: int) -> str:
        d, i = self.places[k]
        return self.datasets[d].instruction(i)

    def __getitem__(self, k: int) -> Clip:
        return replace(self.unseen(k), video=self.seen(k))

    def _clock(self, k: int) -> Clock:
        d, i = self.places[k]
        pair = Clock(robot_hz=self.datasets[d].robot.robot_hz, video_hz=self.video_hz, frames=2)
        return whole_clock(self.datasets[d], i, pair)

    def frames(self, k: int) -> int:
        """How many frames clip k has; nothing is decoded."""
        return self._clock(k).frames

    def unseen(self, k: int) -> Clip:
        """Clip k without its pictures: its instruction, first state and actions."""
        d, i = self.places[k]
        clip, action = recorded_clip(self.datasets[d], i, self._clock(k), unseen=True)
        return replace(clip, action=action) if self.datasets[d].has_actions else clip

    def seen(self, k: int, chosen: np.ndarray | None = None) -> UInt8[np.ndarray, "t h w 3"]:
        """The frames `chosen` of clip k (default all); where there is no room to keep it, no others are decoded."""
        (d, i), rows = self.places[k], self._clock(k).rows
        dataset = self.datasets[d]
        size = len(rows) * 3 * math.prod(dataset.robot.canvas)
        if k not in self.kept and size <= self.room:
            self.room -= size
            self.kept[k] = dataset.canvas(i, rows)
        if k in self.kept:
            return self.kept[k] if chosen is None else self.kept[k][chosen]
        return dataset.canvas(i, rows if chosen is None else rows[chosen])

    def degrade(self, shown: Shown, chosen: Sequence[int]) -> None:
        """Keep how a world model shows the clips `chosen`; it may take fewer frames than a clip has."""
        self.returned |= {k: clip.video for k, clip in zip(chosen, self.again(shown, chosen), strict=True)}

    def again(self, shown: Shown, chosen: Sequence[int]) -> list[Clip]:
        """The clips `chosen` as a world model shows them."""
        videos = shown(OneByOne(self, chosen))
        return [replace(self.unseen(k), video=video) for k, video in zip(chosen, videos, strict=True)]

    def some(self, chosen: Sequence[int], seed: int, most: int = 200) -> list[int]:
        """Up to `most` of the clips `chosen`, to take statistics of."""
        return rng_for(seed, "sample").permutation(chosen)[:most].tolist()

    def sample(self, model: Any, chosen: Sequence[int]) -> np.ndarray:
        """Pictures (n v h w 3) that the judge looks at of the clips `chosen`, as returned if kept."""
        return np.concatenate([model.pictures(self.returned[k]) if k in self.returned
                               else self.pictures(model, k, evenly(self.frames(k), model.frames))
                               for k in chosen])  # fmt: skip

    def pictures(self, model: Any, k: int, chosen: np.ndarray) -> np.ndarray:
        """Pictures (t v h w 3) that the judge sees at the frames `chosen` of clip k."""
        return model.pictures(self.seen(k, chosen), np.arange(len(chosen)))

    def states(self, model: Any, chosen: Sequence[int]) -> np.ndarray:
        """States (n d) that the judge is told at the frames that it looks at of the clips `chosen`."""
        return np.concatenate([model.states(self.unseen(k), evenly(self.frames(k), model.frames)) for k in chosen])


class OneByOne(Sequence[Clip]):
    """Clips `chosen`, each decoded anew whenever it is asked for and there is no room to keep it."""

    def __init__(self, clips: Recorded, chosen: Sequence[int]) -> None:
        self.clips, self.chosen = clips, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, n: int) -> Clip:
        return self.clips[self.chosen[n]]


class Batches:
    """Step to batch: as many successes as failures, in random order; a share of the successes swapped to failures.

    degraded: share of a batch that is drawn from the clips that are kept as a world model shows them, and so shown.
    """

    def __init__(self, model: Any, clips: Recorded, chosen: Sequence[int], *, batch_size: int, swapped: float,
                 shift: int, degraded: float, seed: int) -> None:  # fmt: skip
        self.model, self.clips, self.batch_size, self.seed = model, clips, batch_size, seed
        self.swapped, self.shift, self.degraded = swapped, shift, degraded
        self.kinds = [np.array([k for k in chosen if clips.success[k] == kind]) for kind in (True, False)]
        self.returned = [np.array([k for k in kind if k in clips.returned]) for kind in self.kinds]

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        rng = rng_for(self.seed, "batch", step)
        pictures, texts, success, states = [], [], [], []
        for row in rng.permutation(self.batch_size):
            swap = row < round(self.swapped * self.batch_size) and len(self.model.instructions) > 1
            right = swap or row % 2 == 0
            kind = 0 if right else 1
            use = len(self.returned[kind]) and rng.random() < self.degraded
            k = int(rng.choice((self.returned if use else self.kinds)[kind]))
            text = self.clips.instruction(k)
            if swap:
                text = str(rng.choice([other for other in self.model.instructions if other != text]))
            shown = self.clips.returned[k] if use else None
            chosen = jittered(self.clips.frames(k) if shown is None else len(shown), self.model.frames, rng)
            seen = self.clips.pictures(self.model, k, chosen) if shown is None else self.model.pictures(shown, chosen)
            pictures.append(moved(seen, rng.integers(-self.shift, self.shift + 1, 2)))
            texts.append(text)
            success.append(right and not swap)
            if self.model.state is not None:  # sometimes unknown, so that it can do without
                states.append(self.model.states(self.clips.unseen(k), chosen) * (np.nan if rng.random() < 0.1 else 1))
        batch = {"pictures": torch.from_numpy(np.stack(pictures)), "words": self.model.encoder.words(texts),
                 "success": torch.tensor(success, dtype=torch.float32)}  # fmt: skip
        return batch | ({"states": torch.from_numpy(np.stack(states).astype(np.float32))} if states else {})


def jittered(frames: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` frame numbers in order: the first and the last, and one from each span between."""
    edges = np.linspace(0, frames - 1, count)
    inner = edges[1:-1] + rng.uniform(-0.5, 0.5, max(0, count - 2)) * (edges[1] - edges[0])
    return np.concatenate([[0], inner, [frames - 1]]).round().astype(np.int64)


def moved(pictures: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Pictures (t v h w 3) moved by `by` rows and columns; the edge repeats."""
    reach = int(np.abs(by).max())
    if not reach:
        return pictures
    h, w = pictures.shape[2:4]
    wide = np.pad(pictures, ((0, 0), (0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    top, left = reach + int(by[0]), reach + int(by[1])
    return wide[:, :, top : top + h, left : left + w]
