"""Drift correction: deltas whose integral agrees with the positions seen in the frames.

Predicted deltas integrate to a position whose error grows with time; a position read from a frame is rough, but does
not drift. The corrected deltas `a` minimise

    sum_s ((a_s - a^_s) / sigma_a)^2 + sum_k ((p_0 + (G a)_k - p^_k) / sigma_p)^2

where `G` integrates them through the robot's measured response (a command moves the hand over the next few steps).
Linear least squares in closed form, in time and memory proportional to the length of the clip. The initial position p_0
is a free unknown.
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


def correct(action: np.ndarray, position: np.ndarray, rows: np.ndarray, response: np.ndarray, scale: float, *,
            sigma_action: float, sigma_position: float) -> np.ndarray:  # fmt: skip
    """Corrected deltas (s d).

    action (s d) predicted, position (f d) predicted at `rows` (f,), both in their own units; sigma_action is in action
    units, sigma_position in state units.
    """
    from scipy.linalg import solveh_banded

    steps, taps, kind = len(action), len(response), action.dtype
    action, position = action.astype(np.float64), position.astype(np.float64)
    see, keep = scale / sigma_position**2, 1 / sigma_action**2
    # the sums C_1 ... C_s of the deltas: delta s is C_s+1 - C_s, and frame k shows p_0 + scale sum_i response_i C_r-i
    # with r = rows[k], so the normal equations are banded (band[i, j] is entry (j + i, j)), but for p_0
    place = rows[:, None] - 1 - np.arange(taps)  # of C_r-i among the unknowns; C_0 and before is zero
    band = np.zeros((max(3, taps), steps))  # of two rows, scipy solves none of one column
    band[0] = 2 * keep
    band[0, -1] = keep
    band[1, :-1] = -keep
    for i in range(taps):
        for j in range(i, taps):
            np.add.at(band[j - i], place[place[:, j] >= 0, j], response[i] * response[j] * scale * see)
    frame, tap = np.nonzero(place >= 0)
    at, effect = place[frame, tap], response[tap] * see
    border, right = np.zeros(steps), keep * (action - np.append(action[1:], np.zeros_like(action[:1]), axis=0))
    np.add.at(border, at, effect)
    np.add.at(right, at, effect[:, None] * position[frame])
    # p_0 by the Schur complement of the band
    solved = solveh_banded(band, np.column_stack([border, right]), lower=True)
    corner = len(rows) / sigma_position**2 - border @ solved[:, 0]
    first = (position.sum(0) / sigma_position**2 - border @ solved[:, 1:]) / corner
    total = solved[:, 1:] - solved[:, :1] * first
    return np.diff(total, axis=0, prepend=np.zeros_like(total[:1])).astype(kind)
