"""Which clips are kept, by hand and by a slower way."""

import tracemalloc

import numpy as np
import pytest

from dreamgen.core.seeding import rng_for
from dreamgen.stages.agreement import auroc_interval, auroc_within, calibration, chosen_rate
from dreamgen.stages.evaluate_filters import worth
from dreamgen.stages.selection import best, best_of, passing, quantile_thresholds, totals

NAMES = ["spread", "judge"]
SCORES = np.array([[0.9, 0.2], [0.1, np.nan], [0.5, 0.9], [0.5, 0.8], [0.7, 0.1]])


def test_quantiles_drop_at_most_the_share():
    assert quantile_thresholds(SCORES, NAMES, 0.0) == {}
    assert quantile_thresholds(SCORES, NAMES, 0.25) == {"spread": 0.5, "judge": 0.2}
    assert quantile_thresholds(SCORES, NAMES, {"judge": 0.5}) == {"judge": 0.8}
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 7, (53, 1)) / 7  # with ties
    for share in (0.1, 0.33, 0.9):
        least = quantile_thresholds(scores, ["x"], share)["x"]
        assert (scores < least).mean() <= share < (scores <= least).mean()
    with pytest.raises(ValueError, match="drop names the filter jerk; the filters are spread, judge"):
        quantile_thresholds(SCORES, NAMES, {"jerk": 0.5})
    with pytest.raises(ValueError, match="drop is 1.0"):
        quantile_thresholds(SCORES, NAMES, 1.0)


def test_abstentions_pass_or_drop():
    least = {"spread": 0.5, "judge": 0.2}
    assert passing(SCORES, NAMES, least, "pass").tolist() == [
        [True, True], [False, True], [True, True], [True, True], [True, False]]  # fmt: skip
    assert not passing(SCORES, NAMES, {}, "drop")[1, 1] and passing(SCORES, NAMES, {}, "drop").sum() == 9
    with pytest.raises(ValueError, match="expected 'pass' or 'drop'"):
        passing(SCORES, NAMES, {}, "maybe")


def test_totals_are_mean_ranks_or_one_filter():
    spread, judge = np.array([0.9, 0.1, 0.5, 0.5, 0.7]), np.array([3, np.nan, 7, 5, 1]) / 8
    np.testing.assert_allclose(totals(SCORES, NAMES), (spread_ranks(spread) + np.nan_to_num(judge, nan=0.5)) / 2)
    np.testing.assert_allclose(totals(SCORES, NAMES, "judge"), [0.2, 0.5, 0.9, 0.8, 0.1])
    low = np.array([[0.3], [0.2], [np.nan], [0.1]])
    found = totals(low, ["judge"], "judge")
    assert found == pytest.approx([0.3, 0.2, 0.2, 0.1]) and found[1] > found[2]  # the middle, not above all
    assert totals(np.full((2, 1), np.nan), ["judge"], "judge").tolist() == [0.5, 0.5]
    assert totals(np.zeros((3, 0)), []).tolist() == [0.5] * 3


def spread_ranks(column: np.ndarray) -> np.ndarray:
    """How many lie below, ties counting half, as a share."""
    return np.array([((column < x).sum() + 0.5 * (column == x).sum()) / len(column) for x in column])


def test_best_of_each_group_and_of_all():
    total, groups = np.array([0.3, 0.8, 0.8, 0.1, 0.9]), ["a", "a", "a", "b", "b"]
    good = np.array([True, True, True, True, False])
    assert best_of(total, groups, good, 1).tolist() == [False, True, False, True, False]
    assert best_of(total, groups, good, 2).tolist() == [False, True, True, True, False]
    assert best(total, good, 2).tolist() == best(total, good, 0.4).tolist() == [False, True, True, False, False]
    with pytest.raises(ValueError, match="keep asks for 5 clips, 4 of 5 pass"):
        best(total, good, 5)
    for wrong in (0, -1, 2.5):
        with pytest.raises(ValueError, match="expected a share below 1 or a whole number"):
            best(total, good, wrong)
    with pytest.raises(ValueError, match="best_count is 0"):
        best_of(total, groups, good, 0)


def test_areas_and_their_intervals():
    rng = np.random.default_rng(3)
    positive = rng.random(120) < 0.3
    score = rng.normal(size=120) + positive
    pairs = [(a > b) + 0.5 * (a == b) for a in score[positive] for b in score[~positive]]
    found = auroc_interval(score, positive, draws=300)
    assert found["auroc"] == pytest.approx(np.mean(pairs)) and found["n"] == 120
    assert found["low"] < found["auroc"] < found["high"] and 0.1 < found["high"] - found["low"] < 0.3
    assert auroc_interval(score, positive, draws=300) == found
    assert auroc_interval(score, np.ones(120, bool))["auroc"] is None
    alone = auroc_interval(score, positive, groups=[str(k) for k in range(120)], draws=300)
    assert alone["high"] - alone["low"] == pytest.approx(found["high"] - found["low"], rel=0.3)
    four = dict(score=np.tile(score, 4), positive=np.tile(positive, 4))  # every clip four times: nothing new is known
    naive, whole = (
        auroc_interval(**four, draws=300),
        auroc_interval(**four, groups=[str(k) for k in range(120)] * 4, draws=300),
    )
    assert whole["high"] - whole["low"] == pytest.approx(alone["high"] - alone["low"], rel=0.3)
    assert naive["high"] - naive["low"] < 0.65 * (whole["high"] - whole["low"])
    groups = rng.choice(["x", "y", "z"], 120).tolist()
    same = [(score[i] > score[j]) for i in range(120) for j in range(120)
            if positive[i] and not positive[j] and groups[i] == groups[j]]  # fmt: skip
    assert auroc_within(score, positive, groups) == pytest.approx(np.mean(same))
    assert auroc_within(np.arange(4.0), np.array([1, 1, 0, 0], bool), ["a", "a", "b", "b"]) is None


@pytest.mark.parametrize("grouped", [False, True])
def test_an_interval_is_that_of_all_pairs_without_storing_them(grouped):
    rng = np.random.default_rng(4)
    positive, score = rng.random(90) < 0.4, rng.integers(0, 9, 90) / 8  # with ties
    groups = rng.integers(0, 12, 90)
    names = [chr(97 + k) for k in groups] if grouped else None
    found = auroc_interval(score, positive, groups=names, draws=40, seed=5)
    wins = (score[positive][:, None] > score[~positive]) + 0.5 * (score[positive][:, None] == score[~positive])
    drawn, again = [], rng_for(5, "bootstrap")
    for _ in range(40):
        if grouped:
            often = np.bincount(again.integers(12, size=12), minlength=12)[groups]
            drawn.append(np.average(wins, weights=np.outer(often[positive], often[~positive])))
        else:
            drawn.append(wins[np.ix_(*(again.integers(n, size=n) for n in wins.shape))].mean())
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(drawn, (0.025, 0.975)), abs=1e-12)
    many, names = rng.random(4000), [str(k // 3) for k in range(4000)] if grouped else None
    tracemalloc.start()
    auroc_interval(many, np.arange(4000) % 2 == 0, groups=names, draws=3)
    assert tracemalloc.get_traced_memory()[1] < 2e6  # of pairs there are four million
    tracemalloc.stop()


def test_a_filters_interval_counts_first_states_and_not_their_repeats():
    rng, covered = np.random.default_rng(6), {"pairs": 0, "alone": 0}
    for _ in range(30):  # a useless filter that, like success, goes with the first state
        state = np.repeat(np.arange(20), 10)
        positive = rng.random(200) < rng.beta(0.5, 0.5, 20)[state]
        score = rng.normal(size=20)[state] + 0.3 * rng.normal(size=200)
        for key, pairs in (("pairs", state), ("alone", np.arange(200))):
            found = worth(score, positive, ["go"] * 200, list(map(str, pairs)), share=0.5, draws=60, seed=0)
            covered[key] += found["low"] <= 0.5 <= found["high"]
    assert covered["pairs"] >= 25 and covered["alone"] < 20
    one = worth(score, positive, ["go"] * 200, ["a"] * 200, share=0.5, draws=5, seed=0)
    assert one["auroc"] is not None and one["low"] is None is one["high"]


def test_choosing_and_calibration():
    score, positive = np.array([0.1, 0.9, np.nan, 0.8, 0.4]), np.array([0, 1, 1, 0, 0], bool)
    assert chosen_rate(score, positive, 0.6) == pytest.approx(2 / 3)  # the abstention ranks at the median, 0.6
    tied = np.array([0.9, 0.5, 0.5, 0.5, 0.1])
    for order in (positive, positive[[0, 3, 2, 1, 4]], positive[[0, 2, 3, 1, 4]]):  # whichever comes first
        assert chosen_rate(tied, order, 0.6) == pytest.approx((0 + 2 * 2 / 3) / 3)
    found = worth(np.ones(5), positive, ["go"] * 5, list("abcde"), share=0.4, draws=5, seed=0)
    assert found["chosen"] == pytest.approx(2 / 5) and found["gain"] == pytest.approx(0)  # it says nothing
    p = np.repeat([0.2, 0.7], 50)
    y = np.concatenate([np.arange(50) < 10, np.arange(50) < 40])
    found = calibration(p, y, bins=2)
    assert found["ece"] == pytest.approx(0.05) and found["brier"] == pytest.approx(np.mean((p - y) ** 2))
