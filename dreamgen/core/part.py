"""A named slice of a robot's state or action: what its numbers are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["absolute", "delta", "binary"]
KINDS = ("absolute", "delta", "binary")
ROTATIONS = {
    "axis_angle": 3,
    "euler_xyz": 3,
    "euler_xyz_intrinsic": 3,
    "quaternion_xyzw": 4,
    "quaternion_wxyz": 4,
    "rot6d": 6,
    "rot6d_columns": 6,
}  # how a rotation is told, and in how many entries
ANGLES = {"rad": 1.0, "deg": math.pi / 180}  # radians of one


@dataclass(frozen=True, kw_only=True)
class Part:
    """A named slice of the state or action vector.

    kind: `absolute` (a position; interpolated in time), `delta` (a displacement for one robot step; composed in
        time), `binary` (an open / close command; voted in time).
    unit: of one entry, e.g. "m", "rad", "1"; `scale` converts an action entry into the unit of the state part that
        it moves.
    rotation: how the part tells a rotation, if it is one (see `dreamgen.core.rotations`). Angles are in the unit rad
        or deg; in any other, `scale` gives the radians of an entry.
    frame: that it is told in. A delta rotation D in the frame "tool" makes R D of the rotation R, in any other D R.
    turned_by: for a displacement in the frame "tool", along the hand's own axes: the delta rotation of the action, in
        that frame too, that turns these axes. A step goes along the axes that the hand has before it: T [D, d] of a
        pose T.
    moves: for an action part, the state part that it changes (delta: adds to; absolute, binary: sets); None if none.
        Both are rotations or neither is, told as each likes. Other deltas add up entry by entry, but for those that
        are `turned_by` another part: give none to those of another frame than the state's.
    limits: lowest and highest value of any entry, if known; of a binary action part the two values of its command.
    positive: what high values do, in a word, where the sign is a convention: a gripper `closes` or `opens`.
    sets: for a binary action part, what its low and its high command make of the state part that it moves, and
        `travel`, the seconds that the whole way takes.
    reach: for a state part, the lowest and the highest value of each entry that commands can bring it to, if known,
        ([...], [...]): a robot whose controller keeps its hand inside a box.
    """

    name: str
    start: int
    stop: int
    kind: Kind = "absolute"
    unit: str = "1"
    rotation: str = ""
    frame: str = "base"
    turned_by: str | None = None
    moves: str | None = None
    scale: float = 1.0
    limits: Sequence[float | int] | None = None
    positive: str = ""
    sets: Sequence[float | int] | None = None
    travel: float = 0.0
    reach: Sequence[Sequence[float | int]] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"part '{self.name}' has kind '{self.kind}'; expected one of {', '.join(KINDS)}")
        if not 0 <= self.start < self.stop:
            raise ValueError(f"part '{self.name}' covers [{self.start}, {self.stop}); expected 0 <= start < stop")
        if self.rotation and (self.rotation not in ROTATIONS or self.kind == "binary"):
            raise ValueError(f"{self.kind} part '{self.name}' has the rotation '{self.rotation}'; expected one of "
                             f"{', '.join(ROTATIONS)}, of an absolute or delta part, or none")  # fmt: skip
        if self.rotation and self.width != (wide := ROTATIONS[self.rotation]):
            raise ValueError(f"part '{self.name}' covers {self.width} entries; its rotation '{self.rotation}' has "
                             f"{wide}: make it a part of its own, from its first entry to its last")  # fmt: skip
        if self.rotation and self.width > 3 and self.scale != 1:
            raise ValueError(f"part '{self.name}' has the scale {self.scale:g}; the entries of a '{self.rotation}' are "
                             f"no angles and have none: leave it out")  # fmt: skip
        if self.limits is not None:
            limits = tuple(map(float, self.limits))
            if len(limits) != 2 or not limits[0] < limits[1]:
                raise ValueError(f"part '{self.name}' has the limits {list(self.limits)}; expected the lowest and the "
                                 f"highest value, [low, high]; what high values do is said by `positive`")  # fmt: skip
            object.__setattr__(self, "limits", limits)
        if self.sets is not None:
            object.__setattr__(self, "sets", (float(self.sets[0]), float(self.sets[1])))
        if self.reach is not None:
            reach = tuple(tuple(map(float, side)) for side in self.reach)
            fits = len(reach) == 2 and {len(side) for side in reach} == {self.width} and not self.rotation
            if not fits or any(low >= high for low, high in zip(*reach, strict=True)):
                raise ValueError(f"part '{self.name}' has the reach {self.reach}; expected the lowest and the "
                                 f"highest value of each of its {self.width} entries, of no rotation")  # fmt: skip
            object.__setattr__(self, "reach", reach)

    @property
    def width(self) -> int:
        """Number of entries."""
        return self.stop - self.start

    @property
    def slice(self) -> slice:
        """Where the part lies in its vector."""
        return slice(self.start, self.stop)

    @property
    def radians(self) -> float:
        """Radians of an entry of a rotation, 1 where it is no angle."""
        return ANGLES.get(self.unit, self.scale) if self.rotation and self.width == 3 else 1.0

    @property
    def rest(self) -> tuple[float, ...]:
        """The delta that moves nothing."""
        if self.rotation.startswith("rot6d"):
            return (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
        if self.rotation.startswith("quaternion"):
            return tuple(float(name == "w") for name in self.rotation.removeprefix("quaternion_"))
        return (0.0,) * self.width

    def require_moves(self, moved: "Part") -> None:
        """Raise ValueError unless this action part can move that state part: both rotations or both equally wide, and
        angles of a scale that fits both units."""
        name = f"action part '{self.name}'"
        if bool(self.rotation) != bool(moved.rotation):
            raise ValueError(f"of {name} and '{moved.name}', which it moves, one is a rotation: '{self.rotation}' and "
                             f"'{moved.rotation}'; say it of both")  # fmt: skip
        if not self.rotation and moved.width != self.width:
            raise ValueError(f"{name} is {self.width} wide and moves '{moved.name}', which is {moved.width} wide; they "
                             f"must agree")  # fmt: skip
        if self.rotation and self.kind == "delta" and self.frame not in ("tool", moved.frame):
            raise ValueError(f"{name} is a delta rotation in the frame '{self.frame}'; expected 'tool' (R D), or "
                             f"'{moved.frame}', that of '{moved.name}' (D R)")  # fmt: skip
        if self.rotation and self.width == 3 and self.unit not in ANGLES and moved.radians != 1:
            raise ValueError(f"{name} moves '{moved.name}' in {moved.unit} and has the unit '{self.unit}', whose scale "
                             f"is to radians; give it the unit rad or deg, or '{moved.name}' rad")  # fmt: skip
        wanted = self.radians / moved.radians
        if self.rotation and self.width == 3 and abs(self.scale / wanted - 1) > 1e-3:
            raise ValueError(f"{name} in {self.unit} has the scale {self.scale:g} to '{moved.name}' in {moved.unit}; "
                             f"expected {wanted:.6g}")  # fmt: skip
