"""From a signal in its own units to a score in [0, 1], by what the signal is on recorded video.

    score = 1 / (1 + (x / half)^sharpness)   for a signal x >= 0 that is better low, with half / x where better high

The map is strictly monotone: it never changes an order, and nothing saturates as an empirical rank would where dreams
are worse than every recording. `half`, where the score is 1/2, is a quantile of the signal on recorded clips (`fit`):
by default 5% of real clips score below 1/2. Where a clip has several signals (one a part) the worst one speaks.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from dreamgen.core.clip import Clip, Labels


class Referenced:
    """A filter of signals `raw`; a subclass names itself and says in which direction they are better.

    half: the signals' values at a score of 1/2, one or one per signal; None: `fit` finds them. quantile: of the
    recorded clips' signals, counted from the good end. floor: lowest half, where recordings show none of the signal.
    """

    name = "referenced"
    better_high = False
    needs_labels = True

    def __init__(self, *, half: float | Sequence[float] | None = None, quantile: float = 0.95, sharpness: float = 2.0,
                 floor: float = 1e-3) -> None:  # fmt: skip
        if not 0 < quantile < 1 or sharpness <= 0 or floor <= 0:
            raise ValueError(f"filter '{self.name}': quantile is {quantile}, sharpness {sharpness}, floor {floor}; "
                             f"expected 0 < quantile < 1 and the others above 0")  # fmt: skip
        self.half = None if half is None else np.atleast_1d(np.asarray(half, np.float64))
        self.quantile, self.sharpness, self.floor = quantile, sharpness, floor

    def raw(self, clips: Sequence[Clip], labels: Sequence[Labels]) -> Float[np.ndarray, "b k"]:
        """k signals of each clip, 0 or more; nan abstains."""
        raise NotImplementedError

    def fit(self, signals: Float[np.ndarray, "n k"]) -> None:
        """Take `half` from the signals of recorded clips. ValueError if none is finite."""
        if not len(signals) or not np.isfinite(signals).any(0).all():
            raise ValueError(f"filter '{self.name}' finds no finite signal in {len(signals)} reference clips; give it "
                             f"recorded clips that it can score, or set its `half`")  # fmt: skip
        share = 1 - self.quantile if self.better_high else self.quantile
        self.half = np.maximum(np.nanquantile(signals, share, axis=0), self.floor)

    def score(self, clips: Sequence[Clip], labels: Sequence[Labels]) -> Float[np.ndarray, " b"]:
        """(b,) in [0, 1]. ValueError without a reference."""
        if self.half is None:
            raise ValueError(f"filter '{self.name}' has no reference; give curate recorded clips (stage.reference), or "
                             f"the filter its `half`")  # fmt: skip
        signals = np.asarray(self.raw(clips, labels), np.float64)
        with np.errstate(divide="ignore"):
            ratio = self.half / signals if self.better_high else signals / self.half
        return (1 / (1 + ratio**self.sharpness)).min(axis=1, initial=1.0)
