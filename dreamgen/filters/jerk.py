"""Do the labels move as a robot does? Jerk of continuous parts, switches of binary ones.

Jerk is the third derivative of position: the third difference of an absolute part, the second of a delta, which is a
velocity already; its root mean square over the clip, in the part's unit a step^3. The velocity of a rotation is its
turn from step to step, about each axis (in rad where its entries are no angles). A binary part counts its switches a
step, since recordings may be many times as long as dreams.
"""

from collections.abc import Sequence

import numpy as np

from dreamgen.core import rotations
from dreamgen.core.clip import Clip, Labels
from dreamgen.core.embodiment import Embodiment, Part
from dreamgen.filters.reference import Referenced


def jerk(value: np.ndarray, part: Part) -> float:
    """The signal of one part of labels (s k); 0 for clips too short to have any."""
    if part.kind == "binary":
        low, high = part.limits or (0.0, 1.0)
        return float(np.diff(value > (low + high) / 2, axis=0).sum() / max(1, len(value) - 1))
    if part.rotation:
        turn = rotations.read(part, value)
        turn = turn if part.kind == "delta" else rotations.between(part, turn[:-1], turn[1:])
        change = np.diff(rotations.log(turn) / part.radians, 2, axis=0)
        return float(np.sqrt((change**2).mean())) if change.size else 0.0
    change = np.diff(value.astype(np.float64), 2 if part.kind == "delta" else 3, axis=0)
    return float(np.sqrt((change**2).mean())) if change.size else 0.0


class Jerk(Referenced):
    """Jerk by part of the action; the reference is what the same labeler says of recorded video."""

    name = "jerk"

    def __init__(self, *, robot: Embodiment, half: float | Sequence[float] | None = None, quantile: float = 0.95,
                 sharpness: float = 2.0, floor: float = 1e-3) -> None:  # fmt: skip
        super().__init__(half=half, quantile=quantile, sharpness=sharpness, floor=floor)
        self.robot = robot

    def raw(self, clips: Sequence[Clip], labels: Sequence[Labels]) -> np.ndarray:
        """One signal a part."""
        parts = self.robot.action
        return np.array([[jerk(label.value[:, part.slice], part) for part in parts] for label in labels],
                        np.float64).reshape(len(labels), len(parts))  # fmt: skip
