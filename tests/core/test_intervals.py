"""Intervals against scipy and against the formulas, worked by hand."""

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_1samp

from dreamgen.core.intervals import Z, difference_interval, mean_interval, success_interval


@pytest.mark.parametrize(("successes", "n"), [(0, 9), (9, 9), (37, 100), (1, 3)])
def test_interval_is_wilsons(successes: int, n: int) -> None:
    found = success_interval(successes, n)
    wilson = binomtest(successes, n).proportion_ci(method="wilson")
    assert (found["low"], found["high"]) == pytest.approx((wilson.low, wilson.high), abs=1e-9)
    assert found["rate"] == successes / n and found["low"] <= found["rate"] <= found["high"]


def test_interval_of_nothing_and_of_nonsense() -> None:
    assert success_interval(0, 0) == {"successes": 0, "n": 0, "rate": 0.0, "low": 0.0, "high": 1.0}
    with pytest.raises(ValueError, match="expected 0 <= successes"):
        success_interval(4, 3)


@pytest.mark.parametrize(("won", "lost", "n"), [(8, 2, 13), (0, 0, 5), (48, 8, 224), (3, 3, 9), (0, 7, 7)])
def test_a_difference_by_hand_and_mcnemar(won: int, lost: int, n: int) -> None:
    found = difference_interval(won, lost, n)
    assert (found["n"], found["won"], found["lost"]) == (n, won, lost) and found["difference"] == (won - lost) / n
    assert found["p"] == pytest.approx(binomtest(won, won + lost).pvalue if won + lost else 1.0)
    p1, p2 = (won + 1) / (n + 2), (lost + 1) / (n + 2)
    half = Z * np.sqrt((p1 + p2 - (p1 - p2) ** 2) / (n + 2))
    assert (found["low"], found["high"]) == pytest.approx((max(-1, p1 - p2 - half), min(1, p1 - p2 + half)))
    other = difference_interval(lost, won, n)
    assert other["p"] == found["p"] and other["low"] == pytest.approx(-found["high"])


def test_interval_of_a_mean_is_students() -> None:
    values = [0.30, 0.30, 0.125, 0.32, 0.40]
    student = ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean_interval(values) == pytest.approx((student.low, student.high), abs=1e-9)
    with pytest.raises(ValueError, match="two values or more; there is 1"):
        mean_interval([0.3])
