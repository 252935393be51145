"""Recorded episodes as clips, as a labeler, a judge or a filter sees them, and what was not taken of them."""

from dataclasses import replace

import numpy as np

from dreamgen.core.clip import Clip, Episode
from dreamgen.core.clock import Clock
from dreamgen.data.joined import Joined
from dreamgen.data.lerobot import Dataset
from dreamgen.data.prompts import ORIGIN
from dreamgen.data.video_rate import shown_rows


def whole_clock(dataset: Dataset | Joined, index: int, clock: Clock) -> Clock:
    """`clock` with as many frames as episode `index` has. Raises ValueError for one too short for two."""
    whole = clock.with_frames(max(2, clock.frames_in(dataset.length(index))))
    if whole.steps >= dataset.length(index):
        raise ValueError(
            f"episode {dataset.index(index)} of {dataset.root} has {dataset.length(index)} rows; two frames at "
            f"{clock.video_hz} Hz need {whole.steps + 1}. Leave it out, or raise the video rate."
        )
    return whole


def recorded_clip(dataset: Dataset | Joined, index: int, clock: Clock, *,
                  unseen: bool = False) -> tuple[Clip, np.ndarray]:  # fmt: skip
    """All of episode `index` at the video rate of `clock`, and the actions (s a) that the clip spans.

    unseen: without its pictures, none of which is decoded. Raises ValueError for an episode too short for two frames,
    and for labelled video at another rate than that of its new pictures: in repeated ones nothing would seem to move.
    """
    episode, whole = dataset.episode(index), whole_clock(dataset, index, clock)
    if (shown_rows(episode)[whole.rows] != whole.rows).any():
        raise ValueError(f"episode {dataset.index(index)} of {dataset.root} has new pictures at "
                         f"{episode.meta.get('video_hz', 'no one rate')} Hz and repeats them between (column "
                         f"frame_fresh); at {clock.video_hz} Hz some frames would show the one before. Read it with a "
                         f"model of that rate or of a part of it, or leave it out")  # fmt: skip
    video = np.zeros((0, *dataset.robot.canvas, 3), np.uint8) if unseen else dataset.canvas(index, whole.rows)
    clip = Clip(id=_id(dataset, index), video=video, video_hz=whole.video_hz, instruction=episode.instruction,
                pair=episode.meta.get("pair") or "", state=dataset.first_state(index),
                origin=_origin(episode))  # fmt: skip
    return clip, episode.action[: whole.steps]


class Recordings:
    """The episodes of `dataset` as clips by id, at the video rate of `clock`; their actions are not looked at. name:
    the fingerprint of the dataset."""

    def __init__(self, dataset: Dataset, clock: Clock, name: str) -> None:
        self.dataset, self.clock, self.name = dataset, clock, name
        self.index = {_id(dataset, index): index for index in range(len(dataset))}

    def ids(self) -> list[str]:
        return list(self.index)

    def read(self, id: str) -> Clip:
        index = self.index[id]
        clip = recorded_clip(self.dataset, index, self.clock)[0]
        return replace(
            clip, origin={**clip.origin, "dataset": self.name, "episode": self.dataset.index(index), "row": 0}
        )


def noted(*datasets: Dataset | None) -> dict[str, list]:
    """What a manifest says of the datasets that a stage read: `mended`, notes, and `skipped`, the bad episodes that
    `skip_bad` left out, each {dataset, episode, reason}."""
    read = [dataset for dataset in datasets if dataset is not None]
    mended = dict.fromkeys(f"{d.root.name}: {note}" for d in read for note in d.mended)
    skipped = {(d.root, k): {"dataset": d.root.name, "episode": k, "reason": why}
               for d in read for k, why in d.skipped.items()}  # fmt: skip
    return {"mended": list(mended), "skipped": list(skipped.values())}


def _origin(episode: Episode) -> dict:
    """What the episode says of where it began: simulator, seed and instruction, or a file of a folder of videos."""
    return {key: value for key, value in episode.meta.items() if key in ORIGIN}


def _id(dataset: Dataset | Joined, index: int) -> str:
    """Names a clip by the dataset's own number of its episode."""
    return f"episode_{dataset.index(index):06d}"
