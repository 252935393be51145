"""Rotations by the names of their entries, where these tell: roll, pitch, yaw; qx, qy, qz, qw; rx, ry, rz."""

import re
from collections.abc import Sequence

ASK_EULER = "if its angles are about the turning axes, not about fixed ones, say euler_xyz_intrinsic"
ASK_VECTOR = "a rotation vector by its names; if these are roll, pitch and yaw, say euler_xyz"
# endings of the entries in order, how they tell a rotation, and what to check
NAMES = (
    (("roll", "pitch", "yaw"), "euler_xyz", ASK_EULER),
    *((tuple(f"{word}{axis}" for axis in "xyzw"), "quaternion_xyzw", "") for word in ("q", "quat_", "r", "rot_")),
    *((tuple(f"{word}{axis}" for axis in "wxyz"), "quaternion_wxyz", "") for word in ("q", "quat_", "r", "rot_")),
    *((tuple(f"{word}{axis}" for axis in "xyz"), "axis_angle", ASK_VECTOR) for word in ("r", "rot_", "rotation_")),
    *((tuple(f"{word}{axis}" for axis in "xyz"), "axis_angle", "") for word in ("rotvec_", "axis_angle_")),
    *((tuple(f"{word}{k}" for k in range(first, first + 3)), "axis_angle", "")
      for word in ("rotvec_", "axis_angle_", "axis_angle") for first in (0, 1)),
    *((tuple(f"{word}{k}" for k in range(first, first + 6)), "rot6d", "if these are columns of the matrix, say "
       "rot6d_columns") for word in ("rot6d_", "rot_6d_", "rotation_6d_", "r6d_") for first in (0, 1)),
)  # fmt: skip
# of what: a hand's pose. Joints are called roll, pitch and yaw too, and are no rotation
OF = {"", "action", "arm", "base", "cartesian", "delta", "ee", "eef", "effector", "end", "euler", "flange", "gripper",
      "hand", "left", "orientation", "pose", "quat", "right", "robot", "robot0", "robot1", "rotation", "rpy", "state",
      "target", "tcp", "tool", "world"}  # fmt: skip
GROOT = {"axis_angle": ("axis_angle", ""),
         "quaternion": ("quaternion_wxyz", "if its w comes last, say quaternion_xyzw"),
         "rotation_6d": ("rot6d", ""), "euler_angles_rpy": ("euler_xyz_intrinsic", "GR00T turns it about the turning "
         "axes; if the robot means fixed ones (R = Rz Ry Rx), say euler_xyz")}  # fmt: skip


def rotation_at(names: Sequence[str], start: int) -> tuple[str, int, str, str] | None:
    """The rotation that the entries from `start` on are by their names: what it is of ("" if they do not say), how many
    entries it has, how they tell it, what to check; None if they are none."""
    plain = [re.sub(r"\W+", "_", name.lower()) for name in names[start : start + 6]]
    for endings, rotation, ask in NAMES:
        found = plain[: len(endings)]
        of = {name.removesuffix(end) for name, end in zip(found, endings, strict=False) if name.endswith(end)}
        whole = len(found) == len(endings) and all(map(str.endswith, found, endings)) and len(of) == 1
        if whole and set((words := of.pop()).strip("_").split("_")) <= OF and words[-1:] in ("", "_"):
            return words.strip("_"), len(endings), rotation, ask
    return None
