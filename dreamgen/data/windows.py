"""All places at which a window of fixed length fits into the episodes of a dataset."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int64

from dreamgen.core.clock import Clock
from dreamgen.data.lerobot import Dataset


class Windows:
    """Windows of `span` rows (a Clock: the rows of its frames, steps + 1) that start at every `hop`-th row.

    short: what becomes of episodes with fewer rows: "drop" leaves them out, "pad" gives each one window that repeats
    its last row. too_short: how many episodes that were. `dataset` may also be a list of episode lengths.

    Raises ValueError if no window fits.
    """

    def __init__(
        self,
        dataset: Dataset | Sequence[int],
        span: Clock | int,
        *,
        hop: int = 1,
        short: Literal["drop", "pad"] = "drop",
    ) -> None:
        if hop < 1 or short not in ("drop", "pad"):
            raise ValueError(f"hop is {hop}, short is '{short}'; expected hop > 0 and short 'drop' or 'pad'")
        self.dataset = dataset
        self.span = span.steps + 1 if isinstance(span, Clock) else int(span)
        offsets = span.rows if isinstance(span, Clock) else np.arange(self.span)
        self._offsets = offsets.astype(np.int64)
        lengths = [dataset.length(i) for i in range(len(dataset))] if isinstance(dataset, Dataset) else dataset
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self.too_short = int((self._lengths < self.span).sum())
        counts = np.where(self._lengths >= self.span, (self._lengths - self.span) // hop + 1, int(short == "pad"))
        self._hop, self._ends = hop, np.cumsum(counts)
        if not len(self):
            raise ValueError(f"no window of {self.span} rows fits: {len(self._lengths)} episodes, the longest has "
                             f"{self._lengths.max(initial=0)} rows. Use fewer frames, or short=pad.")  # fmt: skip

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def at(self, k: int) -> tuple[int, int]:
        """Episode and first row of window k, in [0, len)."""
        if not 0 <= k < len(self):
            raise IndexError(f"window {k} of {len(self)}")
        episode = int(np.searchsorted(self._ends, k, side="right"))
        before = int(self._ends[episode - 1]) if episode else 0
        return episode, (k - before) * self._hop

    def rows(self, episode: int, row: int) -> Int64[np.ndarray, " t"]:
        """Rows of the frames (a Clock) or of all steps of the window at `row`; past the end the last row repeats."""
        return np.minimum(row + self._offsets, self._lengths[episode] - 1)
