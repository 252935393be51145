"""Which windows of which datasets form batch `step`: a pure function of (seed, step), so nothing is to be resumed.

Real to dream: with share p of dreams and batches of b rows, batch n holds
`floor((n + 1) b p + 1/2) - floor(n b p + 1/2)` dreams: each batch is within one row of the ratio, and the rounding
error never adds up. Within real data, and within dreams, dataset i is drawn with weight n_i^0.43 (n_i windows; pi0),
then a window of it uniformly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int64

from dreamgen.core.seeding import rng_for


@runtime_checkable
class Places(Protocol):
    """Where samples of one dataset may start, such as `dreamgen.data.windows.Windows`."""

    def __len__(self) -> int: ...

    def at(self, k: int) -> tuple[int, int]:
        """Episode and row of place k."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Draw:
    """One batch: row j starts at `row[j]` of `episode[j]` of dataset `dataset[j]` (reals first, then dreams)."""

    dataset: Int64[np.ndarray, " b"]
    episode: Int64[np.ndarray, " b"]
    row: Int64[np.ndarray, " b"]
    dream: Bool[np.ndarray, " b"]

    def __len__(self) -> int:
        return len(self.row)


def shares(sizes: Sequence[int], power: float = 0.43) -> np.ndarray:
    """Probabilities (n,) of datasets with so many places each, in proportion to size^power; none of no dataset."""
    weights = np.array(sizes, dtype=np.float64) ** power
    return weights / weights.sum() if len(weights) else weights


class Mixture:
    """Batches of `batch_size` windows, real:dream in the ratio `ratio` ("1:1"); without dreams all are real.

    Datasets are numbered through: `windows` is real followed by dreams.

    Raises ValueError if the ratio is no "number:number", or asks for a kind that is not there.
    """

    def __init__(
        self,
        *,
        real: Sequence[Places],
        dreams: Sequence[Places] = (),
        batch_size: int,
        ratio: str = "1:1",
        power: float = 0.43,
        seed: int = 0,
    ) -> None:
        try:
            parts = [Fraction(text) for text in str(ratio).split(":")]
            self.share = parts[1] / (parts[0] + parts[1])
        except (ValueError, ZeroDivisionError, IndexError):
            parts = []
        if len(parts) != 2 or min(parts) < 0 or batch_size < 1:
            raise ValueError(f"ratio is '{ratio}', batch_size is {batch_size}; expected real:dream, such as '1:1', and "
                             f"batch_size > 0")  # fmt: skip
        self.share = self.share if dreams else Fraction(0)
        if not real and self.share < 1:
            raise ValueError(f"ratio is '{ratio}' and there are no real datasets; give one, or ratio '0:1'")
        self.windows = [*real, *dreams]
        self.batch_size, self.seed, self._real = batch_size, seed, len(real)
        sizes = [len(w) for w in self.windows]
        self._weights = [shares(part, power) for part in (sizes[: len(real)], sizes[len(real) :])]

    def dreams_in(self, step: int) -> int:
        """How many rows of batch `step` are dreams."""
        per = self.batch_size * self.share
        return floor((step + 1) * per + Fraction(1, 2)) - floor(step * per + Fraction(1, 2))

    def at(self, step: int) -> Draw:
        """Batch `step`: real rows first, then dreams."""
        rng = rng_for(self.seed, "mixture", step)
        dreams = self.dreams_in(step)
        dataset = np.empty(self.batch_size, np.int64)
        cut = self.batch_size - dreams
        if cut:
            dataset[:cut] = rng.choice(self._real, size=cut, p=self._weights[0])
        if dreams:
            dataset[cut:] = self._real + rng.choice(len(self._weights[1]), size=dreams, p=self._weights[1])
        places = [self.windows[d].at(int(rng.integers(len(self.windows[d])))) for d in dataset]
        episode, row = np.array(places, dtype=np.int64).reshape(-1, 2).T
        return Draw(dataset=dataset, episode=episode, row=row, dream=np.arange(self.batch_size) >= cut)
