"""Recorded video as labelers need it: which episodes are long enough for them, and the clips of a few at a time."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from dreamgen.core.clip import Clip
from dreamgen.core.clock import Clock
from dreamgen.data.joined import Joined
from dreamgen.data.lerobot import Dataset
from dreamgen.data.recordings import recorded_clip
from dreamgen.stages.sharing import grouped

log = logging.getLogger(__name__)


def long_enough(dataset: Dataset | Joined, episodes: Iterable[int], labelers: Sequence[Any], least: int = 1,
                clock: Clock | None = None) -> tuple[list[int], int]:  # fmt: skip
    """Those of `episodes` that are as long as the shortest clips that all `labelers` read, and how many are not.

    clock: of the clips, that of the first labeler where it is not given. Without labelers two frames are enough.
    Raises ValueError if fewer than `least` are.
    """
    episodes, clock = list(episodes), clock or labelers[0].clock
    frames = max((getattr(labeler, "window", 2) for labeler in labelers), default=2)
    kept = [i for i in episodes if clock.frames_in(dataset.length(i)) >= frames]
    rows = clock.with_frames(frames).steps + 1
    need, remedy = ("a window of the labeler", ", or lower the labeler's `frames`") if labelers else ("a clip", "")
    if len(kept) < least:
        raise ValueError(f"of {len(episodes)} episodes of {dataset.root} {len(kept)} have the {rows} rows that "
                         f"{frames} frames at {clock.video_hz} Hz span, {need}; {least} are needed: record longer "
                         f"ones{remedy}")  # fmt: skip
    short = len(episodes) - len(kept)
    if short:
        log.warning("%d of %d episodes of %s are left out: they are shorter than the %d rows of %s",
                    short, len(episodes), dataset.root, rows, need)  # fmt: skip
    return kept, short


def batches_of(dataset: Dataset | Joined, episodes: Sequence[int], clock: Clock,
               size: int) -> Iterator[tuple[list[Clip], list[np.ndarray]]]:  # fmt: skip
    """Clips of `size` episodes at a time, and the actions (s a) that each spans; decoded when asked for."""
    for part in grouped(episodes, size):
        read = [recorded_clip(dataset, i, clock) for i in part]
        yield [clip for clip, _ in read], [action for _, action in read]
