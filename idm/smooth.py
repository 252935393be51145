"""Drift correction: deltas whose integral agrees with the positions seen in the frames.

Predicted deltas integrate to a position whose error grows with time; a position read from a frame is rough, but does
not drift. The corrected deltas `a` minimise

    sum_s ((a_s - a^_s) / sigma_a)^2 + sum_k ((p_0 + (G a)_k - p^_k) / sigma_p)^2

where `G` integrates them through the robot's measured response (a command moves the hand over the next few steps).
Linear least squares in closed form, in time and memory proportional to the length of the clip. The initial position p_0
is a free unknown.

Rotations are corrected by the same squares of what is still wrong: the turns from where the predicted ones lead to
those seen, in the axes in which errors of single turns add up (those of the hand for turns D R, of the base for R D).
Where the predicted ones lead far astray, also beyond half a turn, they are first taken gap by gap.
"""

from dataclasses import replace

import numpy as np

from dreamgen.core import rotations
from dreamgen.core.embodiment import Part

ROUNDS = 4
NEAR = 1.0  # radians off at most, where turns are still like displacements


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
    prior = np.eye(taps)[0]
    if not left:
        return prior
    x, y = np.concatenate(left).astype(np.float64), np.concatenate(right).astype(np.float64)
    if not x.any():  # a part that never moves
        return prior
    ridge = 1e-3 * np.trace(x.T @ x) / taps
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
    gap = np.searchsorted(rows[1:-1], np.arange(len(turns)), side="right")  # of each step, between two frames
    mend = np.zeros_like(turns)
    for _ in range(ROUNDS):  # Gauss and Newton's: the squares are those of turns near the ones found before
        mended = rotations.turned(part, rotations.exp(turns), rotations.exp(mend))
        since = rotations.composed(part, rotations.exp(_shown(rotations.log(mended), response)))
        start = rotations.turned(part, seen, rotations.inverse(since[rows]))  # from where each gap would begin as seen
        wrong = _wrong(part, start, since[rows], seen).cumsum(0)
        if np.linalg.norm(wrong, axis=1).max() < NEAR:  # what is seen is rough, and sums of it drift
            start = np.broadcast_to(seen[:1], seen.shape)
            wrong = _wrong(part, start, since[rows], seen)
        led = rotations.turned(part, start[gap], since[1:])
        axes = rotations.inverse(led) if part.frame == "tool" else led
        done = _shown(rotations.rotate(rotations.inverse(axes), mend), response).cumsum(0)[rows]
        add = correct(np.zeros_like(turns), wrong + done, rows, response, 1.0, sigma_action=sigma_action,
                      sigma_position=sigma_position)  # fmt: skip
        mend = rotations.rotate(axes, add)
    return rotations.entries(part, rotations.turned(part, rotations.exp(turns), rotations.exp(mend)), action)


def _wrong(part: Part, start: np.ndarray, since: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Turns (f 3) from where each gap ends, if it begins at `start` (f 4), to what is seen there; none at first."""
    ends = rotations.turned(part, start[:-1], since[1:])
    return np.pad(rotations.log(rotations.between(_other(part), ends, seen[1:])), ((1, 0), (0, 0)))


def _shown(turns: np.ndarray, response: np.ndarray) -> np.ndarray:
    """What of turns (s 3) shows from row to row, from nothing on (s + 1, 3)."""
    late = [share * np.pad(turns, ((i + 1, 0), (0, 0)))[: len(turns) + 1] for i, share in enumerate(response)]
    return np.sum(late, axis=0)


def _other(part: Part) -> Part:
    """The part as if its turns were told in the other frame."""
    return replace(part, frame="base" if part.frame == "tool" else "tool")
