"""Could the robot carry the labels out? How far they lie outside the embodiment's limits."""

from collections.abc import Sequence

import numpy as np

from dreamgen.core.clip import Clip, Labels
from dreamgen.core.embodiment import Embodiment
from dreamgen.core.kinematics import inside
from dreamgen.filters.reference import Referenced


class Limits(Referenced):
    """Mean excess over the limits of each action part that has any, as a share of half the part's range.

    Recorded actions keep the limits, so there is nothing to take a reference from: `half` is a number.
    ValueError if no action part of the embodiment has limits.
    """

    name = "limits"

    def __init__(self, *, robot: Embodiment, half: float | Sequence[float] = 0.02, sharpness: float = 2.0) -> None:
        super().__init__(half=half, sharpness=sharpness)
        self.parts = [part for part in robot.action if part.limits is not None]
        if not self.parts:
            raise ValueError(f"embodiment '{robot.name}' states no limits of its actions; give its action parts "
                             f"`limits`, or leave the filter '{self.name}' out")  # fmt: skip

    def raw(self, clips: Sequence[Clip], labels: Sequence[Labels]) -> np.ndarray:
        """One signal a part."""
        found = np.zeros((len(labels), len(self.parts)))
        for k, part in enumerate(self.parts):
            low, high = part.limits
            for row, label in enumerate(labels):
                value = inside(part, label.value[:, part.slice].astype(np.float64))
                found[row, k] = np.maximum(np.maximum(value - high, low - value), 0).mean() * 2 / (high - low)
        return found
