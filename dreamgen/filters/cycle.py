"""Do the labels explain the video? Dream the first frame again under the labels, and compare.

An action-conditioned model shows what the labels would do. Its error is measured in units of what happens at all: the
mean square difference of the two videos over that of the dream and its own first frame held. 0 is a perfect cycle, 1
is as far as if nothing were predicted. A clip in which nothing moves has no scale, and fails. A clip is compared up to
the last frame that the model can end on; where it is longer than the model's window, the model goes on from the frames
that it has dreamt. Where there is no such frame, the filter abstains. Longer clips, recorded ones too, err more.
"""

from collections.abc import Sequence

import numpy as np

from dreamgen.core.clip import Clip, Labels
from dreamgen.core.protocols import ActionWorldModel
from dreamgen.filters.again import dreamt_again
from dreamgen.filters.reference import Referenced


def squared(a: np.ndarray, b: np.ndarray) -> float:
    """Mean square difference of two videos, white being 1."""
    return float((((a.astype(np.float32) - b.astype(np.float32)) / 255) ** 2).mean())


class Cycle(Referenced):
    """Relative error of the dream under its labels.

    world_model: an ActionWorldModel of the same robot and rate. instruction: whether it is told the instruction too;
    without, the actions alone have to explain the video.
    ValueError for a clip of another rate than the model's.
    """

    name = "cycle"

    def __init__(self, *, world_model: ActionWorldModel, instruction: bool = False, half: float | None = None,
                 quantile: float = 0.95, sharpness: float = 2.0, floor: float = 1e-3) -> None:  # fmt: skip
        super().__init__(half=half, quantile=quantile, sharpness=sharpness, floor=floor)
        self.world_model, self.instruction = world_model, instruction

    def raw(self, clips: Sequence[Clip], labels: Sequence[Labels]) -> np.ndarray:
        """One signal."""
        found = np.full((len(clips), 1), np.nan)
        for k, clip, again in dreamt_again(self.world_model, clips, labels, filter=self.name,
                                           instruction=self.instruction):  # fmt: skip
            seen = clip.video[1:]
            found[k] = squared(seen, again[1:]) / max(squared(seen, clip.video[:1]), 1e-12)
        return found
