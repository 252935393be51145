"""How far an evaluator can be trusted: its success rates of k policies against the real ones, both (k,) in [0, 1].

r, rho    Pearson with Fisher's interval tanh(atanh r -+ 1.96 / sqrt(k - 3)), and Spearman
mmrv      mean over policies i of max over j of |R_i - R_j| where [S_i < S_j] differs from [R_i < R_j]
          (SIMPLER, arXiv:2405.05941: the gap is the real one R, comparisons are strict; its code compares by >, which
          differs where scores tie)
mae, bias mean |S - R| and mean S - R: r alone hides optimism, a constant +.15 keeps it whole
regret    real success given up by taking the policy that the evaluator likes best

Intervals of rho, mmrv, mae and bias are of whole first states, drawn again, the same ones for all policies and for both
sides: of what other first states (each with its instruction) would show of these policies, not of other policies. They
are basic bootstrap intervals, x -+ what draws differ from x, turned round: [2 x - q(.975), 2 x - q(.025)]. Chance in
few episodes makes mmrv and mae too large and rho too small, in the draws once more than in x, so percentiles would miss
what many episodes show. They are widened where x itself is beyond them, as it can be for an evaluator that hardly errs.
"""

import math

import numpy as np

from dreamgen.core.intervals import Z
from dreamgen.core.seeding import rng_for

RATE_KEYS = ("mae", "bias")
RANGES = {"rho": (-1, 1), "mmrv": (0, 1), "mae": (0, 1), "bias": (-1, 1)}
DRAWS = 2000


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


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray | float:
    """Pearson of the ranks of (... k), ties in the middle; nan where one side never changes."""
    from scipy.stats import rankdata

    k = np.shape(x)[-1]
    x, y = (rankdata(side, axis=-1) - (k + 1) / 2 for side in (x, y))
    with np.errstate(invalid="ignore"):
        return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))


def mmrv(real: np.ndarray, score: np.ndarray) -> np.ndarray | float:
    """Mean maximum rank violation of (... k), 0 where the evaluator ranks as reality does."""
    real, score, worst = np.asarray(real, np.float64), np.asarray(score, np.float64), []
    for i in range(real.shape[-1]):
        r, s = real[..., i, None], score[..., i, None]
        worst.append((np.abs(r - real) * ((s < score) != (r < real))).max(-1))
    return np.stack(worst, -1).mean(-1)


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


def figures(real: np.ndarray, score: np.ndarray) -> dict[str, np.ndarray | float]:
    """The figures of (... k) that have intervals by draws."""
    return {"rho": spearman(real, score), "mmrv": mmrv(real, score), "mae": np.abs(score - real).mean(-1),
            "bias": (score - real).mean(-1)}  # fmt: skip


def draws_of(n: int, seed: int) -> np.ndarray:
    """How often each of n first states is in each draw of n (DRAWS n); one alone, which tells nothing, never."""
    if n < 2:
        return np.zeros((DRAWS, n), np.int64)
    return rng_for(seed, "bootstrap").multinomial(n, np.full(n, 1 / n), DRAWS)


def intervals(found: dict, real: np.ndarray, score: np.ndarray) -> dict:
    """95% interval (`<key>_low`, `<key>_high`) of each figure of `found`, from both sides in each draw (d k); nan where
    no draw tells."""
    told, ends = (np.isfinite(real) & np.isfinite(score)).all(-1), {}
    for key, drawn in figures(real[told], score[told]).items():
        drawn, x = drawn[np.isfinite(drawn)], found[key]
        low, high = np.clip(2 * x - np.quantile(drawn, (0.975, 0.025)), *RANGES[key]) if len(drawn) else [math.nan] * 2
        ends |= {f"{key}_low": float(min(low, x)), f"{key}_high": float(max(high, x))}
    return ends


def card(real: np.ndarray, score: np.ndarray, *, rate: bool = True,
         drawn: tuple[np.ndarray, np.ndarray] | None = None) -> dict:  # fmt: skip
    """All of the above. rate: the score is a success rate; a score of another kind has no mae and no bias (None).
    drawn: both sides (d k) in each of `draws_of`, for the intervals.

    ValueError for fewer than 2 policies or scores that are not finite.
    """
    real, score = np.asarray(real, np.float64), np.asarray(score, np.float64)
    if len(real) != len(score) or len(real) < 2 or not (np.isfinite(real) & np.isfinite(score)).all():
        raise ValueError(f"a report card compares finite figures of 2 or more policies; got {real} and {score}")
    r, low, high = pearson(real, score)
    least, most = drop_one(real, score)
    found = {"k": len(real), "r": r, "r_low": low, "r_high": high,
             **{key: float(value) for key, value in figures(real, score).items()},
             "regret": regret(real, score), "r_drop_one": [least, most]}  # fmt: skip
    if drawn is not None:
        found |= intervals(found, *drawn)
    return found if rate else found | dict.fromkeys(key for key in found if key.startswith(RATE_KEYS))
