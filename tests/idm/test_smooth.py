"""Drift correction against closed forms and simulated integrals."""

import numpy as np

from idm.smooth import correct, fit_response, integrator

RESPONSE = np.array([0.3, 0.5, 0.2])


def moved(action: np.ndarray, scale: float) -> np.ndarray:
    """Positions (s + 1 d) of a hand that carries out each command over three steps, by a loop."""
    place = np.zeros((len(action) + 4, action.shape[1]))
    for step, a in enumerate(action):
        for i, share in enumerate(RESPONSE):
            place[step + i + 1 :] += share * scale * a
    return place[: len(action) + 1]


def test_integrator_is_the_loop():
    action = np.random.default_rng(0).normal(size=(13, 2))
    rows = np.array([0, 2, 3, 7, 13])
    np.testing.assert_allclose(integrator(rows, 13, RESPONSE) @ action * 0.04, moved(action, 0.04)[rows], atol=1e-12)


def test_response_is_recovered():
    rng = np.random.default_rng(1)
    actions = [rng.normal(size=(31, 3)) for _ in range(7)]
    found = fit_response(actions, [moved(a, 0.04)[:-1] for a in actions], 0.04, taps=4)
    np.testing.assert_allclose(found, [*RESPONSE, 0], atol=0.02)


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
