"""A second robot beside the point of `test_policy_stages`: wider, faster, seen by two cameras, and told other things.

In each picture is a bright bar. Where the bar stands in the second camera's says the first action, in the first one's
the second; the third follows the instruction. So whoever mixes up cameras, bodies or units is far off.
"""

from collections.abc import Iterator

import numpy as np

from dreamgen.core.clip import Episode
from dreamgen.core.embodiment import Embodiment, Part, View

VIEWS = tuple(View(name=name, key=f"observation.images.{name}", height=16, width=32) for name in ("side", "top"))
HOIST = Embodiment(
    name="hoist", robot_hz="25", views=VIEWS, state=(Part(name="drum", start=0, stop=3, unit="rad"),),
    action=(Part(name="along", start=0, stop=1, unit="m"), Part(name="across", start=1, stop=2, unit="m"),
            Part(name="height", start=2, stop=3, unit="m")),
)  # fmt: skip
HEIGHTS = {"go left": 7.0, "go right": 9.0}


def bar(x: float) -> np.ndarray:
    """A picture (16 32 3) of a bar at x in [-4, 4]."""
    frame = np.zeros((16, 32, 3), np.uint8)
    column = int(round(16 + 3 * x))
    frame[:, max(0, column - 2) : column + 2] = 255
    return frame


def hoisted(n: int, seed: int, rows: int = 9) -> Iterator[Episode]:
    """Episodes in which nothing but the state changes."""
    rng = np.random.default_rng(seed)
    for k in range(n):
        top, side = rng.uniform(-3, 3, 2)
        text = list(HEIGHTS)[k % 2]
        action = np.tile([50 + 5 * top, -30 + 2 * side, HEIGHTS[text]], (rows, 1)).astype(np.float32)
        state = np.stack([np.arange(rows), np.arange(rows) ** 2, np.full(rows, 100.0)], 1).astype(np.float32)
        views = {"side": np.stack([bar(side)] * rows), "top": np.stack([bar(top)] * rows)}
        yield Episode(instruction=text, state=state, action=action, video=views, meta={"seed": k})
