"""What a judge's yes is worth: its error rates, its threshold, and success rates corrected by them.

Of episodes that succeed with rate p a judge calls `p tpr + (1 - p)(1 - tnr)` successes, so (Rogan and Gladen, 1978)

    p = (observed + tnr - 1) / (tpr + tnr - 1)

clipped to [0, 1]. The interval is that of Lang and Reiczigel (2014), which counts the uncertainty of both rates too.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dreamgen.core.intervals import Z
from dreamgen.core.manifest import FILE, differences, is_complete, read_json
from dreamgen.core.protocols import Judge

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Share of `positives` successes called success (tpr), of `negatives` failures called failure (tnr)."""

    tpr: float
    tnr: float
    positives: int
    negatives: int

    @classmethod
    def measured(cls, probability: np.ndarray, success: np.ndarray, threshold: float) -> "Rates":
        """Rates of a judge's answers (n,) against the truth (n,) bool; abstentions (nan) do not count.

        ValueError without a success or without a failure among them.
        """
        told = np.isfinite(probability)
        yes, truth = probability[told] >= threshold, np.asarray(success, bool)[told]
        n, m = int(truth.sum()), int((~truth).sum())
        if not n or not m:
            raise ValueError(f"a judge's rates need successes and failures, got {n} and {m}; give it episodes of both")
        return cls(tpr=float(yes[truth].mean()), tnr=float((~yes[~truth]).mean()), positives=n, negatives=m)

    def behind(self, observed: np.ndarray | float) -> np.ndarray | float:
        """Success rates behind observed ones, of any shape."""
        return np.clip((observed + self.tnr - 1) / (self.tpr + self.tnr - 1), 0, 1)

    def corrected(self, successes: int, n: int) -> dict:
        """Success rate behind `successes` of `n` judged episodes: {observed, rate, low, high, n}.

        ValueError for a judge that is no better than chance, whose answers say nothing about the rate.
        """
        if not 0 <= successes <= n or n < 1:
            raise ValueError(f"{successes} successes in {n} episodes; expected 0 <= successes <= episodes, at least 1")
        if self.tpr + self.tnr <= 1:
            raise ValueError(
                f"the judge's true positive rate {self.tpr:.2f} and true negative rate {self.tnr:.2f} sum "
                f"to no more than 1: chance. Train it longer, or on more successes and failures."
            )
        observed = successes / n
        # Lang and Reiczigel: pseudo-counts on all three shares, then a normal interval with a shift
        size, p = n + Z**2, (successes + Z**2 / 2) / (n + Z**2)
        a, b = self.positives + 2, self.negatives + 2
        se, sp = (self.positives * self.tpr + 1) / a, (self.negatives * self.tnr + 1) / b
        span = max(se + sp - 1, 1e-9)
        middle = float(np.clip((p + sp - 1) / span, 0, 1))
        shift = 2 * Z**2 * (middle * se * (1 - se) / a - (1 - middle) * sp * (1 - sp) / b)
        error = p * (1 - p) / size + (1 - middle) ** 2 * sp * (1 - sp) / b + middle**2 * se * (1 - se) / a
        half = Z * np.sqrt(error) / span
        low, high = np.clip((middle + shift - half, middle + shift + half), 0, 1)
        rate = float(self.behind(observed))
        return {"observed": observed, "rate": rate, "low": float(min(low, rate)), "high": float(max(high, rate)),
                "n": int(n)}  # fmt: skip


def threshold_for(precision: float | None, probability: np.ndarray, success: np.ndarray) -> tuple[float, float]:
    """The lowest threshold whose yes is right with at least `precision`, and the precision that it has.

    None: the break-even point, where precision equals the true positive rate: as many yeses as successes, so that the
    rate of yeses is that of successes. probability, success: (n,). Where no threshold reaches what is asked, the one
    with the highest precision, or with the number of yeses that is nearest; ties to the lowest.
    """
    told = np.isfinite(probability)
    order = np.argsort(-probability[told], kind="stable")
    score, truth = probability[told][order], np.asarray(success, bool)[told][order]
    if not truth.any():
        raise ValueError("a threshold needs at least one success to be chosen by; give episodes of both outcomes")
    count = np.arange(1, len(truth) + 1)
    right = truth.cumsum() / count
    last = np.append(score[1:] < score[:-1], True)  # equal probabilities are told yes together
    if precision is None:
        wrong = np.abs(count - truth.sum())
        good = last & (wrong == wrong[last].min())
    elif not (good := last & (right >= precision)).any():
        good = last & (right == right[last].max())
    k = np.flatnonzero(good)[-1]
    below = score[k + 1] if k + 1 < len(score) else 0.0
    return float((score[k] + below) / 2), float(right[k])


def rates_on(judge: Judge, kind: str) -> Rates | None:
    """A judge's rates on a kind of video (see `train_judge`), where they are known and better than chance."""
    found = getattr(judge, "rates", {}).get(kind)
    return found if found is not None and found.tpr + found.tnr > 1 else None


def rates_in_dreams(judge: Judge, world_model: Mapping[str, Any] | None) -> Rates | None:
    """A judge's rates on dreams under actions, for the dreams of `world_model`, as a stage records it.

    They hold for the model and the sampling on which they were measured; None for others, with a warning.
    """
    found, path = rates_on(judge, "imagined"), getattr(judge, "path", None)
    if found is None:
        return None
    known = path is not None and is_complete(path)
    theirs = read_json(Path(path) / FILE)["config"].get("world_model") if known else None
    if theirs and not differences(theirs, world_model):
        return found
    made_on = f"others ({differences(theirs, world_model)})" if theirs else "a world model that it does not name"
    log.warning("success in the dream is not corrected: the rates of the judge %s were measured on dreams of %s, "
                "expected those of this stage's world_model. Train the judge with it as stage.world_model.",
                path or type(judge).__name__, made_on)  # fmt: skip
    return None
