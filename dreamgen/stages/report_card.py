"""How far an evaluator can be trusted: its success rates of k policies against the real ones, both (k,) in [0, 1].

r, rho    Pearson with Fisher's interval tanh(atanh r -+ 1.96 / sqrt(k - 3)), and Spearman
mmrv      mean over policies i of max over j of |R_i - R_j| where [S_i < S_j] differs from [R_i < R_j]
          (SIMPLER, arXiv:2405.05941: the gap is the real one R, comparisons are strict; its code compares by >, which
          differs where scores tie)
mae, bias mean |S - R| and mean S - R: r alone hides optimism, a constant +.15 keeps it whole
regret    real success given up by taking the policy that the evaluator likes best
"""

import math

import numpy as np

from dreamgen.core.intervals import Z

RATE_KEYS = ("mae", "bias")


def pearson(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """r and its 95% Fisher interval; nan where one side never changes, an interval of [-1, 1] below 4 policies."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(x) < 2 or x.std() < 1e-12 or y.std() < 1e-12:
        return math.nan, math.nan, math.nan
    r = float(np.clip(np.corrcoef(x, y)[0, 1], -1, 1))
    if len(x) < 4:
        return r, -1.0, 1.0
    if 1 - abs(r) < 1e-12:
        return r, r, r
    half = Z / math.sqrt(len(x) - 3)
    return r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson of the ranks, ties in the middle."""
    from scipy.stats import rankdata

    return pearson(rankdata(x), rankdata(y))[0]


def mmrv(real: np.ndarray, score: np.ndarray) -> float:
    """Mean maximum rank violation, 0 where the evaluator ranks as reality does."""
    real, score = np.asarray(real, np.float64), np.asarray(score, np.float64)
    gap = np.abs(real[:, None] - real[None])
    wrong = (score[:, None] < score[None]) != (real[:, None] < real[None])
    return float((gap * wrong).max(1).mean())


def regret(real: np.ndarray, score: np.ndarray) -> float:
    """Best real success less that of the policy with the highest score (the mean over those that tie)."""
    real, score = np.asarray(real, np.float64), np.asarray(score, np.float64)
    return float(real.max() - real[score >= score.max() - 1e-12].mean())


def drop_one(real: np.ndarray, score: np.ndarray) -> tuple[float, float]:
    """Lowest and highest r with one policy left out."""
    keep = ~np.eye(len(real), dtype=bool)
    found = [pearson(np.asarray(real)[row], np.asarray(score)[row])[0] for row in keep]
    known = [r for r in found if math.isfinite(r)]
    return (min(known), max(known)) if known else (math.nan, math.nan)


def card(real: np.ndarray, score: np.ndarray, *, rate: bool = True) -> dict:
    """All of the above. rate: the score is a success rate; a score of another kind has no mae and no bias (None).

    ValueError for fewer than 2 policies or scores that are not finite.
    """
    real, score = np.asarray(real, np.float64), np.asarray(score, np.float64)
    if len(real) != len(score) or len(real) < 2 or not (np.isfinite(real) & np.isfinite(score)).all():
        raise ValueError(f"a report card compares finite figures of 2 or more policies; got {real} and {score}")
    r, low, high = pearson(real, score)
    least, most = drop_one(real, score)
    found = {"k": len(real), "r": r, "r_low": low, "r_high": high, "rho": spearman(real, score),
             "mmrv": mmrv(real, score), "mae": float(np.abs(score - real).mean()), "bias": float((score - real).mean()),
             "regret": regret(real, score), "r_drop_one": [least, most]}  # fmt: skip
    return found if rate else found | dict.fromkeys(RATE_KEYS)
