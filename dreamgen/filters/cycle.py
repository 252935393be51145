"""Do the labels explain the video? Dream the first frame again under the labels, and compare.

An action-conditioned model shows what the labels would do. Its error is measured in units of what happens at all: the
mean square difference of the two videos over that of the dream and its own first frame held. 0 is a perfect cycle, 1
is as far as if nothing were predicted. A clip in which nothing moves has no scale, and fails. A clip is compared up to
the last frame that the model can end on; where it is longer than the model's window, the model goes on from the frames
that it has dreamt. Where there is no such frame, the filter abstains. Longer clips, recorded ones too, err more.
"""

from collections.abc import Sequence

import numpy as np

from dreamgen.core.clip import Clip, Labels, Past, Prompt
from dreamgen.core.kinematics import clipped
from dreamgen.core.protocols import ActionWorldModel
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
        model, asked, gaps = self.world_model, {}, getattr(self.world_model, "gaps", 1)
        for k, (clip, label) in enumerate(zip(clips, labels, strict=True)):
            if clip.video_hz != model.clock.video_hz:
                raise ValueError(f"clip '{clip.id}' runs at {clip.video_hz} Hz, the action-conditioned model at "
                                 f"{model.clock.video_hz}; filter '{self.name}' needs one of that rate")  # fmt: skip
            frames = (len(clip.video) - 1) // gaps * gaps + 1
            if frames < 2:
                continue
            clock = model.clock.with_frames(frames)
            action = clipped(model.robot, label.value[: clock.steps])
            asked.setdefault((clock.frames, clip.video.shape[1:]), []).append((k, clip, action))
        found = np.full((len(clips), 1), np.nan)
        for (frames, _), group in asked.items():
            pasts = [Past.begin(self._prompt(clip), model.robot.action_dim) for _, clip, _ in group]
            again = model.imagine(pasts, [action for _, _, action in group])
            for (k, clip, _), other in zip(group, again, strict=True):
                seen = clip.video[1:frames]
                found[k] = squared(seen, other[: frames - 1]) / max(squared(seen, clip.video[:1]), 1e-12)
        return found

    def _prompt(self, clip: Clip) -> Prompt:
        text = clip.instruction if self.instruction else ""
        return Prompt(id=clip.id, image=clip.video[0], instruction=text, seed=clip.seed, state=clip.state)
