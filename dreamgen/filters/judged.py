"""Did the dream fulfil its instruction? A learned judge's probability of success, as a filter."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dreamgen.core.clip import Clip, Labels
from dreamgen.core.protocols import Judge


class Judged:
    """The score is the judge's probability; it abstains (nan) on instructions that the judge never saw."""

    name = "judge"
    needs_labels = False

    def __init__(self, *, judge: Judge) -> None:
        self.judge = judge

    def score(self, clips: Sequence[Clip], labels: Sequence[Labels]) -> np.ndarray:
        """(b,) in [0, 1] or nan."""
        acted = zip(clips, labels or [None] * len(clips), strict=True)  # what the labels say that the robot did
        clips = [clip if found is None else replace(clip, action=found.value) for clip, found in acted]
        return np.asarray(self.judge.judge(clips), np.float64)
