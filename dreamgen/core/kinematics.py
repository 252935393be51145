"""What a robot's state becomes when its commands are followed exactly: the embodiment's rule, no simulator.

A delta adds `scale` times itself to the part it moves, along the axes that the hand has then if it is `turned_by`
another part; a delta rotation turns it (see `dreamgen.core.rotations`); an absolute part sets it; neither leaves the
`reach` of what it moves; a binary part moves it towards the value that the embodiment's `sets` names, within `travel`
seconds. Parts that no such command moves keep their value.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32

from dreamgen.core import rotations
from dreamgen.core.embodiment import Embodiment, Part


def commands(part: Part) -> tuple[float, float]:
    """The two values of a binary part: its limits, else 0 and 1."""
    low, high = part.limits or (0.0, 1.0)
    return float(low), float(high)


def follow(
    robot: Embodiment, first: Float[np.ndarray, " d"], action: Float[np.ndarray, "s a"]
) -> tuple[Float32[np.ndarray, "n d"], Bool[np.ndarray, " d"]]:
    """States before each action and after the last (s + 1, d), and which entries (d,) the rule knows."""
    state, known = np.repeat(first[None], len(action) + 1, axis=0).astype(np.float32), np.zeros(robot.state_dim, bool)
    parts = {part.name: part for part in robot.state}
    for part in robot.action:
        if part.moves is None or (part.kind == "binary" and part.sets is None):
            continue
        target, entry = parts[part.moves].slice, action[:, part.slice]
        known[target] = True
        if part.rotation:
            state[1:, target] = _turned(part, parts[part.moves], first[target], entry)
        elif part.kind == "delta":
            wrist = robot.turning(part)[1] if part.turned_by else None
            begun = None if wrist is None else rotations.read(wrist, first[wrist.slice])
            steps = part.scale * along(robot, part, action, begun)
            state[1:, target] = _reached(parts[part.moves], first[target], steps)
        elif part.kind == "absolute":
            state[1:, target] = np.clip(part.scale * entry, *(parts[part.moves].reach or (-np.inf, np.inf)))
        else:
            low, high = commands(part)
            goal = np.where(entry > (low + high) / 2, part.sets[1], part.sets[0])
            span = abs(part.sets[1] - part.sets[0])
            most = span / max(1.0, part.travel * float(robot.rate))
            for row in range(len(action)):
                before = state[row, target]
                state[row + 1, target] = before + np.clip(goal[row] - before, -most, most)
    return state, known


def _reached(moved: Part, first: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Values (s d) of a state part after each of the displacements (s d), from the value (d,) before them on. One that
    begins beyond its reach is not drawn into it."""
    if moved.reach is None:
        return first + steps.cumsum(0)
    low, high = (side(first, np.array(edge)) for side, edge in zip((np.minimum, np.maximum), moved.reach, strict=True))
    values = np.empty_like(steps)
    for row, step in enumerate(steps):
        first = values[row] = np.clip(first + step, low, high)
    return values


def along(robot: Embodiment, part: Part, action: Any, start: Any = None, *, back: bool = False) -> Any:
    """Entries (... s k) of a part of actions (... s a), as they are, but for displacements that are `turned_by` another
    part: from along the hand's axes at each step to along those at the first one, or, with the rotation (... 4) that
    the hand has there, `start`, to those that it is told in. back: the other way."""
    entry = action[..., part.slice]
    if part.turned_by is None:
        return entry
    turn = robot.turning(part)[0]
    axes = rotations.before(turn, rotations.read(turn, action[..., turn.slice]))
    axes = axes if start is None else rotations.product(start[..., None, :], axes)
    return rotations.rotate(rotations.inverse(axes) if back else axes, entry)


def _turned(part: Part, moved: Part, first: np.ndarray, entry: np.ndarray) -> np.ndarray:
    """What commands (s k) of a rotation make of the state part that they move, (s d), from its first value (d,) on."""
    if (part.kind, part.rotation, part.radians) == ("absolute", moved.rotation, moved.radians):
        return entry
    turn = rotations.read(part, entry)
    if part.kind == "delta":
        start = np.broadcast_to(rotations.read(moved, first), turn.shape)
        turn = rotations.turned(part, start, rotations.composed(part, turn))
    told = rotations.tell(moved, turn)
    return rotations.continued(moved, told, first) if moved.width == 4 else told  # the sign goes on


def inside(part: Part, values: np.ndarray) -> np.ndarray:
    """Entries (... k) as the part's limits have them: angles of an absolute rotation that lie beyond them are told by
    those nearest to their middle, the same rotation. What lies beyond them still is for the caller to clip."""
    if part.limits is None or (part.kind, part.width) != ("absolute", 3) or not part.rotation:
        return values
    low, high = part.limits
    beyond, middle, turn = (values < low) | (values > high), (low + high) / 2, rotations.TURN / part.radians
    if part.rotation == "axis_angle":
        beyond, near = beyond.any(-1, keepdims=True), rotations.nearest(part, values, np.full(3, middle))
    else:  # each angle by itself: not by way of the pole, where all three jump
        near = values + turn * np.round((middle - values) / turn)
    return np.where(beyond, near, values).astype(values.dtype)


def command(robot: Embodiment, action: Float32[np.ndarray, "*s a"]) -> Float32[np.ndarray, "*s a"]:
    """Inside the limits of `robot`; binary entries become the nearer of their two values."""
    action = action.copy()
    for part in robot.action:
        if part.limits is not None:
            low, high = part.limits
            entry = inside(part, action[..., part.slice])
            binary = np.where(entry > (low + high) / 2, high, low)
            action[..., part.slice] = binary if part.kind == "binary" else entry.clip(low, high)
    return action


def clipped(robot: Embodiment, action: Float[np.ndarray, "*s a"]) -> Float32[np.ndarray, "*s a"]:
    """Within the limits of `robot`: what its controller would execute. Binary entries between their two values stay."""
    made = np.array(action, np.float32)
    for part in robot.action:
        if part.limits is not None:
            made[..., part.slice] = inside(part, made[..., part.slice]).clip(*part.limits)
    return made


def within(robot: Embodiment, action: Float[np.ndarray, "*s a"], where: str, *, slack: float = 1e-3) -> np.ndarray:
    """`action`, if it has the robot's width, is finite and stays inside the limits of its parts; angles of absolute
    rotations as the limits have them.

    Raises ValueError that names the part, the entry and its limits.
    """
    action = np.array(action, np.float32)
    if action.shape[-1] != robot.action_dim:
        raise ValueError(f"{where}: actions are {action.shape[-1]} wide; robot '{robot.name}' has {robot.action_dim}")
    if not np.isfinite(action).all():
        raise ValueError(f"{where}: actions hold numbers that are not finite")
    for part in robot.action:
        if part.limits is None:
            continue
        low, high = part.limits
        action[..., part.slice] = entry = inside(part, action[..., part.slice])
        room = slack * (high - low)
        if entry.size and (entry.min() < low - room or entry.max() > high + room):
            worst = entry.min() if low - entry.min() > entry.max() - high else entry.max()
            raise ValueError(f"{where}: action part '{part.name}' is {worst:.3g}; embodiment '{robot.name}' allows "
                             f"{low:g} to {high:g}. Clip the actions, or mend its limits.")  # fmt: skip
    return action
