"""Labelled video at the rate of its pictures: one row per new picture, with what the robot does until the next one.

Rows at the robot's rate repeat each picture until the next (`frame_fresh`), so a trainer that does not know the column
pairs old pictures with later actions. Recordings, whose pictures are all new, come to the same rate for it. Over the
gap between two pictures, which `Clock` gives, displacements add up, turns are composed, commands are voted on, and of
positions the last one counts: `kinematics.follow` arrives where it arrived.
"""

from dataclasses import replace
from math import ceil

import numpy as np

from dreamgen.core import rotations
from dreamgen.core.clip import Episode
from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment, Part
from dreamgen.core.kinematics import along

SPREAD = "label_spread"


def slowed(robot: Embodiment, video_hz: str) -> Embodiment:
    """The robot with one row per picture; limits of displacements are those of a whole gap."""
    most = ceil(Clock(robot_hz=robot.robot_hz, video_hz=video_hz, frames=2).stride)
    wide = []
    for part in robot.action:
        if part.kind == "delta" and part.limits is not None and (part.width == 3 or not part.rotation):
            low, high = part.limits
            part = replace(part, limits=(min(low, most * low), max(high, most * high)))
        wide.append(part)
    return replace(robot, robot_hz=video_hz, action=tuple(wide))


def shown_rows(episode: Episode) -> np.ndarray:
    """For each row (s,) the one whose picture it shows: of labelled video the last new one, of recordings itself."""
    rows, fresh = np.arange(len(episode.action)), episode.extra.get("frame_fresh")
    return rows if fresh is None else np.maximum.accumulate(np.where(fresh.reshape(-1) != 0, rows, 0))


def at_video_rate(episode: Episode, robot: Embodiment, hz: str | None = None) -> tuple[Episode, np.ndarray]:
    """The episode, which `robot` recorded, with its new pictures' rows alone, and which rows (k,) these were. hz: their
    rate, by default that of what `label` wrote; recordings need it.

    Rows after the last whole gap are left out. Other columns are those of the row; `label_spread` is that of a sum of
    independent errors for displacements, of the last row for positions, the mean for commands.

    Raises ValueError if the episode has no new pictures at that rate, or does not tell it, or has not one whole gap.
    """
    told, fresh, steps = episode.meta.get("video_hz"), episode.extra.get("frame_fresh"), len(episode.action)
    if hz is None and (told is None or fresh is None):
        raise ValueError("it does not tell which of its pictures are new (column frame_fresh, video_hz), as what "
                         "`label` writes does; say their rate (rate=10), or export it at rate=robot")  # fmt: skip
    hz = hz or told
    clock = Clock(robot_hz=robot.robot_hz, video_hz=str(hz), frames=2)
    if steps < clock.steps:
        raise ValueError(f"it has {steps} rows; one gap at {hz} Hz needs {clock.steps}")
    gaps = clock.with_frames(clock.frames_in(steps + 1)).gaps()
    rows = np.array([first for first, _ in gaps])
    if fresh is not None and not fresh[rows].all():
        raise ValueError(f"its new pictures are not those of {hz} Hz; export it at the rate of its pictures, or label "
                         f"it again")  # fmt: skip
    action = np.concatenate([_composed(part, episode.action, gaps, robot) for part in robot.action], axis=1)
    extra = {name: values[rows] for name, values in episode.extra.items()}
    if SPREAD in extra:
        extra[SPREAD] = np.concatenate([_spread(part, episode.extra[SPREAD], gaps) for part in robot.action], axis=1)
    meta = {key: value for key, value in episode.meta.items() if key != "frame_rows"}
    meta |= {} if told is None else {"video_hz": hz}
    video = {name: frames[rows] for name, frames in episode.video.items()}
    return replace(episode, state=episode.state[rows], action=action, video=video, extra=extra, meta=meta), rows


def _composed(part: Part, action: np.ndarray, gaps: list[tuple[int, int]], robot: Embodiment) -> np.ndarray:
    """One row per gap (k w) of a part's actions."""
    pieces = [action[first:stop, part.slice] for first, stop in gaps]
    if part.kind == "delta" and part.rotation:
        ends = [rotations.composed(part, rotations.read(part, piece))[-1] for piece in pieces]
        return rotations.tell(part, np.stack(ends)).astype(np.float32)
    if part.kind == "delta":
        pieces = [along(robot, part, action[first:stop]) for first, stop in gaps]
        return np.stack([piece.sum(0, dtype=np.float64) for piece in pieces]).astype(np.float32)
    return np.stack([_voted(piece) if part.kind == "binary" else piece[-1] for piece in pieces])


def _voted(values: np.ndarray) -> np.ndarray:
    """The most frequent value of each entry of (n w), the later one where there is a tie."""
    votes = (values[:, None] == values[None]).sum(1)
    last = len(values) - 1 - votes[::-1].argmax(0)
    return values[last, np.arange(values.shape[1])]


def _spread(part: Part, spread: np.ndarray, gaps: list[tuple[int, int]]) -> np.ndarray:
    """One row per gap (k w) of the spread of a part's actions."""
    pieces = [spread[first:stop, part.slice] for first, stop in gaps]
    if part.kind == "delta":
        return np.stack([np.sqrt((piece**2).sum(0)) for piece in pieces])
    return np.stack([piece.mean(0) if part.kind == "binary" else piece[-1] for piece in pieces])
