"""Which clips are kept: pure functions of scores. A row is a clip, a column a filter, nan an abstention."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np


def require_known(named: Iterable[str], names: Sequence[str], setting: str) -> None:
    """ValueError for a filter that is not among `names`."""
    if unknown := sorted(set(named) - set(names)):
        raise ValueError(f"{setting} names the filter{'s' * (len(unknown) > 1)} {', '.join(unknown)}; the filters are "
                         f"{', '.join(names) or 'none'}")  # fmt: skip


def quantile_thresholds(scores: np.ndarray, names: Sequence[str],
                        drop: float | Mapping[str, float]) -> dict[str, float]:  # fmt: skip
    """Per filter the score below which lie at most `drop` of its scores (n k); abstentions do not count."""
    shares = dict(drop) if isinstance(drop, Mapping) else dict.fromkeys(names, drop)
    require_known(shares, names, "drop")
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise ValueError(f"drop is {share} for the filter {name}; expected a share, 0 <= drop < 1")
    found = {}
    for column, name in zip(scores.T, names, strict=True):
        told = np.sort(column[np.isfinite(column)])
        if shares.get(name) and len(told):
            found[name] = float(told[int(shares[name] * len(told))])
    return found


def passing(scores: np.ndarray, names: Sequence[str], least: Mapping[str, float], abstained: str) -> np.ndarray:
    """Which clips reach `least` of every filter (n k) bool; an abstention passes or is dropped, as `abstained` says."""
    if abstained not in ("pass", "drop"):
        raise ValueError(f"abstained is '{abstained}'; expected 'pass' or 'drop'")
    require_known(least, names, "least")
    good = np.ones(scores.shape, bool)
    for k, name in enumerate(names):
        good[:, k] = scores[:, k] >= least.get(name, -np.inf)
        good[np.isnan(scores[:, k]), k] = abstained == "pass"
    return good


def totals(scores: np.ndarray, names: Sequence[str], rank_by: str = "mean") -> np.ndarray:
    """One figure a clip (n,) in [0, 1]: the scores of filter `rank_by`, or the mean over filters of the clip's rank.

    Ranks have no scale, so that no filter outweighs another by how its scores spread. An abstention is in the middle:
    it gets the median of that filter's scores.
    """
    from scipy.stats import rankdata

    if rank_by != "mean":
        require_known([rank_by], names, "rank_by")
        return middling(scores[:, list(names).index(rank_by)])
    ranks = np.full(scores.shape, 0.5)
    for k, column in enumerate(scores.T):
        told = np.isfinite(column)
        ranks[told, k] = (rankdata(column[told]) - 0.5) / max(1, told.sum())
    return ranks.mean(1) if len(names) else np.full(len(scores), 0.5)


def middling(scores: np.ndarray) -> np.ndarray:
    """Scores (n,), and in the place of nan the median of those that are known, by a hair less: an opinion goes before
    none. 0.5 where none is known."""
    known = scores[np.isfinite(scores)]
    return np.where(np.isfinite(scores), scores, np.nextafter(np.median(known), -np.inf) if len(known) else 0.5)


def best_of(total: np.ndarray, groups: Sequence[str], good: np.ndarray, count: int) -> np.ndarray:
    """Of each group its `count` best that are `good` (n,) bool; ties go to the first."""
    if count < 1:
        raise ValueError(f"best_count is {count}; expected 1 or more clips of each group")
    kept, taken = np.zeros(len(total), bool), dict.fromkeys(groups, 0)
    for k in np.argsort(-total, kind="stable"):
        if good[k] and taken[groups[k]] < count:
            kept[k], taken[groups[k]] = True, taken[groups[k]] + 1
    return kept


def best(total: np.ndarray, good: np.ndarray, keep: float | int, again: str = "") -> np.ndarray:
    """The best `keep` clips of those that are `good`: a number, or a share of all where it is below 1. again: how the
    error ends where fewer are."""
    count = round(keep * len(total)) if keep < 1 else int(keep)
    if keep <= 0 or (keep >= 1 and keep != int(keep)):
        raise ValueError(f"keep is {keep}; expected a share below 1 or a whole number of clips")
    if count > good.sum():
        raise ValueError(f"keep asks for {count} clips, {int(good.sum())} of {len(total)} pass the thresholds; dream "
                         f"more, keep fewer, or lower drop and least{again}")  # fmt: skip
    kept = np.zeros(len(total), bool)
    kept[np.argsort(-np.where(good, total, -np.inf), kind="stable")[:count]] = True
    return kept


def require_settings(scores: np.ndarray, names: Sequence[str], *, drop: float | Mapping[str, float],
                     least: Mapping[str, float], rank_by: str, best_count: int, keep: float | int | None,
                     abstained: str) -> None:  # fmt: skip
    """Raise ValueError for settings by which nothing can be chosen, whatever is scored; scores (n k) of any value."""
    limits = quantile_thresholds(scores, names, drop)
    passing(scores, names, {**limits, **least}, abstained)
    total, good = totals(scores, names, rank_by), np.ones(len(scores), bool)
    best_of(total, [""] * len(scores), good, best_count)
    if keep is not None:
        best(total, good, keep)
