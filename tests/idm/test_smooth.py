"""Drift correction against closed forms and simulated integrals."""

from dataclasses import replace

import numpy as np
import pytest
from moving_square import CLOCK, ROBOT, Squares

from dreamgen.core.clip import Labels
from idm.heads import Heads
from idm.smooth import correct, fit_response

RESPONSE = np.array([0.3, 0.5, 0.2])


def moved(action: np.ndarray, scale: float) -> np.ndarray:
    """Positions (s + 1 d) of a hand that carries out each command over three steps, by a loop."""
    place = np.zeros((len(action) + 4, action.shape[1]))
    for step, a in enumerate(action):
        for i, share in enumerate(RESPONSE):
            place[step + i + 1 :] += share * scale * a
    return place[: len(action) + 1]


def integrator(rows: np.ndarray, steps: int, response: np.ndarray) -> np.ndarray:
    """Matrix (frames steps): displacement at each frame's row caused by a unit command at each step."""
    reached = np.concatenate([[0.0], np.cumsum(response)])
    return reached[np.clip(rows[:, None] - np.arange(steps)[None, :], 0, len(response))]


def dense(action, position, rows, response, scale, *, sigma_action, sigma_position):  # noqa: ANN001, ANN201
    """The least squares of the docstring as they stand there: unknowns are the deltas, then p_0."""
    steps = len(action)
    see = np.concatenate([integrator(rows, steps, response) * scale, np.ones((len(rows), 1))], axis=1) / sigma_position
    keep = np.eye(steps, steps + 1) / sigma_action
    left = np.concatenate([see, keep])
    return np.linalg.lstsq(left, np.concatenate([position / sigma_position, action / sigma_action]))[0][:steps]


def test_integrator_is_the_loop():
    action = np.random.default_rng(0).normal(size=(13, 2))
    rows = np.array([0, 2, 3, 7, 13])
    np.testing.assert_allclose(integrator(rows, 13, RESPONSE) @ action * 0.04, moved(action, 0.04)[rows], atol=1e-12)


@pytest.mark.parametrize("response", [RESPONSE, np.array([1.1]), np.array([0.1, 0.2, 0.9, -0.3, 0.05])])
@pytest.mark.parametrize(("sigma_action", "sigma_position"), [(0.1, 0.01), (1.0, 1e-4), (1e-3, 1.0)])
def test_the_banded_solution_is_the_dense_one(response, sigma_action, sigma_position):
    rng = np.random.default_rng(5)
    for rows in (np.arange(0, 41, 2), np.array([0, 1, 3, 4, 6, 7, 9]), np.array([0, 1])):
        action, position = rng.normal(size=(rows[-1], 3)), rng.normal(size=(len(rows), 3))
        given = (action, position, rows, response, 0.04)
        sigmas = {"sigma_action": sigma_action, "sigma_position": sigma_position}
        np.testing.assert_allclose(correct(*given, **sigmas), dense(*given, **sigmas), rtol=1e-6, atol=1e-6)


def test_response_is_recovered():
    rng = np.random.default_rng(1)
    actions = [rng.normal(size=(31, 3)) for _ in range(7)]
    found = fit_response(actions, [moved(a, 0.04)[:-1] for a in actions], 0.04, taps=4)
    np.testing.assert_allclose(found, [*RESPONSE, 0], atol=0.02)


def test_a_part_that_never_moves_answers_at_once():
    still = [np.zeros((31, 3), np.float32) for _ in range(2)]
    np.testing.assert_array_equal(fit_response(still, [a + 0.7 for a in still], 0.04, taps=4), [1, 0, 0, 0])
    noise = np.random.default_rng(3).normal(0, 1e-3, (31, 3))  # of what it is measured by
    np.testing.assert_array_equal(fit_response(still[:1], [noise], 0.04, taps=4), [1, 0, 0, 0])


def test_positions_remove_drift_and_weights_decide():
    rng = np.random.default_rng(2)
    true = rng.normal(size=(24, 3)).astype(np.float32) * 0.3
    rows = np.arange(0, 25, 2)
    seen = moved(true, 0.04)[rows] + 0.7
    biased = true + 0.1
    kept = correct(biased, seen, rows, RESPONSE, 0.04, sigma_action=1e-6, sigma_position=1.0)
    np.testing.assert_allclose(kept, biased, atol=1e-5)
    mended = correct(biased, seen, rows, RESPONSE, 0.04, sigma_action=0.1, sigma_position=1e-4)
    drift = np.abs((mended - true).cumsum(0)[-5] * 0.04).max()
    assert drift < 0.1 * np.abs((biased - true).cumsum(0)[-5] * 0.04).max()
    assert mended.dtype == np.float32
    same = correct(true, seen, rows, RESPONSE, 0.04, sigma_action=0.1, sigma_position=0.01)
    np.testing.assert_allclose(same, true, atol=1e-5)


def test_errors_of_an_action_and_of_a_state_of_one_name_are_both_told():
    names = ("arm", "light")
    robot = replace(ROBOT, state=(replace(ROBOT.state[0], name="arm"),), action=tuple(
        replace(part, name=name, moves="arm" if name == "arm" else None)
        for part, name in zip(ROBOT.action, names, strict=True)))  # fmt: skip
    data = Squares(3)
    actions, states = [e.action for e in data.episodes], [e.state for e in data.episodes]
    found = Heads(robot, 8).calibrate([a + 0.1 for a in actions], actions, [s - 0.4 for s in states], states)
    assert found == pytest.approx({"sigma_action_arm": 0.1, "sigma_action_light": 0.1, "sigma_state_arm": 0.4}, 1e-3)


def test_deltas_are_corrected_once_their_errors_are_known():
    """Scores during a training, before its calibration, are of labels as they are predicted."""
    data, heads = Squares(3), Heads(ROBOT, 8)
    actions, states = [e.action for e in data.episodes], [e.state for e in data.episodes]
    heads.fit(actions, states)
    value = actions[0][: CLOCK.steps] * np.float32([0.5, 0.5, 1])
    given = Labels(value=value, spread=np.zeros_like(value)), states[0][CLOCK.rows], CLOCK, 1.0
    np.testing.assert_array_equal(heads.corrected(*given).value, value)
    heads.calibrate([0.5 * a for a in actions], actions, [s + 0.1 for s in states], states)
    mended = heads.corrected(*given).value
    assert np.abs(mended - actions[0][: CLOCK.steps]).mean() < 0.7 * np.abs(value - actions[0][: CLOCK.steps]).mean()
