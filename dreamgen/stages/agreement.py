"""Does a score tell good from bad? Areas under the curve with intervals, calibration, and what choosing by it gains."""

from collections.abc import Sequence

import numpy as np

from dreamgen.core.seeding import rng_for
from dreamgen.stages.label_scores import auroc
from dreamgen.stages.selection import middling


def auroc_interval(score: np.ndarray, positive: np.ndarray, *, groups: Sequence[str] | None = None, draws: int = 1000,
                   seed: int = 0) -> dict:  # fmt: skip
    """AUROC of (n,) scores with its 95% percentile bootstrap; nan scores do not count.

    groups: of each score; those of one group (one first state) share their luck, so whole groups are drawn. Without
    them scores are drawn, within each outcome. {auroc, low, high, n, positives}; None where there are not both
    outcomes, low and high also where there is one group alone.
    """
    told = np.isfinite(score)
    score, positive = score[told], np.asarray(positive, bool)[told]
    good, bad = score[positive], score[~positive]
    found = {"auroc": None, "low": None, "high": None, "n": len(score), "positives": len(good)}
    if not len(good) or not len(bad):
        return found
    rng, drawn, often = rng_for(seed, "bootstrap"), np.empty(draws), np.empty(len(score), np.int64)
    place = np.unique(score, return_inverse=True)[1]  # sorted once: a draw only says how often each score counts
    if groups is not None:
        number = np.unique(np.asarray(groups)[told], return_inverse=True)[1]
        count = number.max() + 1
    for k in range(draws):
        if groups is None:
            for side, n in ((positive, len(good)), (~positive, len(bad))):
                often[side] = np.bincount(rng.integers(n, size=n), minlength=n)
        else:
            often = np.bincount(rng.integers(count, size=count), minlength=count)[number]
        of_good, of_bad = (np.bincount(place[side], often[side], len(score)) for side in (positive, ~positive))
        pairs = of_good.sum() * of_bad.sum()
        won = of_good @ (of_bad.cumsum() - of_bad / 2)  # pairs of a good score above a bad one, ties counting half
        drawn[k] = won / pairs if pairs else np.nan  # a draw of one outcome alone says nothing
    found["auroc"] = auroc(score, positive)
    if np.isfinite(drawn).any() and (groups is None or count > 1):  # one group alone says nothing of others
        found["low"], found["high"] = np.nanquantile(drawn, (0.025, 0.975)).tolist()
    return found


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
    """Share of successes among the best `share` of clips; an abstention ranks in the middle. Of clips that tie at the
    cut it is expected that they succeed as often as all of them."""
    count, score, positive = max(1, round(share * len(score))), middling(score), np.asarray(positive, float)
    cut = np.sort(score)[-count]
    sure = score > cut
    return float((positive[sure].sum() + (count - sure.sum()) * positive[score == cut].mean()) / count)


def calibration(probability: np.ndarray, success: np.ndarray, bins: int = 10) -> dict:
    """Brier score and expected calibration error over equally filled bins of (n,) probabilities."""
    told = np.isfinite(probability)
    p, y = probability[told], np.asarray(success, float)[told]
    if not len(p):
        return {"brier": None, "ece": None}
    parts = [part for part in np.array_split(np.argsort(p, kind="stable"), bins) if len(part)]
    gap = sum(len(part) * abs(p[part].mean() - y[part].mean()) for part in parts) / len(p)
    return {"brier": float(((p - y) ** 2).mean()), "ece": float(gap)}
