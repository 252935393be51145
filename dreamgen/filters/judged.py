"""Did the dream fulfil its instruction? A learned judge's probability of success, as a filter."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dreamgen.core.clip import Clip, Labels
from dreamgen.core.protocols import Judge


def require_known(judge: Judge, texts: Sequence[str]) -> None:
    """ValueError if the judge says which instructions it knows, and none of `texts` is among them."""
    known = getattr(judge, "instructions", None)
    if known is not None and not set(known) & set(texts):
        raise ValueError(f"the judge knows none of the instructions {list(texts)}, it would abstain on all; it knows "
                         f"{list(known)}: train it on them with jobs.train_judge, or choose others")  # fmt: skip


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
