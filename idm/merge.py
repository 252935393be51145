"""Overlapping windows to one label per robot step.

Windows of `frames` frames slide by one frame over a clip. Window k predicts the robot steps `[rows[k], rows[k + frames
- 1])`; a step is therefore seen by several windows, and by several samples of each. They merge by a rule:

mean    all windows alike
centre  windows weighted by how far the step lies from their ends (an action shows in the frames after it)
median  the middle of all predictions
first   only the first gap of each window, the last window to its end (what a receding horizon would execute)

Deltas are displacements per robot step, so they merge as they are; binary parts are voted and leave as commands. Of
rotations the mean is the one whose matrix is nearest to theirs, the median that of the turns which lead there from it.
"""

from dataclasses import dataclass, replace

import numpy as np

from dreamgen.core import rotations
from dreamgen.core.clip import Labels
from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment, Part
from dreamgen.core.kinematics import commands

RULES = ("mean", "centre", "median", "first")


@dataclass(frozen=True)
class Windows:
    """All windows of `frames` frames in a clip on `clock`, at stride one frame.

    at (k f): place of each frame in robot steps from the window's first; steps (k h): robot step of each slot of the
    chunk, in the clip; mask (k h): True where the slot lies in the window. h is the longest chunk.
    """

    at: np.ndarray
    steps: np.ndarray
    mask: np.ndarray
    total: int

    @classmethod
    def of(cls, clock: Clock, frames: int) -> "Windows":
        """Raises ValueError for a clip that is shorter than a window."""
        if clock.frames < frames:
            raise ValueError(f"a clip of {clock.frames} frames is shorter than a window of {frames}; "
                             f"label longer clips, or train a labeler with fewer `frames`")  # fmt: skip
        rows = clock.rows
        at = np.stack([rows[k : k + frames] - rows[k] for k in range(clock.frames - frames + 1)])
        slots = np.arange(horizon(clock, frames))
        mask = slots < at[:, -1:]
        starts = rows[: len(at), None]
        return cls(at, np.minimum(starts + slots, clock.steps - 1), mask, clock.steps)

    def some(self, begin: int, stop: int) -> "Windows":
        """Windows begin to stop of them."""
        return replace(self, **{key: getattr(self, key)[begin:stop] for key in ("at", "steps", "mask")})

    def weights(self, rule: str) -> np.ndarray:
        """Weight of each slot (k h), zero outside the window."""
        if rule not in RULES:
            raise ValueError(f"merge rule is '{rule}'; expected one of {', '.join(RULES)}")
        slots = np.arange(self.steps.shape[1])
        if rule == "centre":
            return np.where(self.mask, np.minimum(slots + 1, self.at[:, -1:] - slots), 0).astype(np.float64) ** 2
        if rule == "first":
            first = self.at[:, 1:2].copy()
            first[-1] = self.at[-1, -1]
            return (self.mask & (slots < first)).astype(np.float64)
        return self.mask.astype(np.float64)


def horizon(clock: Clock, frames: int) -> int:
    """Robot steps of the longest window of `frames` frames."""
    return -int(-(frames - 1) * clock.stride // 1)


def _median(value: np.ndarray, at: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Median (s a) of the values (n a) of each step; at (n,): step of each, count (s,): values of each step."""
    order = np.argsort(at, kind="stable")
    place = np.arange(len(at)) - (np.cumsum(count) - count)[at[order]]
    table = np.full((count.max(), len(count), value.shape[1]), np.inf)
    table[place, at[order]] = value[order]
    table.sort(axis=0)
    steps = np.arange(len(count))
    return (table[(count - 1) // 2, steps] + table[count // 2, steps]) / 2


def _rotation(part: Part, value: np.ndarray, at: np.ndarray, share: np.ndarray, median: bool,
              total: int) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Entries (s w) of the mean or median rotation of each step, and the variance (s 1) about an axis, from the entries
    (n w) of its predictions; one that is told as predicted is left as it was told."""
    q, moments = rotations.read(part, value), np.zeros((total, 4, 4))
    np.add.at(moments, at, share[:, :, None] * q[:, :, None] * q[:, None])
    middle = rotations.principal(moments)
    off = rotations.log(rotations.product(rotations.inverse(middle[at]), q))
    variance = np.bincount(at, share[:, 0] * (off**2).mean(1), total)[:, None] / part.radians**2
    if median:
        turn = rotations.exp(_median(off, at, np.bincount(at, minlength=total)))
        middle = rotations.product(middle, turn)
    return rotations.entries(part, middle, value[np.unique(at, return_index=True)[1]]), variance


def merge(chunks: np.ndarray, windows: Windows, robot: Embodiment, rule: str = "centre") -> Labels:
    """Merge predictions of all windows and samples.

    chunks (n k h a): n samples of each window's chunk, in the units of the robot; slots outside a window are ignored.
    Returns Labels (s a). spread: weighted standard deviation over windows and samples; of the votes for binary parts;
    of a rotation that of its turn about an axis, in every entry, in rad where the entries are no angles.
    """
    n, k, h, a = chunks.shape
    if (k, h) != windows.mask.shape or a != robot.action_dim:
        raise ValueError(f"chunks are {chunks.shape}; expected (n, {windows.mask.shape[0]}, {windows.mask.shape[1]}, "
                         f"{robot.action_dim}) for this clip and robot '{robot.name}'")  # fmt: skip
    weight = windows.weights(rule)
    window, slot = np.nonzero(weight)
    # every prediction that counts, sample by sample: its value, its step of the clip, its share of that step
    value = chunks[:, window, slot].reshape(-1, a).astype(np.float64)
    at, weight = np.tile(windows.steps[window, slot], n), np.tile(weight[window, slot], n)
    for part in robot.action:
        if part.kind == "binary":
            low, high = commands(part)
            value[:, part.slice] = np.where(value[:, part.slice] > (low + high) / 2, high, low)
    share = (weight / np.bincount(at, weight, windows.total)[at])[:, None]
    mean, variance = np.zeros((2, windows.total, a))
    np.add.at(mean, at, share * value)
    np.add.at(variance, at, share * (value - mean[at]) ** 2)
    merged = _median(value, at, np.bincount(at, minlength=windows.total)) if rule == "median" else mean
    for part in robot.action:
        if part.kind == "binary":
            low, high = commands(part)
            merged[:, part.slice] = np.where(mean[:, part.slice] > (low + high) / 2, high, low)
        elif part.rotation:
            merged[:, part.slice], variance[:, part.slice] = _rotation(part, value[:, part.slice], at, share,
                                                                       rule == "median", windows.total)  # fmt: skip
    return Labels(value=merged.astype(np.float32), spread=np.sqrt(variance).astype(np.float32))
