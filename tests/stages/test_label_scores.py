"""Label scores against closed forms."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from dreamgen.core import rotations
from dreamgen.core.clip import Episode, Labels
from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment, Part, View
from dreamgen.core.part import ROTATIONS
from dreamgen.data.lerobot import Dataset
from dreamgen.stages.evaluate_labels import beside_recorded, state_errors
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


def test_what_does_not_move_has_no_lag():
    """Joints that are held, each at a place of its own, in every clip at another, and labels with some noise."""
    rng = np.random.default_rng(5)
    for held in ([[0.4, -2.1, 255.0]] * 3, rng.normal(size=(3, 3))):
        true = [np.tile(np.float32(place), (41, 1)) for place in held]
        noisy = [(t + rng.normal(size=t.shape) * 0.03).astype(np.float32) for t in true]
        assert lag(noisy, true) is None
    moving = [np.concatenate([t, rng.normal(size=(41, 1))], 1) for t in true]
    assert lag([np.roll(t, 2, axis=0) for t in moving], moving) == 2


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


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_rotations_are_scored_by_angles(rotation):
    """A hand that points down; labels are off by a tenth of a radian about a random axis, and one step late."""
    rng, width = np.random.default_rng(4), ROTATIONS[rotation]
    wrist = Part(name="wrist", start=0, stop=width, rotation=rotation)
    turn = Part(name="turn", start=0, stop=width, rotation=rotation, moves="wrist", scale=0.5 if width == 3 else 1.0)
    step = Part(name="step", start=width, stop=width + 3, rotation="axis_angle", kind="delta", moves="wrist",
                frame="tool")  # fmt: skip
    robot = Embodiment(name="arm", robot_hz="10", views=ROBOT.views, state=(wrist,), action=(turn, step))
    actions, labels = [], []
    for n in (41, 37):
        true = Rotation.from_rotvec(rng.normal(0, 0.3, (n, 3)).cumsum(0) / 3) * Rotation.from_rotvec([np.pi, 0, 0])
        small = rng.normal(0, 0.2, (n, 3))
        axis = rng.normal(size=(n, 3))
        off = Rotation.from_rotvec(0.1 * axis / np.linalg.norm(axis, axis=1, keepdims=True))
        rows = [np.concatenate([rotations.tell(turn, np.roll(r.as_quat(), 1, -1)), steps], 1).astype(np.float32)
                for r, steps in ((true, small), (true * off, small + [0.02, 0, 0]))]  # fmt: skip
        actions.append(rows[0])
        labels.append(Labels(value=rows[1], spread=np.zeros_like(rows[1])))
    found = score_labels(labels, actions, robot, CLOCK)
    q = Rotation.from_quat(np.roll(rotations.read(turn, np.concatenate(actions)[:, turn.slice]), -1, -1))
    varies = ((q.mean().inv() * q).magnitude() ** 2).mean()
    assert found["mae"]["turn"] * turn.radians == pytest.approx(0.1, abs=1e-5)
    assert found["r2"]["turn"] == pytest.approx(1 - 0.01 / varies, abs=1e-4)
    assert found["control_mae"]["turn"] * turn.radians == pytest.approx((q.mean().inv() * q).magnitude().mean())
    assert found["lag"] == {"turn": 0, "step": 0} and found["drift"].keys() == {"step"}
    ends = []
    for label, action in zip(labels, actions, strict=True):
        left, right = Rotation.identity(), Rotation.identity()
        for a, b in zip(label.value[:, step.slice], action[:, step.slice], strict=True):
            left, right = left * Rotation.from_rotvec(a), right * Rotation.from_rotvec(b)
        ends.append((left.inv() * right).magnitude())
    assert found["drift"]["step"]["end"] == pytest.approx(np.mean(ends), abs=1e-5)
    perfect = score_labels([Labels(value=a, spread=np.zeros_like(a)) for a in actions], actions, robot, CLOCK)
    assert perfect["r2"]["turn"] == pytest.approx(1) and perfect["mae"]["turn"] < 1e-6
    late = [Labels(value=np.roll(a, 2, axis=0), spread=np.zeros_like(a)) for a in actions]
    assert score_labels(late, actions, robot, CLOCK)["lag"] == {"turn": 2, "step": 2}
    states = [rotations.tell(wrist, rotations.read(turn, a[:, turn.slice])) for a in actions]
    held = Embodiment(name="arm", robot_hz="10", views=ROBOT.views, state=(wrist,),
                      action=(replace(turn, scale=1.0, unit="rad"),))  # fmt: skip
    made = [Labels(value=s.astype(np.float32), spread=np.zeros(s.shape, np.float32)) for s in states]
    after = [np.concatenate([s[:1], s[:-1]]).astype(np.float32) for s in states]
    assert state_errors(held, after, made, after, [])["integrated"]["wrist"] < 1e-5


class Kept(Dataset):
    """Episodes in memory, by their numbers in a dataset."""

    def __init__(self, episodes: dict[int, Episode]) -> None:
        self.numbers, self.episodes = list(episodes), list(episodes.values())

    def __len__(self) -> int:
        return len(self.numbers)

    def index(self, i: int) -> int:
        return self.numbers[i]

    def episode(self, i: int) -> Episode:
        return self.episodes[i]


def acted(text: str, action: np.ndarray, **meta) -> Episode:
    return Episode(instruction=text, state=np.zeros((len(action), 2), np.float32), action=action, meta=meta)


def test_dreams_are_compared_with_what_was_recorded_from_their_first_frame():
    """In a simulator by its seed, on a robot by the numbers of dataset, episode and row."""
    rng = np.random.default_rng(6)
    actions = rng.normal(size=(3, 19, 3)).astype(np.float32)
    scored = Kept({1: acted("push", actions[0]), 4: acted("lift", actions[1]), 5: acted("lift", actions[2], seed=7)})

    def dream(text: str, action: np.ndarray, **origin) -> Episode:
        return acted(text, action[:12], seed=43, origin=origin)

    here = {"dataset": "abc"}
    fit = [dream("push", actions[0], **here, episode=1, row=0), dream("lift", actions[1][2:], **here, episode=4, row=2),
           dream("lift", actions[2], sim="plane", instruction="lift", seed=7)]  # fmt: skip
    unfit = [dream("lift", actions[0], **here, episode=1, row=0),  # another instruction
             dream("push", actions[0], **here, episode=2, row=0),  # an episode that is not scored
             dream("push", actions[0], dataset="abd", episode=1, row=0),  # of another dataset
             dream("push", actions[0], **here, episode=1, row=9),  # for which too little is recorded
             dream("lift", actions[2], sim="plane", instruction="push", seed=7), dream("lift", actions[2])]  # fmt: skip
    dreams = Kept(dict(enumerate([*fit, *unfit])))
    labels, true = beside_recorded(dreams, scored, range(3), "abc", None)
    np.testing.assert_array_equal(np.stack(labels), np.stack([actions[0][:12], actions[1][2:14], actions[2][:12]]))
    np.testing.assert_array_equal(labels, true)
    assert len(beside_recorded(dreams, scored, [0, 2], "abc", 2)[0]) == 1


def test_dreams_of_siblings_are_compared_with_their_own_recording():
    """Siblings share instruction and seed, and do something else each."""
    actions = np.random.default_rng(7).normal(size=(3, 19, 3)).astype(np.float32)
    scored = Kept({k: acted("lift", action, seed=7) for k, action in enumerate(actions)})
    begun = {"sim": "plane", "instruction": "lift", "seed": 7}
    dreams = Kept({k: acted("lift", actions[k][:12], origin={**begun, "dataset": "abc", "episode": k, "row": 0})
                   for k in range(3)})  # fmt: skip
    labels, true = beside_recorded(dreams, scored, range(3), "abc", None)
    np.testing.assert_array_equal(np.stack(true), actions[:, :12])
    assert len(labels) == 3
    assert beside_recorded(dreams, scored, [1, 2], "abc", 1) == ([], [])  # its own is not scored, siblings are none
