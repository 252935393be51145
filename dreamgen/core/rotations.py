"""Rotations, however a part tells them: read, composed, averaged and compared on SO(3), and told again.

In between they are unit quaternions (... 4), w first, in double precision; q and -q are one rotation. A part tells

    axis_angle             the rotation vector: axis times angle
    euler_xyz              roll, pitch, yaw about the fixed axes x, y, z: R = Rz Ry Rx (ROS, DROID, Bridge, scipy "xyz")
    euler_xyz_intrinsic    the same about the turning axes: R = Rx Ry Rz (PyTorch3D and scipy "XYZ")
    quaternion_xyzw, quaternion_wxyz
    rot6d, rot6d_columns   the first two rows (PyTorch3D, UMI), or columns (Zhou et al. 2019), of the matrix

and a turn D of a part in the frame "tool" makes R D of a rotation R, in any other frame D R.

Every function takes numpy arrays or tensors, and gives what it was given.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dreamgen.core.part import Part

TURN = 2 * math.pi
SAME = 1e-6  # radians: rotations that are no further apart are one, but for rounding


def _either(function: Callable) -> Callable:
    """`function` of tensors, for numpy arrays too."""

    @functools.wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        if any(isinstance(x, Tensor) for x in (*given, *named.values())):
            return function(*given, **named)
        known = [torch.from_numpy(np.array(x, np.float64)) if isinstance(x, np.ndarray) else x for x in given]
        more = {key: torch.from_numpy(np.array(x, np.float64)) if isinstance(x, np.ndarray) else x
                for key, x in named.items()}  # fmt: skip
        return function(*known, **more).numpy()

    return call


def _exact(x: Tensor) -> Tensor:
    """In double precision, where the device has it."""
    return x.float() if x.device.type == "mps" else x.double()


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def _product(a: Tensor, b: Tensor) -> Tensor:
    aw, ax, ay, az = a.unbind(-1)
    bw, bx, by, bz = b.unbind(-1)
    return torch.stack([aw * bw - ax * bx - ay * by - az * bz, aw * bx + ax * bw + ay * bz - az * by,
                        aw * by - ax * bz + ay * bw + az * bx, aw * bz + ax * by - ay * bx + az * bw], -1)  # fmt: skip


def _inverse(q: Tensor) -> Tensor:
    return q * q.new_tensor([1.0, -1.0, -1.0, -1.0])


def _exp(vector: Tensor) -> Tensor:
    half = vector.norm(dim=-1, keepdim=True) / 2
    return torch.cat([half.cos(), vector / 2 * torch.sinc(half / math.pi)], -1)


def _log(q: Tensor) -> Tensor:
    q = torch.where(q[..., :1] < 0, -q, q)
    size, w = q[..., 1:].norm(dim=-1, keepdim=True), q[..., :1]
    small = size < 1e-7  # there the angle is twice the sine of its half
    return q[..., 1:] * torch.where(small, 2 / w, 2 * torch.atan2(size, w) / torch.where(small, 1.0, size))


def _matrix(q: Tensor) -> Tensor:
    w, x, y, z = q.unbind(-1)
    rows = [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
            2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
            2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]  # fmt: skip
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def _of_matrix(m: Tensor) -> Tensor:
    """By the largest of the four entries, which loses nothing (Shepperd 1978)."""
    a, b, c = (m[..., i, i] for i in range(3))
    x, y, z = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    xy, xz, yz = m[..., 1, 0] + m[..., 0, 1], m[..., 0, 2] + m[..., 2, 0], m[..., 2, 1] + m[..., 1, 2]
    rows = torch.stack([torch.stack(row, -1) for row in (
        (1 + a + b + c, x, y, z), (x, 1 + a - b - c, xy, xz), (y, xy, 1 - a + b - c, yz), (z, xz, yz, 1 - a - b + c),
    )], -2)  # fmt: skip
    best = rows.diagonal(dim1=-2, dim2=-1).argmax(-1)
    return _unit(rows.take_along_dim(best[..., None, None], -2).squeeze(-2))


def _of_pair(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """From two rows (dim -2) or columns (-1), made orthonormal by Gram and Schmidt."""
    first = _unit(first)
    second = _unit(second - (first * second).sum(-1, keepdim=True) * first)
    return _of_matrix(torch.stack([first, second, torch.linalg.cross(first, second)], dim))


def _of_euler(angles: Tensor) -> Tensor:
    x, y, z = (_exp(angles[..., k : k + 1] * torch.eye(3, dtype=angles.dtype, device=angles.device)[k])
               for k in range(3))  # fmt: skip
    return _product(z, _product(y, x))


def _euler(q: Tensor) -> Tensor:
    """Pitch within a quarter turn; where it is one, roll and yaw turn about one axis and yaw is 0."""
    m = _matrix(q)
    level = torch.hypot(m[..., 0, 0], m[..., 1, 0])
    locked = level < 1e-7
    roll = torch.where(locked, torch.atan2(-m[..., 1, 2], m[..., 1, 1]), torch.atan2(m[..., 2, 1], m[..., 2, 2]))
    yaw = torch.where(locked, 0.0, torch.atan2(m[..., 1, 0], m[..., 0, 0]))
    return torch.stack([roll, torch.atan2(-m[..., 2, 0], level), yaw], -1)


def _read(part: Part, values: Tensor) -> Tensor:
    """(... 4) that a part's entries (... width) tell."""
    values = _exact(values) * part.radians
    match part.rotation:
        case "axis_angle":
            return _exp(values)
        case "euler_xyz":
            return _of_euler(values)
        case "euler_xyz_intrinsic":  # the transpose of the other, of opposite angles
            return _inverse(_of_euler(-values))
        case "quaternion_xyzw":
            return _whole(values.roll(1, -1))
        case "quaternion_wxyz":
            return _whole(values)
        case "rot6d":
            return _of_pair(values[..., :3], values[..., 3:], -2)
        case "rot6d_columns":
            return _of_pair(values[..., :3], values[..., 3:], -1)
    raise ValueError(f"part '{part.name}' is no rotation")


def _whole(q: Tensor) -> Tensor:
    """Of unit size; what has none is no turn."""
    none = q.norm(dim=-1, keepdim=True) < 1e-12
    return _unit(torch.where(none, q.new_tensor([1.0, 0.0, 0.0, 0.0]), q))


def _tell(part: Part, q: Tensor, *, signed: bool = False) -> Tensor:  # signed: q as it is, else of w >= 0
    match part.rotation:
        case "axis_angle":
            told = _log(q)
        case "euler_xyz":
            told = _euler(q)
        case "euler_xyz_intrinsic":
            told = -_euler(_inverse(q))
        case "rot6d":
            told = _matrix(q)[..., :2, :].flatten(-2)
        case "rot6d_columns":
            told = _matrix(q)[..., :, :2].mT.flatten(-2)
        case _:
            q = q if signed else torch.where(q[..., :1] < 0, -q, q)
            told = q if part.rotation == "quaternion_wxyz" else q.roll(-1, -1)
    return told / part.radians


def _nearest(part: Part, values: Tensor, near: Tensor) -> Tensor:
    """Entries of the same rotations that lie nearest to `near`."""
    values, near = _exact(values) * part.radians, _exact(near) * part.radians
    if part.width == 4:
        values = torch.where((values * near).sum(-1, keepdim=True) < 0, -values, values)
    elif part.rotation == "axis_angle":
        size = values.norm(dim=-1, keepdim=True)
        axis = values / size.clamp(min=1e-9)
        turns = (((axis * near).sum(-1, keepdim=True) - size) / TURN).round()
        values = torch.where(size < 1e-9, values, values + TURN * turns * axis)
    elif part.width == 3:
        other = values * values.new_tensor([1.0, -1.0, 1.0]) + math.pi  # the same rotation by way of the pole
        ways = torch.stack([values, other])
        ways = ways + TURN * ((near - ways) / TURN).round()
        apart = (ways - near).square().sum(-1, keepdim=True)
        values = torch.where(apart[1] < apart[0], ways[1], ways[0])
    return values / part.radians


read = _either(_read)
tell = _either(_tell)
nearest = _either(_nearest)
exp, log, inverse, product = _either(_exp), _either(_log), _either(_inverse), _either(_product)


@_either
def rotate(q: Tensor, vector: Tensor) -> Tensor:
    """Vectors (... 3), turned by rotations q (... 4)."""
    vector = vector.to(q)
    across = 2 * torch.linalg.cross(q[..., 1:], vector)
    return vector + q[..., :1] * across + torch.linalg.cross(q[..., 1:], across)


@_either
def angle(a: Tensor, b: Tensor) -> Tensor:
    """Radians (...) by which two rotations differ, 0 to pi."""
    return _log(_product(_inverse(a), b)).norm(dim=-1)


@_either
def mean(q: Tensor, weight: Tensor | None = None) -> Tensor:
    """The rotation (4,) whose matrix is nearest to those of q (n 4), weighted by (n,) (Markley et al. 2007)."""
    weight = torch.ones_like(q[:, 0]) if weight is None else weight
    return principal(torch.einsum("n,ni,nj->ij", weight.to(q), q, q))


@_either
def principal(moments: Tensor) -> Tensor:
    """The mean rotations (... 4) of weighted sums (... 4 4) of q q^T."""
    return torch.linalg.eigh(moments)[1][..., -1]


def turned(part: Part, start: Any, turn: Any) -> Any:
    """The rotation that a turn makes of `start`."""
    return product(start, turn) if part.frame == "tool" else product(turn, start)


def between(part: Part, start: Any, stop: Any) -> Any:
    """The turn that makes `stop` of `start`."""
    return product(inverse(start), stop) if part.frame == "tool" else product(stop, inverse(start))


def composed(part: Part, turns: Any) -> Any:
    """All turns (... s 4) up to each, as one each."""
    return _composed(turns, part.frame == "tool")


@_either
def before(part: Part, turns: Tensor) -> Tensor:
    """All turns (... s 4) before each, as one each: none before the first."""
    none = torch.zeros_like(turns[..., :1, :])
    none[..., 0] = 1
    return torch.cat([none, composed(part, turns[..., :-1, :])], -2)


@_either
def _composed(turns: Tensor, tool: bool) -> Tensor:
    by = 1
    while by < turns.shape[-2]:  # each takes in what those `by` steps before have taken in (Hillis and Steele 1986)
        early, late = turns[..., :-by, :], turns[..., by:, :]
        both = _product(early, late) if tool else _product(late, early)
        turns, by = torch.cat([turns[..., :by, :], both], -2), 2 * by
    return _unit(turns)


@_either
def entries(part: Part, q: Tensor, like: Tensor) -> Tensor:
    """What the part tells of q (... 4): angles within half a turn; quaternions of the sign of `like` (... width); and
    `like` itself where that is what it tells."""
    told = _tell(part, q)
    told = _nearest(part, told, like) if part.width == 4 else told
    same = _log(_product(_inverse(_read(part, like)), q)).norm(dim=-1, keepdim=True) < SAME
    return torch.where(same, _exact(like), told)


@_either
def continued(part: Part, values: Tensor, near: Tensor) -> Tensor:
    """Entries (... s width) of the same rotations, the first nearest to `near` (... width), each other to the one
    before it: without wraps and changes of sign."""
    values = _exact(values)
    if part.width == 4:
        before = torch.cat([_exact(near).expand_as(values[..., :1, :]), values[..., :-1, :]], -2)
        turns = torch.where((values * before).sum(-1, keepdim=True) < 0, -1.0, 1.0).to(values)
        return values * turns.cumprod(-2)
    if part.width == 6:
        return values
    found = [near]
    for step in range(values.shape[-2]):
        found.append(_nearest(part, values[..., step, :], found[-1]))
    return torch.stack(found[1:], -2) if len(found) > 1 else values


def apart(part: Part, a: Any, b: Any) -> Any:
    """Angle (...) between the rotations that entries a and b (... width) tell, in the part's unit (else rad)."""
    return angle(read(part, a), read(part, b)) / part.radians


def vectors(part: Part, values: Any, origin: Any = None) -> Any:
    """Rotation vectors (... 3) from the rotation `origin` (4,), that of no turn by default, to those that entries
    (... width) tell, in the part's unit (else rad)."""
    q = read(part, values)
    return log(q if origin is None else product(inverse(origin), q)) / part.radians


def along(part: Part, at: Sequence[int] | np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Entries (n width) at the times `wanted` (n,), by constant turns between those (k width) at the times `at` (k,),
    held before the first and after the last."""
    at, q = np.asarray(at, np.float64), read(part, values)
    if len(at) < 2:
        return np.repeat(values[:1], len(wanted), 0)
    left = np.clip(np.searchsorted(at, wanted, side="right") - 1, 0, len(at) - 2)
    share = np.clip((wanted - at[left]) / (at[left + 1] - at[left]), 0, 1)
    turn = log(product(inverse(q[left]), q[left + 1]))
    closest = values[np.where(share < 0.5, left, left + 1)]
    return entries(part, product(q[left], exp(share[:, None] * turn)), closest)


def middle(part: Part, values: np.ndarray) -> np.ndarray:
    """Entries (width,) of the mean rotation of (n width); of a quaternion of the sign that most of them have."""
    told = tell(part, mean(read(part, values)))
    return nearest(part, told, values.mean(0, dtype=np.float64)) if part.width == 4 else told


def straightened(parts: Sequence[Part], rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Rows (s k) of each episode, rotations told by the entries nearest to those of their mean: what a straight line
    between two of them means is then a rotation between them."""
    if not any(part.rotation for part in parts):
        return list(rows)
    made = [np.array(values) for values in rows]
    for part in parts:
        if part.rotation:
            near = middle(part, np.concatenate([values[:, part.slice] for values in rows]))
            for values in made:
                values[:, part.slice] = nearest(part, values[:, part.slice], near)
    return made
