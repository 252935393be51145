"""The figures of an evaluator's report card, by hand and against scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from dreamgen.core.intervals import Z, success_interval
from dreamgen.filters.rates import Rates
from dreamgen.stages.correlation import drawn_rates, outcome, rates_of, summary
from dreamgen.stages.report_card import card, draws_of, drop_one, mmrv, pearson, regret, spearman


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
    told = outcome(rows, "said", 0.5, seed=0)
    assert 0 <= told.pop("episode_auroc_low") <= 4 / 6 <= told.pop("episode_auroc_high") <= 1
    assert told == pytest.approx(found)
    assert rates_of("a", "said", rows["a"], 0.5) == pytest.approx((1 / 3, 1 / 3, 3))
    assert rates_of("b", "said", rows["b"], 0.5) == (0.5, 0.5, 2)  # the third counts on neither side


def tried(rng: np.random.Generator, k: int, n: int) -> dict[str, dict]:
    """k policies from n first states, some of which are easy for all; a dream tells 4 of 5 outcomes, but every policy's
    last one is unknown."""
    luck, rows = rng.normal(size=n), {}
    for i, level in enumerate(np.linspace(-1.5, 1.5, k)):
        real = level + luck + rng.normal(size=n) > 0
        said = np.where(rng.random(n) < 0.8, real, rng.random(n) < 0.5) * 0.6 + rng.random(n) * 0.3
        rows[f"p{i}"] = {"real": real.tolist(), "probability": [*said[:-1].tolist(), None], "agreement": [None] * n}
        rows[f"p{i}"]["demos"] = float(i)
    return rows


def test_figures_of_all_draws_are_those_of_each() -> None:
    rng = np.random.default_rng(3)
    real, score = rng.integers(0, 6, (2, 40, 7)) / 5  # with ties
    real[0] = 0.4
    each = [(spearman(r, s), mmrv(r, s)) for r, s in zip(real, score, strict=True)]
    assert np.allclose(np.transpose([spearman(real, score), mmrv(real, score)]), each, equal_nan=True)
    assert np.isnan(each[0][0]) and each[1][0] == pytest.approx(stats.spearmanr(real[1], score[1]).statistic)
    rows, often = tried(rng, 3, 9), draws_of(9, 5)
    drawn = drawn_rates(rows, "probability", 0.5, often)
    again = {name: {key: np.repeat(row[key], often[4]).tolist() for key in ("real", "probability")}
             for name, row in rows.items()}  # fmt: skip
    for i, name in enumerate(rows):
        assert drawn[:, 4, i] == pytest.approx(rates_of(name, "probability", again[name], 0.5)[:2])


def test_the_interval_of_the_bias_is_the_analytic_one() -> None:
    rows = tried(np.random.default_rng(7), 6, 61)
    found = summary(rows, None, [], 0.5, {}, seed=1)
    real, said = (np.array([row[key][:-1] for row in rows.values()], float) for key in ("real", "probability"))
    error = ((said >= 0.5) - real).mean(0)  # of each first state, all policies together
    half = Z * error.std() / math.sqrt(60)
    assert found["bias"] == pytest.approx(error.mean())
    assert [found["bias_low"], found["bias_high"]] == pytest.approx([error.mean() - half, error.mean() + half],
                                                                    abs=0.1 * half)  # fmt: skip
    one = found["policies"]["p2"]
    assert one["real_low"] == success_interval(int(real[2].sum()), 60)["low"] <= one["real"] <= one["real_high"]
    assert one["dream_high"] == success_interval(int((said[2] >= 0.5).sum()), 60)["high"]
    assert summary(rows, None, [], 0.5, {}, seed=1) == found != summary(rows, None, [], 0.5, {}, seed=2)


def test_intervals_cover_what_many_episodes_show() -> None:
    rng, held = np.random.default_rng(8), dict.fromkeys(("rho", "mmrv", "mae", "bias"), 0)
    many = [rates_of(name, "probability", row, 0.5)[:2] for name, row in tried(rng, 6, 20000).items()]
    true = card(*np.transpose(many))
    for seed in range(20):
        found = summary(tried(rng, 6, 41), None, [], 0.5, {}, seed=seed)
        for key in held:
            assert found[f"{key}_low"] <= found[key] <= found[f"{key}_high"]
            held[key] += found[f"{key}_low"] <= true[key] <= found[f"{key}_high"]
    assert min(held.values()) >= 16, held


def test_a_dream_without_an_error_has_intervals_without_width() -> None:
    rows = tried(np.random.default_rng(9), 4, 30)
    for row in rows.values():
        row["probability"] = row["first_frame"] = [float(real) for real in row["real"]]
    found = summary(rows, None, [], 0.5, {"probability": Rates(tpr=1.0, tnr=1.0, positives=9, negatives=9)}, seed=0)
    for card_ in (found, found["corrected"], found["blind"]["first_frame"]):
        ends = [card_[f"{key}_{end}"] for key in ("rho", "mmrv", "mae", "bias") for end in ("low", "high")]
        assert ends == pytest.approx([1, 1, 0, 0, 0, 0, 0, 0], abs=1e-12)
    assert (found["episode_auroc_low"], found["episode_auroc_high"]) == (1, 1)
    demos = found["blind"]["demos"]  # not a success rate; reality alone is drawn
    assert demos["mae_low"] is demos["bias_high"] is None and demos["rho_low"] <= demos["rho"] <= demos["rho_high"]
    one = {name: {key: value[:1] for key, value in row.items() if key != "demos"} for name, row in rows.items()}
    alone = summary(one, None, [], 0.5, {}, seed=0)  # one first state says nothing of others
    assert alone["mae"] == 0 and alone["mae_low"] is alone["mmrv_high"] is alone["episode_auroc_low"] is None
