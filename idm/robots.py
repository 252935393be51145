"""Whose videos a labeler reads, and how fast they run.

The robots of one labeler see time alike: the videos of each come at the rates of the first one's, so the gap between
two frames is as long for all of them, and spans as many of a robot's steps as its own rate makes of it.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment
from dreamgen.core.seeding import seed_for
from dreamgen.data.states import known_states
from idm import checkpoint
from idm.batches import Alternating, Batches, Degrade, Recorded, in_all_phases
from idm.flow import Denoiser
from idm.heads import Heads
from idm.merge import horizon

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Seen:
    """A robot, the clock of the videos of it that are labelled, and the robot steps a frame gap that are read, the
    clock's own among them."""

    robot: Embodiment
    clock: Clock
    spacings: list[str]

    def clocks(self, frames: int) -> list[Clock]:
        """One clock of `frames` frames per spacing."""
        rate = self.robot.rate
        return [Clock(robot_hz=str(rate), video_hz=str(rate / Fraction(s)), frames=frames) for s in self.spacings]

    def beside(self, robot: Embodiment) -> "Seen":
        """Another robot in videos of the same rates, and of its own rate in place of those that are higher: a frame
        needs a row of its own.

        Raises ValueError for a robot without actions, or with another canvas than this one's.
        """
        if not robot.action:
            raise ValueError(f"embodiment '{robot.name}' has no action parts; a labeler of actions learns nothing from "
                             f"it, one of latent actions does (labeler=latent_continuous)")  # fmt: skip
        if robot.canvas != self.robot.canvas:
            raise ValueError(f"the canvas of robot '{robot.name}' is {robot.canvas} (height, width), that of robot "
                             f"'{self.robot.name}' {self.robot.canvas}; one labeler reads pictures of one size: give "
                             f"the views of one of them another size or grid, so that they agree")  # fmt: skip
        faster = robot.rate / self.robot.rate
        spacings = [str(max(Fraction(1), Fraction(s) * faster)) for s in self.spacings]
        stride = max(Fraction(1), self.clock.stride * faster)
        clock = Clock(robot_hz=str(robot.rate), video_hz=str(robot.rate / stride), frames=self.clock.frames)
        return Seen(robot, clock, list(dict.fromkeys(spacings)))


class Robots(nn.Module):
    """The robots of a labeler, of whose network they share all but their `heads`, and its data and files, which are of
    the one that is chosen, the first by default."""

    seen: dict[str, Seen]
    heads: nn.ModuleDict
    denoiser: Denoiser
    config: dict
    path: Path | None
    frames: int
    train_frames: int
    state_weight: float
    seed: int

    def __init__(self, first: Seen) -> None:
        super().__init__()
        self.seen = {first.robot.name: first}
        self.choose(first.robot.name)

    @property
    def head(self) -> Heads:
        """Encoders, decoders and statistics of the current robot."""
        return self.heads[self.robot.name]

    @property
    def reads_state(self) -> bool:
        """False where there is no state, or nobody taught it to read one."""
        return bool(self.robot.state_dim and self.state_weight)

    @property
    def clocks(self) -> list[Clock]:
        """One clock of a training clip per spacing."""
        return self._clocks(self.robot.name)

    @property
    def clip_frames(self) -> int:
        """Frames of the longest training clip."""
        return max(clock.frames for name in self.seen for clock in self._clocks(name))

    def _clocks(self, name: str) -> list[Clock]:
        """Of clips of `train_frames`, or of more that show windows in all phases of the clock, up to four windows."""
        return [in_all_phases(clock, self.frames, 4 * self.frames)
                for clock in self.seen[name].clocks(self.train_frames)]  # fmt: skip

    def add(self, robot: Embodiment) -> None:
        """A head for one more robot, whose videos come at the same rates; before training or weights are loaded.

        Raises ValueError for a name that is taken, and as `Seen.beside`.
        """
        if robot.name in self.seen:
            raise ValueError(f"this labeler has a head for a robot '{robot.name}' already; another robot needs another "
                             f"name, more recordings of the same one go to stage.more")  # fmt: skip
        self.seen[robot.name] = next(iter(self.seen.values())).beside(robot)
        with torch.random.fork_rng(devices=[]), self.reading(robot.name):
            torch.manual_seed(seed_for(self.seed, "head", robot.name))
            self.heads[robot.name] = Heads(robot, self.denoiser.width)
            self.denoiser.reach(max(horizon(train, self.frames) for train in self.clocks))

    def choose(self, name: str) -> None:
        """From now on it is a labeler of the robot `name`, one that it has a head for."""
        one = self.seen[name]
        self.robot, self.clock, self.spacings = one.robot, one.clock, one.spacings

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """A context in which it is a labeler of the robot `name`."""
        before = self.robot.name
        self.choose(name)
        try:
            yield
        finally:
            self.choose(before)

    def fit(self, dataset: Recorded, episodes: Sequence[int]) -> None:
        """Statistics of the robot from recorded `episodes`; before training.

        Raises ValueError for data of another robot, and where states that it would learn to read are unknown.
        """
        where = f"the dataset {getattr(dataset, 'root', '')}"
        self.robot.require(dataset.robot.contract(), where)
        recorded = [dataset.episode(i) for i in episodes]
        unknown = sum(not np.isfinite(known_states(e)).all() for e in recorded) if self.reads_state else 0
        if unknown:
            raise ValueError(f"{unknown} of {len(recorded)} episodes of {where} have states that are unknown (column "
                             f"state_known), and a labeler learns to read states; leave these episodes out, or set "
                             f"labeler.state_weight=0")  # fmt: skip
        self.head.fit([e.action for e in recorded], [e.state for e in recorded])

    def batches(self, dataset: Recorded, episodes: Sequence[int], *, own_share: float | None = None,
                others: Sequence[tuple[Recorded, Sequence[int], Degrade | None]] = (), seed: int,
                **options: Any) -> Batches | Alternating:  # fmt: skip
        """Training batches by step; options: see `Batches`. others: recordings of robots that were added, which
        episodes of them, and their `degrade`; each batch is then of one robot, see `Alternating`."""
        if self.clip_frames > self.train_frames:
            log.warning("training clips have up to %d frames in place of labeler.train_frames=%d: fewer would not show "
                        "a window of %d frames in all phases of a video whose rate does not divide the robot's",
                        self.clip_frames, self.train_frames, self.frames)  # fmt: skip
        own = Batches(dataset, episodes, self.clocks, seed=seed, **options)
        if not others:
            return own
        parts = {self.robot.name: own}
        for data, chosen, degrade in others:
            parts[data.robot.name] = Batches(data, chosen, self._clocks(data.robot.name), seed=seed,
                                             **options | {"degrade": degrade})  # fmt: skip
        return Alternating(parts, own_share=own_share, seed=seed)

    def save(self, path: Path) -> None:
        """config.json, contract.json, model.safetensors (weights, statistics) in the directory `path`; others.json with
        the contracts of the robots that were added, if any were."""
        checkpoint.save(self, self.config, [one.robot for one in self.seen.values()], path)

    def begin_with(self, path: Path) -> None:
        """Take over what robots share from another labeler; see `idm.checkpoint.begin_with`."""
        checkpoint.begin_with(self, self.config, path)

    @classmethod
    def load(cls: type[checkpoint.Model], path: Path | str, robot: Embodiment | None = None,
             **changes: object) -> checkpoint.Model:  # fmt: skip
        """From a directory written by `save`, a labeler of `robot`, or of the first robot that it was trained for.
        changes: inference settings to replace, e.g. flow_steps, rule; None leaves them.

        Raises ValueError if `robot` is none that it was trained for, or a file is missing.
        """
        model = checkpoint.load(cls, path, robot, changes)
        model.path = Path(path)
        return model
