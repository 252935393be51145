"""Label scores against closed forms."""

import numpy as np

from dreamgen.core.clip import Labels
from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment, Part, View
from dreamgen.stages.label_scores import auroc, calibration, drift, lag, r2, score_labels, votes

ROBOT = Embodiment(
    name="arm", robot_hz="10", views=(View(name="a", key="a", height=8, width=8),),
    action=(Part(name="move", start=0, stop=2, kind="delta", scale=0.5, moves="place"),
            Part(name="grip", start=2, stop=3, kind="binary", limits=(-1.0, 1.0))),
    state=(Part(name="place", start=0, stop=2, unit="m"),),
)  # fmt: skip
CLOCK = Clock(robot_hz="10", video_hz="5", frames=3)


def test_r2_is_one_for_the_truth_and_zero_for_its_mean():
    true = np.random.default_rng(0).normal(size=(23, 3))
    assert r2(true, true) == 1 and abs(r2(np.repeat(true.mean(0)[None], 23, 0), true)) < 1e-12
    assert np.isnan(r2(true, np.ones_like(true)))


def test_auroc_counts_pairs():
    score, positive = np.array([0.1, 0.4, 0.4, 0.9, 0.2]), np.array([False, True, False, True, False])
    pairs = [(p > n) + 0.5 * (p == n) for p in score[positive] for n in score[~positive]]
    assert auroc(score, positive) == np.mean(pairs)


def test_lag_is_the_shift():
    rng = np.random.default_rng(1)
    true = [rng.normal(size=(n, 2)) for n in (39, 41, 3)]
    for shift in (-10, -2, 0, 3, 5, 11):
        assert lag([np.roll(t, shift, axis=0) for t in true], true) == shift
    late = [np.roll(t, 15, axis=0) for t in true]
    assert lag(late, true, 16) == 15 and lag([t[:9] for t in late], [t[:9] for t in true], 16) != 4
    for reach in (14, 15):  # it rises to the last that is looked at
        assert lag([t.cumsum(0) for t in late], [t.cumsum(0) for t in true], reach) in (None, -reach + 1, reach - 1)
    assert lag([np.zeros((19, 2))], [np.zeros((19, 2))]) is None
    assert lag([np.zeros((1, 2))], [np.zeros((1, 2))]) is None


def test_lag_is_looked_for_over_two_frame_gaps():
    rng = np.random.default_rng(2)
    true = [np.concatenate([rng.normal(size=(90, 2)), np.ones((90, 1))], 1).astype(np.float32)]
    late = [Labels(value=np.roll(true[0], 20, axis=0), spread=np.zeros_like(true[0]))]
    slow = Clock(robot_hz="10", video_hz="5/8", frames=3)  # 16 steps a gap
    assert score_labels(late, true, ROBOT, slow)["lag"] == {"move": 20, "grip": None}


def test_drift_of_a_bias_grows_with_time():
    true = [np.zeros((20, 2)), np.zeros((20, 2))]
    found = drift([t + [0.03, 0.04] for t in true], true, ROBOT.action[0])
    np.testing.assert_allclose([found["quarter"], found["half"], found["end"]], [0.125, 0.25, 0.5])


def test_votes_are_recovered_from_the_spread():
    share = np.array([[0.0], [0.25], [0.75], [1.0]])
    value = np.zeros((4, 3), np.float32)
    value[:, 2:] = np.where(share > 0.5, 1, -1)
    spread = np.zeros((4, 3), np.float32)
    spread[:, 2:] = 2 * np.sqrt(share * (1 - share))
    np.testing.assert_allclose(votes(Labels(value=value, spread=spread), ROBOT.action[1]), share, atol=1e-4)


def test_calibration_orders_errors_by_spread():
    spread = np.linspace(0.1, 1, 50)
    found = calibration(spread, 2 * spread)
    assert found["spearman"] > 0.999
    np.testing.assert_allclose(found["error"], 2 * np.array(found["spread"]), rtol=0.05)


def test_score_labels_of_a_perfect_labeler():
    rng = np.random.default_rng(3)
    actions = [np.concatenate([rng.normal(size=(n, 2)), np.sign(rng.normal(size=(n, 1)))], 1).astype(np.float32)
               for n in (17, 23)]  # fmt: skip
    found = score_labels([Labels(value=a, spread=np.zeros_like(a)) for a in actions], actions, ROBOT, CLOCK)
    assert found["r2"] == {"move": 1.0, "grip": 1.0} and found["mae"] == {"move": 0.0, "grip": 0.0}
    assert found["auroc"] == {"grip": 1.0} and found["accuracy"] == {"grip": 1.0}
    assert found["lag"] == {"move": 0, "grip": 0} and found["drift"]["move"]["end"] == 0
    assert found["control_mae"]["move"] > 0.5
