"""Overlapping windows to one label per robot step.

Windows of `frames` frames slide by one frame over a clip. Window k predicts the robot steps `[rows[k], rows[k + frames
- 1])`; a step is therefore seen by several windows, and by several samples of each. They merge by a rule:

mean    all windows alike
centre  windows weighted by how far the step lies from their ends (an action shows in the frames after it)
median  the middle of all predictions
first   only the first gap of each window, the last window to its end (what a receding horizon would execute)

Deltas are displacements per robot step, so they merge as they are; binary parts are voted and leave as commands.
"""

from dataclasses import dataclass

import numpy as np

from dreamgen.core.clip import Labels
from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment
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


def _median(sorted_values: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Median over axis 0 of ascending values (n s a), of which the first `count` (s,) are real."""
    low = np.take_along_axis(sorted_values, ((count - 1) // 2)[None, :, None], 0)[0]
    return (low + np.take_along_axis(sorted_values, (count // 2)[None, :, None], 0)[0]) / 2


def merge(chunks: np.ndarray, windows: Windows, robot: Embodiment, rule: str = "centre") -> Labels:
    """Merge predictions of all windows and samples.

    chunks (n k h a): n samples of each window's chunk, in the units of the robot; slots outside a window are ignored.
    Returns Labels (s a). spread: weighted standard deviation over windows and samples; of the votes for binary parts.
    """
    n, k, h, a = chunks.shape
    if (k, h) != windows.mask.shape or a != robot.action_dim:
        raise ValueError(f"chunks are {chunks.shape}; expected (n, {windows.mask.shape[0]}, {windows.mask.shape[1]}, "
                         f"{robot.action_dim}) for this clip and robot '{robot.name}'")  # fmt: skip
    weight = np.broadcast_to(windows.weights(rule), (n, k, h)).reshape(n * k, h)
    value = chunks.astype(np.float64).reshape(n * k, h, a)
    for part in robot.action:
        if part.kind == "binary":
            low, high = commands(part)
            vote = value[..., part.slice] > (low + high) / 2
            value[..., part.slice] = np.where(vote, high, low)
    # one row per (sample, window), one column per step of the clip; steps that a window does not see stay empty
    steps = np.broadcast_to(windows.steps, (n, k, h)).reshape(n * k, h)
    row, slot = np.nonzero(weight > 0)
    at = steps[row, slot]
    dense, dense_weight = np.full((n * k, windows.total, a), np.inf), np.zeros((n * k, windows.total))
    dense[row, at], dense_weight[row, at] = value[row, slot], weight[row, slot]
    seen = (dense_weight > 0)[..., None]
    share = dense_weight / dense_weight.sum(0)
    filled = np.where(seen, dense, 0.0)
    mean = np.einsum("ns,nsa->sa", share, filled)
    spread = np.sqrt(np.einsum("ns,nsa->sa", share, np.where(seen, filled - mean, 0.0) ** 2))
    merged = _median(np.sort(dense, axis=0), seen[..., 0].sum(0)) if rule == "median" else mean
    for part in robot.action:
        if part.kind == "binary":
            low, high = commands(part)
            merged[:, part.slice] = np.where(mean[:, part.slice] > (low + high) / 2, high, low)
    return Labels(value=merged.astype(np.float32), spread=spread.astype(np.float32))
