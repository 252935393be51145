"""Does anything move? The median over frame gaps of the root mean square change of a pixel, as a share of white."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from dreamgen.core.clip import Clip, Labels
from dreamgen.filters.reference import Referenced


def changes(video: UInt8[np.ndarray, "t h w 3"]) -> Float[np.ndarray, " g"]:
    """Root mean square change of a pixel over each frame gap, in [0, 1]; one 0 for a single frame."""
    if len(video) < 2:
        return np.zeros(1)
    found = np.zeros(len(video) - 1)
    for gap, (now, then) in enumerate(zip(video[:-1], video[1:], strict=True)):  # one by one: recordings are long
        change = (then.astype(np.float32) - now) / 255
        found[gap] = np.sqrt((change.astype(np.float64) ** 2).mean())
    return found


class Frozen(Referenced):
    """Motion of a clip; low is bad. A robot that waits at the end of a recording sets the reference too."""

    name = "frozen"
    better_high = True
    needs_labels = False

    def raw(self, clips: Sequence[Clip], labels: Sequence[Labels]) -> np.ndarray:
        """One signal."""
        return np.array([[np.median(changes(clip.video))] for clip in clips], np.float64).reshape(len(clips), 1)
