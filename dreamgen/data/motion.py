"""How much a robot moves: robots often wait, and clips in which nothing happens teach little."""

from collections.abc import Sequence

import numpy as np


def motion_of(actions: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For each episode's actions (s a), how much is commanded in each row (s,): the size of each entry in units of its
    spread over all episodes, as far as it lies above its median over the episode, mean over entries."""
    scale = np.concatenate(list(actions)).std(0) + 1e-6
    size = [np.abs(action / scale) for action in actions]
    return [(one - np.median(one, axis=0)).clip(0).mean(1) for one in size]


def weights(moved: np.ndarray, rest: float) -> np.ndarray:
    """Weights (n,) of mean 1 of clips in which so much moves (n,): a share `rest` alike, the others by motion."""
    return moved / max(moved.mean(), 1e-6) * (1 - rest) + rest
