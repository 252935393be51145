"""Does a score tell good from bad? Areas under the curve with intervals, calibration, and what choosing by it gains."""

from collections.abc import Sequence

import numpy as np

from dreamgen.core.seeding import rng_for
from dreamgen.stages.label_scores import auroc


def auroc_interval(score: np.ndarray, positive: np.ndarray, *, draws: int = 1000, seed: int = 0) -> dict:
    """AUROC of (n,) scores with its 95% percentile bootstrap, drawn within each outcome; nan scores do not count.

    {auroc, low, high, n, positives}; None where there are not both outcomes.
    """
    told = np.isfinite(score)
    score, positive = score[told], np.asarray(positive, bool)[told]
    good, bad = score[positive], score[~positive]
    found = {"auroc": None, "low": None, "high": None, "n": len(score), "positives": len(good)}
    if not len(good) or not len(bad):
        return found
    rng, drawn = rng_for(seed, "bootstrap"), np.empty(draws)
    wins = (good[:, None] > bad) + 0.5 * (good[:, None] == bad)  # a draw only picks rows and columns
    for k in range(draws):
        drawn[k] = wins[rng.integers(len(good), size=len(good))][:, rng.integers(len(bad), size=len(bad))].mean()
    low, high = np.quantile(drawn, (0.025, 0.975))
    return found | {"auroc": auroc(score, positive), "low": float(low), "high": float(high)}


def auroc_within(score: np.ndarray, positive: np.ndarray, groups: Sequence[str]) -> float | None:
    """AUROC over pairs of one group (instruction) only: some succeed more often, which is not the filter's merit."""
    wins, pairs = 0.0, 0
    names = np.asarray(groups)
    for name in sorted(set(groups)):
        here = (names == name) & np.isfinite(score)
        n, m = int(positive[here].sum()), int((~positive[here]).sum())
        if n and m:
            wins, pairs = wins + auroc(score[here], positive[here]) * n * m, pairs + n * m
    return wins / pairs if pairs else None


def chosen_rate(score: np.ndarray, positive: np.ndarray, share: float) -> float:
    """Share of successes among the best `share` of clips; an abstention ranks in the middle."""
    count = max(1, round(share * len(score)))
    filled = np.where(np.isfinite(score), score, np.nanmedian(score) if np.isfinite(score).any() else 0.0)
    return float(np.asarray(positive, float)[np.argsort(-filled, kind="stable")[:count]].mean())


def calibration(probability: np.ndarray, success: np.ndarray, bins: int = 10) -> dict:
    """Brier score and expected calibration error over equally filled bins of (n,) probabilities."""
    told = np.isfinite(probability)
    p, y = probability[told], np.asarray(success, float)[told]
    if not len(p):
        return {"brier": None, "ece": None}
    parts = [part for part in np.array_split(np.argsort(p, kind="stable"), bins) if len(part)]
    gap = sum(len(part) * abs(p[part].mean() - y[part].mean()) for part in parts) / len(p)
    return {"brier": float(((p - y) ** 2).mean()), "ece": float(gap)}
