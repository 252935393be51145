"""How much a robot moves: robots often wait, and clips in which nothing happens teach little."""

from collections.abc import Sequence

import numpy as np

from dreamgen.core import rotations
from dreamgen.core.embodiment import Part


def motion_of(parts: Sequence[Part], actions: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For each episode's actions (s a), how much motion is commanded in each row (s,): the size of each displacement
    in units of its spread over all episodes, as far as it lies above its median over the episode, mean over entries.
    Deltas are displacements, absolute parts are displaced from row to row, and binary parts count as 0."""
    moved = [_displacements(parts, action) for action in rotations.straightened(parts, actions)]
    scale = np.concatenate(moved).std(0) + 1e-6
    size = [np.abs(each / scale) for each in moved]
    return [(one - np.median(one, axis=0)).clip(0).mean(1) for one in size]


def _displacements(parts: Sequence[Part], action: np.ndarray) -> np.ndarray:
    """Displacements (s a) that actions (s a) command; of an absolute rotation the angle, in each of its entries."""
    moved = action.copy()
    for part in parts:
        entry = action[:, part.slice]
        if part.kind == "delta":
            continue
        moved[:, part.slice] = 0
        if part.kind == "absolute" and part.rotation:
            moved[1:, part.slice] = rotations.apart(part, entry[:-1], entry[1:])[:, None]
        elif part.kind == "absolute":
            moved[1:, part.slice] = np.diff(entry, axis=0)
    return moved


def weights(moved: np.ndarray, rest: float) -> np.ndarray:
    """Weights (n,) of mean 1 of clips in which so much moves (n,): a share `rest` alike, the others by motion."""
    return moved / max(moved.mean(), 1e-6) * (1 - rest) + rest
