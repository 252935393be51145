"""Other streams of actions from one moment: disturbed, mirrored, stuck, late. All are (s a) in units of the robot.

Each keeps to the embodiment's limits. Sizes are shares of an entry's half range (of 1 where it has no limits).
"""

from collections.abc import Sequence

import numpy as np

from dreamgen.core.embodiment import Embodiment, Part
from dreamgen.core.kinematics import commands


def bounds(part: Part) -> tuple[float, float]:
    """Lowest and highest value of a part; without limits, none (binary parts: their commands)."""
    if part.kind == "binary":
        return commands(part)
    return part.limits or (-np.inf, np.inf)


def half_range(part: Part) -> float:
    low, high = bounds(part)
    return (high - low) / 2 if np.isfinite(high - low) else 1.0


def noisy(robot: Embodiment, action: np.ndarray, size: float, rng: np.random.Generator, *,
          smooth: float = 0.0) -> np.ndarray:  # fmt: skip
    """Gaussian noise on all parts but binary ones; smooth in [0, 1): its correlation from step to step."""
    made = np.array(action, np.float32)
    for part in robot.action:
        if part.kind == "binary":
            continue
        drawn = rng.normal(size=(len(made), part.width))
        for row in range(1, len(drawn)):
            drawn[row] = smooth * drawn[row - 1] + np.sqrt(1 - smooth**2) * drawn[row]
        made[:, part.slice] = (made[:, part.slice] + size * half_range(part) * drawn).clip(*bounds(part))
    return made


def mirrored(robot: Embodiment, action: np.ndarray, entries: Sequence[int] = (1,)) -> np.ndarray:
    """The same motion to the other side: these entries of every delta part change their sign."""
    made = np.array(action, np.float32)
    for part in robot.action:
        if part.kind == "delta":
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
    """All commands come `steps` later; until then deltas are 0 and the others hold their first value."""
    action = np.asarray(action, np.float32)
    if steps <= 0:
        return action.copy()
    made = np.concatenate([np.repeat(action[:1], min(steps, len(action)), 0), action[: max(0, len(action) - steps)]])
    for part in robot.action:
        if part.kind == "delta":
            made[:steps, part.slice] = 0
    return made


def resting(robot: Embodiment, state: np.ndarray, steps: int) -> np.ndarray:
    """Commands (steps a) that leave a state (d,) as it is by the embodiment's rule: deltas 0, absolute parts where they
    are, binary ones at the command whose `sets` is nearer. What has no rule, or no known state, gets 0 or the low one.
    """
    made, where = np.zeros((steps, robot.action_dim), np.float32), {part.name: part.slice for part in robot.state}
    for part in robot.action:
        low, high = bounds(part)
        now = state[where[part.moves]] if part.moves and len(state) else None
        if part.kind == "binary":
            closer = now is not None and part.sets and abs(now - part.sets[1]).sum() < abs(now - part.sets[0]).sum()
            made[:, part.slice] = high if closer else low
        else:
            held = now / part.scale if part.kind == "absolute" and now is not None else 0
            made[:, part.slice] = np.clip(held, low, high)
    return made


def still(robot: Embodiment, action: np.ndarray) -> np.ndarray:
    """Nothing is commanded: deltas are 0, all else holds its first value."""
    return late(robot, action, len(action))
