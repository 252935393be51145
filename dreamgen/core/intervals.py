"""Success rates and their differences, of one training or of several, with the intervals that go with them."""

import math
from collections.abc import Mapping, Sequence

Z = 1.959963984540054  # 97.5% quantile of the normal distribution


def success_interval(successes: int, n: int) -> dict:
    """Share of successes with its 95% Wilson score interval; the whole of [0, 1] for n = 0."""
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} episodes; expected 0 <= successes <= episodes")
    if n == 0:
        return {"successes": 0, "n": 0, "rate": 0.0, "low": 0.0, "high": 1.0}
    rate = successes / n
    middle = (rate + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(rate * (1 - rate) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    # rounding must not push the bounds past the rate at 0 and 1
    low, high = min(max(0.0, middle - half), rate), max(min(1.0, middle + half), rate)
    return {"successes": int(successes), "n": int(n), "rate": rate, "low": float(low), "high": float(high)}


def difference_interval(won: int, lost: int, n: int) -> dict:
    """{n, won, lost, difference, low, high, p} of n pairs, of which one side alone won `won` and the other `lost`.

    The difference of success rates with its 95% interval (Wald with one added to the pairs that each side won alone and
    two to all; Bonett and Price 2012) and McNemar's exact p: of the pairs that one side alone won, each is as likely to
    be the other's if both are equally good.
    """
    p1, p2 = (won + 1) / (n + 2), (lost + 1) / (n + 2)
    half = Z * math.sqrt((p1 + p2 - (p1 - p2) ** 2) / (n + 2))
    tail = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1))
    return {"n": n, "won": won, "lost": lost, "difference": (won - lost) / n, "low": max(-1.0, p1 - p2 - half),
            "high": min(1.0, p1 - p2 + half), "p": min(1.0, 2 * tail / 2 ** (won + lost))}  # fmt: skip


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95% interval of the mean that values like these have, such as what another training would gain.

    Raises ValueError for fewer than two values.
    """
    from scipy.stats import t

    if (n := len(values)) < 2:
        raise ValueError(f"an interval of a mean needs two values or more; there is {n}")
    mean = sum(values) / n
    half = float(t.ppf(0.975, n - 1)) * math.sqrt(sum((x - mean) ** 2 for x in values) / (n - 1) / n)
    return mean - half, mean + half


def pooled(rates: Sequence[Mapping]) -> dict:
    """The success of all trainings together, and the rate of each where there are several."""
    total = success_interval(sum(s["successes"] for s in rates), sum(s["n"] for s in rates))
    return total | ({"trainings": [s["rate"] for s in rates]} if len(rates) > 1 else {})


def pooled_difference(pairs: Sequence[Mapping]) -> dict:
    """The paired difference of all trainings together; where there are several, that of each, and the interval of their
    mean, which also covers what other trainings would give."""
    total = difference_interval(*(sum(pair[key] for pair in pairs) for key in ("won", "lost", "n")))
    if len(pairs) < 2:
        return total
    each = [pair["difference"] for pair in pairs]
    low, high = mean_interval(each)
    return total | {"trainings": each, "trainings_low": max(-1.0, low), "trainings_high": min(1.0, high)}
