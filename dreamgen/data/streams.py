"""Other streams of actions from one moment: disturbed, mirrored, stuck, late. All are (s a) in units of the robot.

Each keeps to the embodiment's limits. Sizes are shares of an entry's half range (of 1 where it has no limits), of a
rotation about each axis (of 1 rad where its entries are no angles).
"""

from collections.abc import Sequence

import numpy as np

from dreamgen.core import rotations
from dreamgen.core.embodiment import Embodiment, Part
from dreamgen.core.kinematics import commands, inside


def bounds(part: Part) -> tuple[float, float]:
    """Lowest and highest value of a part; without limits, none (binary parts: their commands)."""
    if part.kind == "binary":
        return commands(part)
    return part.limits or (-np.inf, np.inf)


def half_range(part: Part) -> float:
    low, high = bounds(part)
    return (high - low) / 2 if np.isfinite(high - low) and not (part.rotation and part.width > 3) else 1.0


def disturbed(part: Part, values: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Values (n k) of a part, changed by so much and kept within its limits: (n k) is added, and rotations are turned
    by vectors (n 3) in their unit (else rad)."""
    if part.rotation:
        turn = rotations.exp(by * part.radians)
        values = rotations.entries(part, rotations.turned(part, rotations.read(part, values), turn), values)
        values = inside(part, values)
    else:
        values = values + by
    return values.clip(*bounds(part))


def axes(part: Part) -> int:
    """Numbers that say by how much a part is changed."""
    return 3 if part.rotation else part.width


def told(robot: Embodiment, action: np.ndarray) -> np.ndarray:
    """Actions (... a) with quaternions of unit size and matrices that are rotations."""
    made = np.array(action)
    for part in robot.action:
        if part.rotation and part.width > 3:
            made[..., part.slice] = rotations.tell(part, rotations.read(part, made[..., part.slice]))
    return made


def noisy(robot: Embodiment, action: np.ndarray, size: float, rng: np.random.Generator, *,
          smooth: float = 0.0) -> np.ndarray:  # fmt: skip
    """Gaussian noise on all parts but binary ones; smooth in [0, 1): its correlation from step to step."""
    made = np.array(action, np.float32)
    for part in robot.action:
        if part.kind == "binary":
            continue
        drawn = rng.normal(size=(len(made), axes(part)))
        for row in range(1, len(drawn)):
            drawn[row] = smooth * drawn[row - 1] + np.sqrt(1 - smooth**2) * drawn[row]
        made[:, part.slice] = disturbed(part, made[:, part.slice], size * half_range(part) * drawn)
    return made


def mirrored(robot: Embodiment, action: np.ndarray, entries: Sequence[int] = (1,)) -> np.ndarray:
    """The same motion to the other side: these entries of every delta part change their sign. A turn is that seen in a
    mirror across these axes: it goes on about the mirrored one, and back about the others."""
    made = np.array(action, np.float32)
    for part in robot.action:
        if part.kind == "delta" and part.rotation:
            sign = np.array([1.0 if axis in entries else -1.0 for axis in range(3)])
            sign = sign * (-1) ** (1 + sum(axis in entries for axis in range(3)))
            turn = rotations.exp(sign * rotations.log(rotations.read(part, made[:, part.slice])))
            made[:, part.slice] = rotations.entries(part, turn, made[:, part.slice]).clip(*bounds(part))
        elif part.kind == "delta":
            for entry in (e for e in entries if e < part.width):
                made[:, part.start + entry] *= -1
            made[:, part.slice] = made[:, part.slice].clip(*bounds(part))
    return made


def stuck(robot: Embodiment, action: np.ndarray, *, high: bool = False) -> np.ndarray:
    """Binary parts hold their low (or high) command: a gripper that does not move."""
    made = np.array(action, np.float32)
    for part in robot.action:
        if part.kind == "binary":
            made[:, part.slice] = commands(part)[int(high)]
    return made


def late(robot: Embodiment, action: np.ndarray, steps: int) -> np.ndarray:
    """All commands come `steps` later; until then deltas rest and the others hold their first value."""
    action = np.asarray(action, np.float32)
    if steps <= 0:
        return action.copy()
    made = np.concatenate([np.repeat(action[:1], min(steps, len(action)), 0), action[: max(0, len(action) - steps)]])
    for part in robot.action:
        if part.kind == "delta":
            made[:steps, part.slice] = part.rest
    return made


def resting(robot: Embodiment, state: np.ndarray, steps: int) -> np.ndarray:
    """Commands (steps a) that leave a state (d,) as it is by the embodiment's rule: deltas at rest, absolute parts
    where they are, binary ones at the command whose `sets` is nearer. What has no rule, or no known state, gets 0, no
    turn or the low one."""
    made, where = np.zeros((steps, robot.action_dim), np.float32), {part.name: part for part in robot.state}
    for part in robot.action:
        low, high = bounds(part)
        moved = where[part.moves] if part.moves and len(state) else None
        now = None if moved is None else state[moved.slice]
        if part.kind == "binary":
            closer = now is not None and part.sets and abs(now - part.sets[1]).sum() < abs(now - part.sets[0]).sum()
            made[:, part.slice] = high if closer else low
        elif part.rotation:
            held = part.kind == "absolute" and moved is not None
            kept = rotations.tell(part, rotations.read(moved, now)) if held else np.array(part.rest)
            made[:, part.slice] = np.clip(inside(part, kept), low, high)
        else:
            held = now / part.scale if part.kind == "absolute" and now is not None else 0
            made[:, part.slice] = np.clip(held, low, high)
    return made


def still(robot: Embodiment, action: np.ndarray) -> np.ndarray:
    """Nothing is commanded: deltas rest, all else holds its first value."""
    return late(robot, action, len(action))
