"""Did the dream fulfil its instruction? A learned judge's probability of success, as a filter."""

from collections.abc import Sequence

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
        return np.asarray(self.judge.judge(clips), np.float64)
