"""Do the labeler's overlapping windows agree? Dreams that do not move as a robot does are labelled differently by each.

The signal of a continuous part is the median over steps of the label's standard deviation, so that one bad moment does
not condemn a clip; of a binary part the mean, the share of disputed votes. On real video spread foretells the label's
error (rank correlation in the scores of `jobs.evaluate stage=labels`).
"""

from collections.abc import Sequence

import numpy as np

from dreamgen.core.clip import Clip, Labels
from dreamgen.core.embodiment import Embodiment
from dreamgen.filters.reference import Referenced


class Spread(Referenced):
    """Spread of the merged labels by part of the action, in the part's unit."""

    name = "spread"

    def __init__(self, *, robot: Embodiment, half: float | Sequence[float] | None = None, quantile: float = 0.95,
                 sharpness: float = 2.0, floor: float = 1e-3) -> None:  # fmt: skip
        super().__init__(half=half, quantile=quantile, sharpness=sharpness, floor=floor)
        self.robot = robot

    def raw(self, clips: Sequence[Clip], labels: Sequence[Labels]) -> np.ndarray:
        """One signal a part. ValueError names a clip whose labels have no spread."""
        found = []
        for clip, label in zip(clips, labels, strict=True):
            if not np.isfinite(label.spread).all():
                raise ValueError(f"clip '{clip.id}' has no label spread; label it with jobs.label, or leave the filter "
                                 f"'{self.name}' out")  # fmt: skip
            steps = [label.spread[:, part.slice].mean(1) for part in self.robot.action]
            found.append([(np.mean if part.kind == "binary" else np.median)(step)
                          for part, step in zip(self.robot.action, steps, strict=True)])  # fmt: skip
        return np.array(found, np.float64).reshape(len(clips), len(self.robot.action))
