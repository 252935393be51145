"""Drift correction: deltas whose integral agrees with the positions seen in the frames.

Predicted deltas integrate to a position whose error grows with time; a position read from a frame is rough, but does
not drift. The corrected deltas `a` minimise

    sum_s ((a_s - a^_s) / sigma_a)^2 + sum_k ((p_0 + (G a)_k - p^_k) / sigma_p)^2

where `G` integrates them through the robot's measured response (a command moves the hand over the next few steps).
Linear least squares in closed form, in time and memory proportional to the length of the clip. The initial position p_0
is a free unknown.

Rotations are corrected by the same squares of what is still wrong: the turns from where the predicted ones lead to
those seen, in the axes in which errors of single turns add up (those of the hand for turns D R, of the base for R D).
"""

from dataclasses import replace

import numpy as np

from dreamgen.core import rotations
from dreamgen.core.embodiment import Part

ROUNDS = 3


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


def turned_by(part: Part, moved: Part, state: np.ndarray) -> np.ndarray:
    """Turns from row to row of a rotation's entries (s d), in the frame and unit of the part that moves it, summed up
    (s 3): what is to rotations as positions are to displacements."""
    q = rotations.read(moved, state)
    turns = rotations.log(rotations.between(part, q[:-1], q[1:])) / part.radians
    return np.concatenate([np.zeros((1, 3)), turns.cumsum(0)])


def correct_turns(part: Part, moved: Part, action: np.ndarray, read: np.ndarray, rows: np.ndarray, response: np.ndarray,
                  *, sigma_action: float, sigma_position: float) -> np.ndarray:  # fmt: skip
    """Corrected delta rotations (s k), as `correct` does it, with both sigmas in rad.

    action (s k): entries of `part`; read (f d): entries of the state part `moved`, seen at `rows` (f,).
    """
    seen, turns = rotations.read(moved, read), rotations.vectors(part, action) * part.radians
    mend = np.zeros_like(turns)
    for _ in range(ROUNDS):  # Gauss and Newton's: the squares are those of turns near the ones found before
        mended = rotations.turned(part, rotations.exp(turns), rotations.exp(mend))
        led = rotations.composed(part, rotations.exp(_shown(rotations.log(mended), response)))
        led = rotations.turned(part, np.broadcast_to(seen[0], led.shape), led)
        axes = rotations.inverse(led[1:]) if part.frame == "tool" else led[1:]
        done = _shown(_seen_from(rotations.inverse(axes), mend), response).cumsum(0)[rows]
        wrong = rotations.log(rotations.between(_other(part), led[rows], seen))
        add = correct(np.zeros_like(turns), wrong + done, rows, response, 1.0, sigma_action=sigma_action,
                      sigma_position=sigma_position)  # fmt: skip
        mend = _seen_from(axes, add)
    return rotations.entries(part, rotations.turned(part, rotations.exp(turns), rotations.exp(mend)), action)


def _shown(turns: np.ndarray, response: np.ndarray) -> np.ndarray:
    """What of turns (s 3) shows from row to row, from nothing on (s + 1, 3)."""
    late = [share * np.pad(turns, ((i + 1, 0), (0, 0)))[: len(turns) + 1] for i, share in enumerate(response)]
    return np.sum(late, axis=0)


def _seen_from(axes: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """Rotation vectors (s 3), turned by `axes` (s 4)."""
    return rotations.log(rotations.product(rotations.product(axes, rotations.exp(turns)), rotations.inverse(axes)))


def _other(part: Part) -> Part:
    """The part as if its turns were told in the other frame."""
    return replace(part, frame="base" if part.frame == "tool" else "tool")
