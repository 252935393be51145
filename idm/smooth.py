"""Drift correction: deltas whose integral agrees with the positions seen in the frames.

Predicted deltas integrate to a position whose error grows with time; a position read from a frame is rough, but does
not drift. The corrected deltas `a` minimise

    sum_s ((a_s - a^_s) / sigma_a)^2 + sum_k ((p_0 + (G a)_k - p^_k) / sigma_p)^2

where `G` integrates them through the robot's measured response (a command moves the hand over the next few steps).
Linear least squares in closed form. The initial position p_0 is a free unknown.
"""

import numpy as np


def fit_response(action: list[np.ndarray], state: list[np.ndarray], scale: float, taps: int = 4) -> np.ndarray:
    """Share of a commanded displacement that shows i steps later, (taps,) with sum near 1: least squares.

    action: (s d) per episode; state: (s d) of the part that it moves; scale: action unit to state unit.
    """
    left, right = [], []
    for a, p in zip(action, state, strict=True):
        if len(a) <= taps:
            continue
        moved = np.diff(p, axis=0)[taps - 1 :]
        past = np.stack([scale * a[taps - 1 - i : len(a) - 1 - i] for i in range(taps)], axis=-1)
        left.append(past.reshape(-1, taps))
        right.append(moved.reshape(-1))
    if not left:
        return np.eye(taps)[0]
    x, y = np.concatenate(left).astype(np.float64), np.concatenate(right).astype(np.float64)
    ridge = 1e-3 * np.trace(x.T @ x) / taps
    prior = np.eye(taps)[0]
    return np.linalg.solve(x.T @ x + ridge * np.eye(taps), x.T @ y + ridge * prior)


def integrator(rows: np.ndarray, steps: int, response: np.ndarray) -> np.ndarray:
    """Matrix (frames steps): displacement at each frame's row caused by a unit command at each step."""
    lag = rows[:, None] - np.arange(steps)[None, :]  # steps that the command has had to act
    reached = np.concatenate([[0.0], np.cumsum(response)])
    return reached[np.clip(lag, 0, len(response))]


def correct(action: np.ndarray, position: np.ndarray, rows: np.ndarray, response: np.ndarray, scale: float, *,
            sigma_action: float, sigma_position: float) -> np.ndarray:  # fmt: skip
    """Corrected deltas (s d).

    action (s d) predicted, position (f d) predicted at `rows` (f,), both in their own units; sigma_action is in action
    units, sigma_position in state units.
    """
    steps = len(action)
    g = integrator(rows, steps, response) * scale
    # unknowns: the s deltas, then p_0
    see = np.concatenate([g, np.ones((len(rows), 1))], axis=1) / sigma_position
    keep = np.eye(steps, steps + 1) / sigma_action
    left = see.T @ see + keep.T @ keep
    right = see.T @ (position / sigma_position) + keep.T @ (action / sigma_action)
    return np.linalg.solve(left, right)[:steps].astype(action.dtype)
