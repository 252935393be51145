"""States as far as they are known: a row of dreams may hold placeholders, which its column `state_known` tells."""

import numpy as np

from dreamgen.core.clip import Episode


def known_states(episode: Episode, rows: int | slice | np.ndarray = slice(None)) -> np.ndarray:
    """The states of an episode at `rows` (s d), or at one (d,), NaN in entries that the episode does not call known."""
    known = episode.extra.get("state_known")
    return episode.state[rows] if known is None else np.where(known[rows] != 0, episode.state[rows], np.nan)
