"""Would the labels fulfil the instruction? An action-conditioned model follows them, and a judge looks at that.

A dream is worth what its labels do on the robot. The judge of the dream itself sees what was meant; here it sees where
the labels lead, from the first frame on, in a model that knows nothing but actions: a replay without a simulator. Noise
of the model is averaged over several dreams.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from dreamgen.core.clip import Clip, Labels
from dreamgen.core.protocols import ActionWorldModel, Judge
from dreamgen.filters.again import dreamt_again


class Imagined:
    """The judge's mean probability of success over `dreams` of the labels.

    world_model: an ActionWorldModel of the same robot and rate; instruction: whether it is told the instruction, too.
    judge: best one that was trained on this model's dreams. It abstains (nan) on clips too short for a dream, and where
    the judge does on any dream. ValueError for a clip of another rate than the model's.
    """

    name = "imagined"
    needs_labels = True

    def __init__(self, *, world_model: ActionWorldModel, judge: Judge, dreams: int = 2,
                 instruction: bool = False) -> None:  # fmt: skip
        if dreams < 1:
            raise ValueError(f"filter '{self.name}': dreams is {dreams}; expected 1 or more")
        self.world_model, self.judge, self.dreams, self.instruction = world_model, judge, dreams, instruction

    def score(self, clips: Sequence[Clip], labels: Sequence[Labels]) -> Float[np.ndarray, " b"]:
        """(b,) in [0, 1] or nan."""
        told = np.full((self.dreams, len(clips)), np.nan)
        for number in range(self.dreams):
            again = list(dreamt_again(self.world_model, clips, labels, filter=self.name, instruction=self.instruction,
                                      number=number))  # fmt: skip
            if again:
                shown = [replace(clip, video=video) for _, clip, video in again]
                told[number, [k for k, _, _ in again]] = self.judge.judge(shown)
        return told.mean(0)
