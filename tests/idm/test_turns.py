"""Rotations in the labeler: drift correction, states between frames, training on a hand that points down."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from moving_square import ROBOT, Squares, clip_of
from scipy.spatial.transform import Rotation
from test_model import small

from dreamgen.core import rotations
from dreamgen.core.clip import Labels
from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Part
from dreamgen.core.kinematics import follow
from dreamgen.core.part import ROTATIONS
from idm.heads import Heads, between_frames
from idm.model import FlowIDM
from idm.smooth import correct, correct_turns, fit_response, turned_by

RESPONSE = np.array([0.3, 0.5, 0.2])


def hand(frame: str, action: str = "axis_angle", state: str = "quaternion_wxyz") -> tuple[Part, Part]:
    turn = Part(name="turn", start=0, stop=ROTATIONS[action], kind="delta", rotation=action, frame=frame, moves="wrist")
    return turn, Part(name="wrist", start=0, stop=ROTATIONS[state], rotation=state)


def turned(turns: np.ndarray, frame: str, start: Rotation) -> Rotation:
    """Rotations (s + 1) of a hand that carries out each turn (s 3) over three steps, by a loop."""
    found = [start]
    for step in range(len(turns)):
        shown = sum(share * turns[step - i] for i, share in enumerate(RESPONSE) if step >= i)
        one = Rotation.from_rotvec(shown)
        found.append(found[-1] * one if frame == "tool" else one * found[-1])
    return Rotation.concatenate(found)


def told(part: Part, rotation: Rotation) -> np.ndarray:
    return rotations.tell(part, np.roll(rotation.as_quat(), 1, -1))


@pytest.mark.parametrize("frame", ["base", "tool"])
@pytest.mark.parametrize("action", ["axis_angle", "quaternion_xyzw"])
def test_a_biased_labeler_is_corrected_by_what_is_seen(frame, action):
    rng = np.random.default_rng(2)
    turn, wrist = hand(frame, action)
    true = rng.normal(0, 0.15, (40, 3)) + [0.05, 0, 0.02]
    start, rows = Rotation.from_rotvec([np.pi - 0.1, 0.1, 0]), np.arange(0, 41, 2)
    path = turned(true, frame, start)
    seen = told(wrist, path[rows])
    biased = told(turn, Rotation.from_rotvec(true + [0.01, -0.01, 0.015])).astype(np.float32)
    given = (turn, wrist, biased, seen, rows, RESPONSE)
    kept = correct_turns(*given, sigma_action=1e-6, sigma_position=1.0)
    assert rotations.apart(turn, kept, biased).max() < 1e-5
    mended = correct_turns(*given, sigma_action=0.1, sigma_position=1e-4)

    def off(values: np.ndarray) -> float:
        turns = rotations.vectors(turn, values)
        return (path[:-3].inv() * turned(turns, frame, start)[:-3]).magnitude()[-1]

    assert off(biased) > 0.3 and off(mended) < 0.03
    exact = told(turn, Rotation.from_rotvec(true)).astype(np.float32)
    same = correct_turns(turn, wrist, exact, seen, rows, RESPONSE, sigma_action=0.1, sigma_position=0.01)
    assert rotations.apart(turn, same, exact).max() < 1e-4


@pytest.mark.parametrize("frame", ["base", "tool"])
def test_a_drift_of_more_than_half_a_turn_is_corrected(frame):
    """20 seconds at 20 Hz, .012 rad off at each step."""
    rng, rows = np.random.default_rng(2), np.arange(0, 401, 2)
    turn, wrist = hand(frame)
    true = rng.normal(0, 0.05, (400, 3))
    path = turned(true, frame, Rotation.from_rotvec([np.pi - 0.1, 0.1, 0]))
    biased = told(turn, Rotation.from_rotvec(true + [0.01, -0.005, 0.007])).astype(np.float32)
    found = correct_turns(turn, wrist, biased, told(wrist, path[rows]), rows, RESPONSE, sigma_action=0.1,
                          sigma_position=1e-3)  # fmt: skip
    assert np.abs(rotations.vectors(turn, found) - true)[:-3].max() < 2e-3


@pytest.mark.parametrize("frame", ["base", "tool"])
def test_about_one_axis_turns_are_displacements(frame):
    """Where rotations commute the correction is that of `correct`, and the response is found as for positions."""
    rng = np.random.default_rng(3)
    turn, wrist = hand(frame, "axis_angle", "axis_angle")
    true, rows = rng.normal(0, 0.2, (30, 1)), np.arange(0, 31, 3)
    place = np.concatenate([[0.0], np.convolve(true[:, 0], RESPONSE)[:30].cumsum()])[:, None]
    seen, predicted = place[rows] + rng.normal(0, 0.02, (11, 1)), true + 0.03
    axis = np.array([[0.6, 0.0, 0.8]])
    sigmas = {"sigma_action": 0.05, "sigma_position": 0.02}
    plain = correct(predicted, seen, rows, RESPONSE, 1.0, **sigmas)
    turns = correct_turns(turn, wrist, predicted * axis, told(wrist, Rotation.from_rotvec(seen * axis)), rows, RESPONSE,
                          **sigmas)  # fmt: skip
    np.testing.assert_allclose(turns, plain * axis, atol=1e-8)
    path = told(wrist, turned(rng.normal(0, 0.2, (200, 3)), frame, Rotation.identity()))
    turns = rng.normal(0, 0.2, (200, 3))
    path = told(wrist, turned(turns, frame, Rotation.from_rotvec([np.pi, 0, 0])))[:-1]
    np.testing.assert_allclose(fit_response([turns], [turned_by(turn, wrist, path)], 1.0, taps=4), [*RESPONSE, 0],
                               atol=0.02)  # fmt: skip


def test_states_between_frames_turn_evenly_across_half_a_turn():
    clock = Clock(robot_hz="6", video_hz="4", frames=5)
    parts = (Part(name="place", start=0, stop=1), Part(name="wrist", start=1, stop=4, rotation="euler_xyz"))
    angle = np.linspace(3.0, 3.4, 5)
    seen = told(parts[1], Rotation.from_rotvec(angle[:, None] * [0, 0, 1.0]))
    found = between_frames(parts, clock, np.concatenate([angle[:, None], seen], 1).astype(np.float32))
    assert found.shape == (clock.steps + 1, 4) and found.dtype == np.float32
    np.testing.assert_allclose(found[:, 0], np.interp(np.arange(7), clock.rows, angle), atol=1e-6)
    want = np.interp(np.arange(7), clock.rows, angle)
    np.testing.assert_allclose(np.unwrap(found[:, 3]), want, atol=1e-5)


class Turning(Squares):
    """The squares, whose place is also told as the turn of a wrist that points down."""

    def __init__(self, count: int, kind: str) -> None:
        super().__init__(count)
        wrist = Part(name="wrist", start=0, stop=3, rotation="axis_angle", unit="rad")
        turn = Part(name="turn", start=0, stop=3, rotation="axis_angle", kind=kind, moves="wrist", unit="rad")
        self.robot = replace(ROBOT, name="wrist", state=(wrist,), action=(turn,))
        down = Rotation.from_rotvec([np.pi, 0, 0])
        for n, episode in enumerate(self.episodes):
            place = np.concatenate([episode.state / 40 - 0.5, np.zeros((len(episode.state), 1))], 1)
            path = Rotation.from_rotvec(place) * down
            ends = Rotation.concatenate([path[1:], path[-1:]])
            action = ends if kind == "absolute" else ends * path.inv()
            self.episodes[n] = replace(episode, state=path.as_rotvec().astype(np.float32),
                                       action=action.as_rotvec().astype(np.float32))  # fmt: skip


@pytest.mark.parametrize("kind", ["absolute", "delta"])
def test_a_labeler_of_a_hand_that_points_down(kind, tmp_path):
    data = Turning(4, kind)
    state = np.concatenate([e.state for e in data.episodes])
    assert np.abs(state[:, 0]).min() > 2 and (state[:, 0] > 0).any() and (state[:, 0] < 0).any()  # it wraps
    model = small(robot=data.robot)
    model.fit(data, range(3))
    assert model.head.state.scale[[0, 2]].max() < 0.5 and model.head.action.scale[[0, 2]].max() < 0.5
    loss, _ = model.loss(model.batches(data, range(3), batch_size=2, seed=0)(0))
    loss.backward()
    model.calibrate(data, [3])
    clip = clip_of(data, 0) if kind == "absolute" else clip_of(data, 1)
    labels, states = model.labels_and_states([clip])
    assert np.linalg.norm(labels[0].value, axis=1).max() <= np.pi + 1e-5 and len(states[0]) == len(labels[0].value) + 1
    model.save(tmp_path)
    again = FlowIDM.load(tmp_path)
    np.testing.assert_array_equal(again.label([clip])[0].value, labels[0].value)
    bare = [replace(part, rotation="") for part in (*data.robot.state, *data.robot.action)]
    with pytest.raises(ValueError, match="labeler .*\n  action 'turn': rotation here None, saved 'axis_angle'"):
        FlowIDM.load(tmp_path, replace(data.robot, state=bare[:1], action=bare[1:]))  # what it learned are turns
    z = model.head.state.normalise(torch.from_numpy(state))
    assert z.abs().max() < 5
    assert rotations.apart(data.robot.state[0], model.head.state.denormalise(z).numpy(), state).max() < 1e-5


@pytest.mark.parametrize("frame", ["base", "tool"])
def test_a_perfect_labeler_is_left_as_it_is(frame):
    """Labels that agree with the states read from the frames stay, and lead along them."""
    turn, wrist = hand(frame, "euler_xyz", "quaternion_xyzw")
    robot = replace(ROBOT, name="wrist", state=(wrist,), action=(turn,))
    rng, clock = np.random.default_rng(5), Clock(robot_hz="20", video_hz="8", frames=9)
    episodes = []
    for _ in range(3):
        action = told(turn, Rotation.from_rotvec(rng.normal(0, 0.1, (clock.steps, 3)))).astype(np.float32)
        state, _ = follow(robot, told(wrist, Rotation.from_rotvec([3.1, 0, 0])), action)
        episodes.append((action, state))
    heads = Heads(robot, 8)
    heads.fit([a for a, _ in episodes], [s[:-1] for _, s in episodes])
    np.testing.assert_allclose(heads.response[0].numpy(), [1, 0, 0, 0], atol=1e-2)
    found = heads.calibrate([told(turn, Rotation.from_rotvec(rotations.vectors(turn, a) + 0.02)) for a, _ in episodes],
                            [a for a, _ in episodes], [s for _, s in episodes], [s for _, s in episodes])  # fmt: skip
    assert abs(found["sigma_action_turn"] - 0.02) < 2e-3 and found["sigma_state_wrist"] < 1e-5
    action, state = episodes[0]
    labels = heads.corrected(Labels(value=action, spread=np.zeros_like(action)), state[clock.rows], clock, 1.0)
    assert rotations.apart(turn, labels.value, action).max() < 2e-3
    ends = follow(robot, state[0], labels.value)[0]
    assert rotations.apart(wrist, ends[clock.rows], state[clock.rows]).max() < 2e-3
