"""The figures of an evaluator's report card, by hand and against scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from dreamgen.stages.correlation import outcome, rates_of
from dreamgen.stages.report_card import card, drop_one, mmrv, pearson, regret, spearman


def numbers(*rows: list[float]) -> list[np.ndarray]:
    return [np.array(row) for row in rows]


def correlated(r: float, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Two vectors of k numbers whose correlation is r to rounding."""
    rng = np.random.default_rng(1)
    x, z = rng.normal(size=(2, k))
    x = (x - x.mean()) / x.std()
    z = z - z.mean()
    z = z - (z @ x) / (x @ x) * x
    return 0.5 + 0.1 * x, 0.5 + 0.1 * (r * x + math.sqrt(1 - r**2) * z / z.std())


def test_fishers_interval() -> None:
    x, y = correlated(0.93, 20)
    r, low, high = pearson(x, y)
    half = 1.959964 / math.sqrt(17)
    assert np.allclose((r, low, high), (0.93, math.tanh(math.atanh(0.93) - half), math.tanh(math.atanh(0.93) + half)))
    theirs = stats.pearsonr(x, y).confidence_interval(0.95)
    assert np.allclose((low, high), theirs, atol=1e-6)
    assert pearson(x[:3], y[:3])[1:] == (-1.0, 1.0) and math.isnan(pearson(x, np.ones(20))[0])
    assert pearson(x, 2 * x)[1] == pytest.approx(1)


def test_r_hides_optimism_and_the_card_shows_it() -> None:
    x, y = correlated(0.93, 20)
    plain, optimist = card(x, y), card(x, y + 0.15)
    assert optimist["r"] == pytest.approx(0.93) and optimist["rho"] == plain["rho"]
    assert optimist["bias"] == pytest.approx(plain["bias"] + 0.15) == pytest.approx(0.15)
    assert optimist["mae"] >= 0.15 - 1e-9 and optimist["mmrv"] == plain["mmrv"]
    blind = card(x, -y, rate=False)
    assert blind["mae"] is None and blind["bias"] is None and blind["r"] == pytest.approx(-0.93)


def test_mmrv_by_hand() -> None:
    assert mmrv(*numbers([0.1, 0.5, 0.9], [0.2, 0.1, 0.8])) == pytest.approx((0.4 + 0.4 + 0) / 3)
    assert mmrv(*numbers([0.1, 0.5, 0.9], [0.3, 0.4, 0.5])) == 0
    assert mmrv(*numbers([0.1, 0.4], [0.5, 0.5])) == pytest.approx(0.15)  # strict: a tie misses one of two
    assert mmrv(*numbers([0.5, 0.5], [0.1, 0.2])) == 0  # no real gap
    assert mmrv(*numbers([0.0, 1.0], [1.0, 0.0])) == 1


def test_mmrv_is_that_of_simplers_code_where_no_scores_tie() -> None:
    rng = np.random.default_rng(5)
    for k in (2, 5, 24):
        real, score = rng.permutation(np.arange(k)) / k, rng.permutation(np.arange(k)) / k
        worst = []
        for i in range(k):
            wrong = [abs(real[i] - real[j]) for j in range(k) if (score[i] > score[j]) != (real[i] > real[j])]
            worst.append(max(wrong, default=0.0))
        assert mmrv(real, score) == pytest.approx(np.mean(worst)) and (k == 2 or np.mean(worst) > 0.1)
    assert mmrv(*numbers([0.0, 0.9, 1.0], [0.5, 0.5, 0.5])) == pytest.approx((1 + 0.1 + 0) / 3)  # by <, as printed


def test_fishers_interval_by_hand() -> None:
    x, y = numbers([0.1, 0.3, 0.5, 0.7, 0.9], [0.2, 0.1, 0.6, 0.5, 0.9])
    # centred: -.4 -.2 0 .2 .4 and -.26 -.36 .14 .04 .44; products sum to .36, squares to .4 and .412
    r = 0.36 / math.sqrt(0.4 * 0.412)
    z, half = 0.5 * math.log((1 + r) / (1 - r)), 1.959964 / math.sqrt(2)
    low, high = ((math.exp(2 * end) - 1) / (math.exp(2 * end) + 1) for end in (z - half, z + half))
    assert pearson(x, y) == pytest.approx((r, low, high), abs=1e-6)
    found = card(x, y)
    assert found["mae"] == pytest.approx((0.1 + 0.2 + 0.1 + 0.2 + 0) / 5)
    assert found["bias"] == pytest.approx((0.1 - 0.2 + 0.1 - 0.2 + 0) / 5)
    assert found["mmrv"] == pytest.approx((0.2 + 0.2 + 0.2 + 0.2 + 0) / 5) and found["regret"] == 0
    assert found["rho"] == pytest.approx(1 - 6 * 4 / (5 * 24))  # ranks 1 2 3 4 5 and 2 1 4 3 5


def test_ranks_regret_and_leaving_one_out() -> None:
    rng = np.random.default_rng(2)
    x = rng.integers(0, 6, 15) / 10
    y = x + rng.integers(0, 3, 15) / 10
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert regret(*numbers([0.2, 0.9, 0.6], [0.1, 0.3, 0.5])) == pytest.approx(0.3)
    assert regret(*numbers([0.2, 0.9, 0.6], [0.1, 0.5, 0.5])) == pytest.approx(0.9 - 0.75)
    each = [np.corrcoef(np.delete(x, i), np.delete(y, i))[0, 1] for i in range(15)]
    assert np.allclose(drop_one(x, y), (min(each), max(each)))
    with pytest.raises(ValueError, match="2 or more policies"):
        card(np.array([0.5]), np.array([0.5]))


def test_episodes_by_hand() -> None:
    rows = {"a": {"real": [True, False, False], "said": [0.9, 0.4, 0.2]},
            "b": {"real": [True, False, True], "said": [0.3, 0.5, None]}}  # fmt: skip
    # successes .9 and .3 against failures .4, .2, .5: .9 is above all three, .3 above one; .9 is a yes, and so is .5
    found = {"episode_auroc": 4 / 6, "abstained": 1, "tpr": 1 / 2, "tnr": 2 / 3}
    assert outcome(rows, "said", 0.5) == pytest.approx(found)
    assert rates_of("a", "said", rows["a"], 0.5) == pytest.approx((1 / 3, 1 / 3, 3))
    assert rates_of("b", "said", rows["b"], 0.5) == (0.5, 0.5, 2)  # the third counts on neither side
