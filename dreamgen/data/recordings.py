"""Recorded episodes as clips: what a labeler, a judge or a filter sees of them."""

import numpy as np

from dreamgen.core.clip import Clip
from dreamgen.core.clock import Clock
from dreamgen.data.lerobot import Dataset


def recorded_clip(dataset: Dataset, index: int, clock: Clock) -> tuple[Clip, np.ndarray]:
    """All of episode `index` at the video rate of `clock`, and the actions (s a) that the clip spans.

    Raises ValueError for an episode too short for two frames.
    """
    episode = dataset.episode(index)
    whole = clock.with_frames(max(2, clock.frames_in(dataset.length(index))))
    if whole.steps >= dataset.length(index):
        raise ValueError(
            f"episode {index} of {dataset.root} has {dataset.length(index)} rows; two frames at "
            f"{clock.video_hz} Hz need {whole.steps + 1}. Leave it out, or raise the video rate."
        )
    clip = Clip(id=f"episode_{index:06d}", video=dataset.canvas(index, whole.rows), video_hz=whole.video_hz,
                instruction=episode.instruction, state=episode.state[0])  # fmt: skip
    return clip, episode.action[: whole.steps]


class Recordings:
    """The episodes of `dataset` as clips by id, at the video rate of `clock`; their actions are not looked at."""

    def __init__(self, dataset: Dataset, clock: Clock) -> None:
        self.dataset, self.clock = dataset, clock

    def ids(self) -> list[str]:
        return [f"episode_{index:06d}" for index in range(len(self.dataset))]

    def read(self, id: str) -> Clip:
        return recorded_clip(self.dataset, int(id.removeprefix("episode_")), self.clock)[0]
