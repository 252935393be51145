"""Where points of the robot's world fall in a picture: pinhole cameras, and what of a robot is worth drawing.

A point p (m) is seen at u = focal * (right . (p - position)) / depth + centre, depth = forward . (p - position); u, v
are shares of the picture's width and height, so a camera is the same at every resolution.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True, kw_only=True)
class Camera:
    """One standing camera.

    focal: focal lengths as shares of the picture's width and height; centre: where the optical axis meets the picture.
    rotation: rows right, down, forward (3 x 3 or 9 numbers) in the frame of the robot's positions; position: m.
    """

    focal: Sequence[float | int]
    position: Sequence[float | int]
    rotation: Sequence[float | int]
    centre: Sequence[float | int] = (0.5, 0.5)

    def __post_init__(self) -> None:
        for name, count in (("focal", 2), ("position", 3), ("rotation", 9), ("centre", 2)):
            values = tuple(float(v) for v in np.ravel(getattr(self, name)))
            if len(values) != count:
                raise ValueError(f"a camera's {name} has {len(values)} numbers; expected {count}")
            object.__setattr__(self, name, values)
        rows = np.reshape(self.rotation, (3, 3))
        if np.abs(rows @ rows.T - np.eye(3)).max() > 1e-3:
            raise ValueError(f"a camera's rotation {self.rotation} is no rotation: its rows right, down, forward must "
                             "be unit vectors at right angles")  # fmt: skip

    def project(self, points: Float[np.ndarray, "*n 3"]) -> tuple[np.ndarray, np.ndarray]:
        """Places (*n 2) of points (m), x right and y down, inside is [0, 1]; and their depth (*n), m."""
        seen = (np.asarray(points, np.float64) - self.position) @ np.reshape(self.rotation, (3, 3)).T
        depth = seen[..., 2]
        return self.centre + self.focal * seen[..., :2] / np.maximum(depth, 1e-6)[..., None], depth


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A gripper to draw: the state parts of its position (3 entries, m) and, if it has one, of its opening (1 entry).

    offset: from that position to the point that is drawn, m.
    """

    position: str
    opening: str | None = None
    offset: Sequence[float | int] = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "offset", tuple(float(v) for v in self.offset))
