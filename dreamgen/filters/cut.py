"""Does the picture jump? The largest change over a frame gap, in units of the clip's usual change.

A cut, an object that appears, a flash: one gap stands out. The usual change is the median, plus one grey level, so that
a clip that hardly moves is not called cut for its noise.
"""

from collections.abc import Sequence

import numpy as np

from dreamgen.core.clip import Clip, Labels
from dreamgen.filters.frozen import changes
from dreamgen.filters.reference import Referenced


class Cut(Referenced):
    """Largest over usual change; high is bad."""

    name = "cut"
    needs_labels = False

    def raw(self, clips: Sequence[Clip], labels: Sequence[Labels]) -> np.ndarray:
        """One signal."""
        gaps = [changes(clip.video) for clip in clips]
        return np.array([[gap.max() / (np.median(gap) + 1 / 255)] for gap in gaps], np.float64).reshape(len(clips), 1)
