"""A robot with two views and two parts on each side, and a policy whose answers can be computed by hand."""

from collections.abc import Sequence

import numpy as np

from dreamgen.core.clip import Observation
from dreamgen.core.embodiment import Embodiment, Part, View

H, W, D, A, STEPS = 16, 24, 3, 5, 4
ROBOT = Embodiment(
    name="toy", robot_hz="20",
    views=tuple(View(name=n, key=f"observation.images.{n}", height=H, width=W) for n in ("front", "wrist")),
    state=(Part(name="pose", start=0, stop=2, unit="m"), Part(name="grip", start=2, stop=D)),
    action=(Part(name="arm", start=0, stop=4, kind="delta", limits=(-1, 1)),
            Part(name="hand", start=4, stop=A, kind="binary", limits=(-1, 1))),
)  # fmt: skip


class Mean:
    """Row h, entry a: h + a / 10 + mean of each view + sum of the state + length of the instruction + seed."""

    robot, horizon = ROBOT, STEPS

    def act(self, observations: Sequence[Observation], seeds: Sequence[int]) -> np.ndarray:
        grid = np.arange(STEPS)[:, None] + np.arange(A) / 10
        rows = []
        for seen, seed in zip(observations, seeds, strict=True):
            for view in ROBOT.views:
                if seen.views[view.name].shape != (H, W, 3):
                    raise ValueError(f"view '{view.name}' is {seen.views[view.name].shape}; expected ({H}, {W}, 3)")
            if seen.instruction == "break":
                raise RuntimeError("a fault")
            if seen.instruction == "nan":
                grid = grid * np.nan
            rows.append(grid + sum(seen.views[v.name].mean() for v in ROBOT.views) + seen.state.sum()
                        + len(seen.instruction) + seed % 97)  # fmt: skip
        return np.stack(rows).astype(np.float32)


def observations(n: int) -> list[Observation]:
    rng = np.random.default_rng(7)
    return [Observation(views={v.name: rng.integers(0, 256, (H, W, 3), dtype=np.uint8) for v in ROBOT.views},
                        state=rng.normal(size=D).astype(np.float32), instruction="push" * (i + 1))
            for i in range(n)]  # fmt: skip
