"""Robot steps as latent frames see them: composed on the clock, relative to the pose at each latent frame's start.

A latent frame after the first shows k video frames (4 for a causal VAE), thus k frame gaps. For each gap and action
entry one number says where the robot has come by the gap's end: deltas are summed from the latent frame's start, those
along the hand's own axes along the ones that it has there, and scaled to units; absolute parts give the command less
the one at the start (the state, where it is known); rotations the turn since then, less no turn; binary parts the share
of high commands in the gap, from -1 to 1. Rates that do not divide change nothing: k gaps are k gaps.
"""

import numpy as np
from jaxtyping import Float, Float32, Int64

from dreamgen.core import rotations
from dreamgen.core.embodiment import Embodiment, Part
from dreamgen.core.kinematics import along, commands, follow


def latent_actions(
    robot: Embodiment,
    rows: Int64[np.ndarray, " t"],
    action: Float[np.ndarray, "s a"],
    *,
    gaps: int,
    state: Float[np.ndarray, " d"] | None = None,
) -> Float32[np.ndarray, "lt ka"]:
    """(latent frames - 1, gaps * a) of the actions (rows[-1], a) of a clip whose frames show `rows` (the first is 0).

    state: at the first frame, if known. Raises ValueError for actions that do not span the clip.
    """
    if action.shape != (rows[-1], robot.action_dim) or (len(rows) - 1) % gaps:
        raise ValueError(f"actions are {action.shape}; {len(rows)} frames span {(int(rows[-1]), robot.action_dim)} "
                         f"robot steps and entries, and must be 1 + a multiple of {gaps}")  # fmt: skip
    spans = list(zip(rows[:-1].tolist(), rows[1:].tolist(), strict=True))
    out = np.zeros((len(spans), robot.action_dim), np.float32)
    known = state is not None and len(state) == robot.state_dim and robot.state_dim > 0
    where = {part.name: part for part in robot.state}
    for k, (a, b) in enumerate(spans):
        start = spans[k - k % gaps][0]
        for part in robot.action:
            entry = action[:, part.slice]
            if part.rotation:
                now = where[part.moves] if known and not start and part.moves is not None else None
                before = None if now is None else rotations.read(now, state[now.slice])
                out[k, part.slice] = _turn(part, entry, start, b, before)
            elif part.kind == "delta":
                out[k, part.slice] = part.scale * along(robot, part, action[start:b]).sum(0)
            elif part.kind == "absolute":
                before = entry[start - 1] if start else entry[0]
                if not start and known and part.moves is not None:
                    before = state[where[part.moves].slice] / part.scale
                out[k, part.slice] = part.scale * (entry[b - 1] - before)
            else:
                low, high = commands(part)
                out[k, part.slice] = 2 * (entry[a:b] > (low + high) / 2).mean(0) - 1
    return out.reshape(len(spans) // gaps, gaps * robot.action_dim)


def _turn(part: Part, entry: np.ndarray, start: int, stop: int, before: np.ndarray | None) -> np.ndarray:
    """Entries (k,) of the turn over the steps from start to stop, less those of none. before: the rotation that an
    absolute part begins at, if it is none of its commands."""
    if part.kind == "delta":
        turn = rotations.composed(part, rotations.read(part, entry[start:stop]))[-1]
    else:
        before = rotations.read(part, entry[max(0, start - 1)]) if before is None else before
        turn = rotations.between(part, before, rotations.read(part, entry[stop - 1]))
    return part.scale * (rotations.tell(part, turn) - np.array(part.rest))


def entries_read(robot: Embodiment, *, maps: bool) -> list[int]:
    """Entries of the first state that `latent_actions` and, with `maps`, `pose_maps` look at."""
    names = {part.moves for part in robot.action if part.kind == "absolute"}
    names |= {name for tool in robot.tools if maps for name in (tool.position, tool.opening)}
    names |= {robot.turning(part)[0].moves for part in robot.action if part.turned_by and part.moves in names}
    return [entry for part in robot.state if part.name in names for entry in range(part.start, part.stop)]


def drawable(robot: Embodiment) -> bool:
    """Whether pose maps can be drawn: the embodiment has a tool and a view with a camera."""
    return bool(robot.tools) and any(view.camera is not None for view in robot.views)


def pose_maps(
    robot: Embodiment,
    rows: Int64[np.ndarray, " t"],
    action: Float[np.ndarray, "s a"],
    state: Float[np.ndarray, " d"],
    *,
    size: tuple[int, int],
    gaps: int,
    width: float = 0.75,
) -> Float32[np.ndarray, "c lt lh lw"]:
    """Where the embodiment's rule puts each gripper: 2 channels (a spot; the spot times the opening) per tool and gap.

    A spot is a Gaussian of `width` latent cells about the projected point; size: latent height and width. Latent frame
    0 shows the first state in all its gaps. Views without a camera stay empty.

    Raises ValueError if the first state is unknown or nothing can be drawn.
    """
    if not drawable(robot):
        raise ValueError(f"pose maps need a tool and a view with a camera; embodiment '{robot.name}' has "
                         f"{len(robot.tools)} tools and cameras for "
                         f"{[v.name for v in robot.views if v.camera is not None]}. Use maps=false.")  # fmt: skip
    if state.shape != (robot.state_dim,) or not np.isfinite(state).all():
        raise ValueError(f"pose maps need the first state ({robot.state_dim} numbers); got {state}. Give the prompt's "
                         "state, or use a model without maps.")  # fmt: skip
    poses = follow(robot, state, action)[0][rows]
    lt, (height, wide) = (len(rows) - 1) // gaps + 1, size
    cell_h, cell_w = height / len(robot.grid), wide / len(robot.grid[0])  # of a view, not always whole
    where = {part.name: part.slice for part in robot.state}
    frames = np.zeros((len(rows), 2 * len(robot.tools), height, wide), np.float32)
    for i, row in enumerate(robot.grid):
        for j, name in enumerate(row):
            camera = robot.view(name).camera if name else None
            if camera is None:
                continue
            (tall, ys), (broad, xs) = _cells(i, cell_h), _cells(j, cell_w)
            for n, tool in enumerate(robot.tools):
                place, depth = camera.project(poses[:, where[tool.position]] + np.array(tool.offset))
                far_y = (ys[None, :, None] - cell_h * place[:, 1, None, None]) ** 2
                far_x = (xs[None, None, :] - cell_w * place[:, 0, None, None]) ** 2
                spot = np.exp(-(far_y + far_x) / (2 * width**2)) * (depth > 0)[:, None, None]
                opening = poses[:, where[tool.opening]] if tool.opening else np.ones((len(rows), 1))
                frames[:, 2 * n, tall, broad] = spot
                frames[:, 2 * n + 1, tall, broad] = spot * opening[:, :, None]
    first = np.repeat(frames[:1], gaps, 0)[None]
    later = frames[1:].reshape(lt - 1, gaps, *frames.shape[1:])
    stacked = np.concatenate([first, later])  # lt gaps channels h w
    return np.ascontiguousarray(stacked.reshape(lt, -1, height, wide).transpose(1, 0, 2, 3))


def _cells(number: int, size: float) -> tuple[slice, Float[np.ndarray, " n"]]:
    """The latent cells along a side whose middles lie in view `number` of `size` cells, and their middles there."""
    start, stop = (int(np.ceil(edge * size - 0.5)) for edge in (number, number + 1))
    return slice(start, stop), np.arange(start, stop) + 0.5 - number * size
