"""Clips of several lengths and sizes, batched by shape under a budget of tokens.

Every episode gives clips of the longest length that it has; clips of one shape (frames, height, width) are a bucket. A
batch comes from one bucket and has as many clips as the budget of tokens allows, so a step of long clips costs what a
step of short ones costs. Which batch a step has is a function of that step's generator alone.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
from jaxtyping import Int64, UInt8

from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment
from dreamgen.core.seeding import rng_for
from dreamgen.data.lerobot import Dataset
from dreamgen.data.windows import Windows
from dreamgen.video.tiling import tile

Shape = tuple[int, int, int]


class ClipPool:
    """Windows of one or several datasets, which may have other canvases and rates, as one list.

    clock: its video rate is that of all clips, each dataset's rows have the rate of its own robot.
    lengths: numbers of frames, `clock.frames` where None; an episode gives clips of the longest that fits into it.
    hop: rows between the windows of an episode. short: what becomes of episodes that none fits into: "drop" leaves
    them out, "pad" gives each one clip of the shortest length that repeats its last row.
    copies: every clip is there so many times more, after all clips as they are; each copy is moved by up to `shift`
    pixels down and right, all its frames and views alike, the border repeated.

    too_short: how many episodes that were. Raises ValueError if there is no clip at all, for a dataset of fewer rows a
    second than clips have frames, and for copies that would not move.
    """

    def __init__(self, datasets: Sequence[Dataset], clock: Clock, *, lengths: Sequence[int] | None = None,
                 hop: int = 1, short: Literal["drop", "pad"] = "drop", copies: int = 0,
                 shift: int = 0) -> None:  # fmt: skip
        if copies < 0 or (copies and shift < 1):
            raise ValueError(f"copies is {copies}, shift is {shift}; expected copies >= 0 and, with copies, shift >= 1")
        self.datasets, self.too_short, self.copies, self.shift = list(datasets), 0, copies, shift
        frames = sorted(set(lengths or [clock.frames]), reverse=True)
        self.parts: list[_Part] = []
        for dataset in self.datasets:
            clocks = [_clock(dataset, clock.video_hz, n) for n in frames]
            rows = np.array([dataset.length(i) for i in range(len(dataset))], dtype=np.int64)
            level = (rows[:, None] < [c.steps + 1 for c in clocks]).sum(1)  # the longest that fits; past the end: none
            self.too_short += int((level == len(clocks)).sum())
            if short == "pad":
                level = np.minimum(level, len(clocks) - 1)
            for k, c in enumerate(clocks):
                episodes = np.flatnonzero(level == k)
                if len(episodes):
                    windows = Windows([int(n) for n in rows[episodes]], c, hop=hop, short=short)
                    self.parts.append(_Part(dataset, episodes, c.frames, windows))
        for dataset in self.datasets if not self.parts else ():  # says what is missing
            Windows([dataset.length(i) for i in range(len(dataset))], _clock(dataset, clock.video_hz, frames[-1]))
        self.ends = np.cumsum([len(part.windows) for part in self.parts])
        self.padded = self.too_short if short == "pad" else 0

    def __len__(self) -> int:
        return int(self.ends[-1]) * (1 + self.copies)

    def _at(self, k: int) -> tuple["_Part", int, int]:
        """The part that clip k is of, its episode there, and its first row."""
        k = int(k) % int(self.ends[-1])
        number = int(np.searchsorted(self.ends, k, side="right"))
        part = self.parts[number]
        return part, *part.windows.at(k - (int(self.ends[number - 1]) if number else 0))

    def episode(self, k: int) -> tuple[int, int]:
        """Dataset and episode of clip k."""
        part, local, _ = self._at(k)
        return self.datasets.index(part.dataset), int(part.episodes[local])

    def shape(self, k: int) -> Shape:
        """Frames, height, width of clip k."""
        part, *_ = self._at(k)
        return part.frames, *part.dataset.robot.canvas

    def frames(self, k: int) -> UInt8[np.ndarray, "t h w 3"]:
        part, local, row = self._at(k)
        views = part.dataset.views(int(part.episodes[local]), part.windows.rows(local, row))
        if k >= self.ends[-1]:
            by = rng_for(0, "shift", k).integers(-self.shift, self.shift + 1, 2)
            views = {name: moved(video, *by.tolist()) for name, video in views.items()}
        return tile(part.dataset.robot, views)

    def robot(self, k: int) -> Embodiment:
        """Whose canvas clip k is on."""
        return self._at(k)[0].dataset.robot

    def instruction(self, k: int) -> str:
        part, local, _ = self._at(k)
        return part.dataset.instruction(int(part.episodes[local]))

    def counts(self) -> dict[str, int]:
        """Clips by shape, "17x64x64"."""
        return dict(Counter("x".join(map(str, self.shape(k))) for k in range(len(self))))


def moved(video: UInt8[np.ndarray, "t h w 3"], down: int, right: int) -> UInt8[np.ndarray, "t h w 3"]:
    """Pictures moved by whole pixels; the border is repeated."""
    rows, columns = (
        np.clip(np.arange(n) - by, 0, n - 1) for n, by in zip(video.shape[1:3], (down, right), strict=True)
    )
    return video[:, rows][:, :, columns]


def _clock(dataset: Dataset, video_hz: str, frames: int) -> Clock:
    """Of clips of a dataset, whose rows have the rate of its robot."""
    if dataset.robot.rate < Fraction(video_hz):
        raise ValueError(f"{dataset.root} has {dataset.robot.robot_hz} rows a second, fewer than the {video_hz} frames "
                         "of a clip; lower world_model.video_hz, or leave the dataset out")  # fmt: skip
    return Clock(robot_hz=dataset.robot.robot_hz, video_hz=video_hz, frames=frames)


@dataclass(frozen=True, eq=False)
class _Part:
    """Windows of one length over some episodes of a dataset."""

    dataset: Dataset
    episodes: np.ndarray
    frames: int
    windows: Windows


class Buckets:
    """Clips `rows` of given shapes, drawn in batches of one shape.

    batch_size: clips in a batch; with `budget`, as many as have at most so many tokens, `tokens(shape)` each. Every
    clip is as likely as any other.

    Raises ValueError if a single clip is over the budget.
    """

    def __init__(self, rows: Int64[np.ndarray, " n"], shapes: Sequence[Shape], *, batch_size: int,
                 budget: int | None = None, tokens: Callable[[Shape], int] | None = None) -> None:  # fmt: skip
        found: dict[Shape, list[int]] = {}
        for row, shape in zip(rows, shapes, strict=True):
            found.setdefault(shape, []).append(int(row))
        self.shapes = sorted(found)
        self.rows = [np.array(found[shape], dtype=np.int64) for shape in self.shapes]
        self.sizes = [batch_size] * len(self.shapes)
        if budget is not None:
            each = [(tokens or np.prod)(shape) for shape in self.shapes]
            over = [f"{shape} has {n}" for shape, n in zip(self.shapes, each, strict=True) if n > budget]
            if over:
                raise ValueError(f"token_budget is {budget}; one clip of (frames, height, width) {over[0]} tokens. "
                                 "Raise the budget or take shorter clips.")  # fmt: skip
            self.sizes = [int(budget // n) for n in each]
        share = np.array([len(r) / size for r, size in zip(self.rows, self.sizes, strict=True)])
        self.share = share / share.sum()

    def batch(self, rng: np.random.Generator) -> Int64[np.ndarray, " b"]:
        """The clips of one step."""
        k = int(rng.choice(len(self.shapes), p=self.share)) if len(self.shapes) > 1 else 0
        return self.rows[k][rng.integers(0, len(self.rows[k]), self.sizes[k])]
