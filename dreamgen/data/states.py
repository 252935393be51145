"""States as far as they are known: a row of dreams may hold placeholders, which its column `state_known` tells."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dreamgen.core.clip import Episode
from dreamgen.core.embodiment import Embodiment
from dreamgen.core.kinematics import follow

if TYPE_CHECKING:
    from dreamgen.data.lerobot import Dataset


def known_states(episode: Episode, rows: int | slice | np.ndarray = slice(None)) -> np.ndarray:
    """The states of an episode at `rows` (s d), or at one (d,), NaN in entries that the episode does not call known."""
    known = episode.extra.get("state_known")
    return episode.state[rows] if known is None else np.where(known[rows] != 0, episode.state[rows], np.nan)


def commanded_states(
    robot: Embodiment, episode: Episode, read: Sequence[int] | slice = slice(None)
) -> np.ndarray | None:
    """States (s + 1, d) to which the commands of an episode lead from its first state by the embodiment's rule; None
    where one of the entries `read` of that one is not known."""
    first = known_states(episode, 0)
    if not np.isfinite(first[read]).all():
        return None
    return follow(robot, np.nan_to_num(first), episode.action)[0]


def state_in_dream(data: "Dataset", i: int, row: int) -> np.ndarray:
    """What a dream that began with episode i takes its state at a row for, empty where that is not known."""
    if row == 0:
        return data.state(i, 0)
    states = commanded_states(data.robot, data.episode(i))
    return data.state(i, 0)[:0] if states is None else states[row]
