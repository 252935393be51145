from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import numpy as np
import pytest

from dreamgen.core.clip import Episode
from dreamgen.core.embodiment import Embodiment, Part, View
from tests.data.v2_files import write_v2

H, W = 40, 56


@pytest.fixture
def robot() -> Embodiment:
    """Two views, 5-d state, 4-d action, 20 Hz."""
    return Embodiment(
        name="twoview",
        robot_hz="20",
        views=tuple(View(name=n, key=f"observation.images.{n}", height=H, width=W) for n in ("front", "side")),
        state=(Part(name="pose", start=0, stop=3, unit="m"), Part(name="grip", start=3, stop=5)),
        action=(
            Part(name="move", start=0, stop=3, kind="delta", moves="pose", scale=0.04),
            Part(name="close", start=3, stop=4, kind="binary", limits=(-1, 1)),
        ),
    )


@pytest.fixture
def untyped() -> Iterator[None]:
    """Wrong types go in on purpose: the errors that users see are tested, not those of the type checker."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def make_episode() -> Callable[..., Episode]:
    """An episode whose pictures say which episode and row they are: level 30 i + 3 row (front), inverted (side)."""

    def make(i: int, rows: int | None = None, **change) -> Episode:
        rng = np.random.default_rng(i)
        rows = 7 + 2 * i if rows is None else rows
        level = (30 * i + 3 * np.arange(rows)).astype(np.uint8)
        front = np.broadcast_to(level[:, None, None, None], (rows, H, W, 3)).copy()
        action = rng.normal(size=(rows, 4)).astype(np.float32)
        if rows:
            action[:, 3] = np.sign(action[:, 3])
        values = {
            "instruction": f"push the block {i % 3}",
            "state": rng.normal(size=(rows, 5)).astype(np.float32),
            "action": action,
            "video": {"front": front, "side": 255 - front},
            "extra": {
                "label_spread": rng.uniform(size=(rows, 4)).astype(np.float32),
                "flag": rng.uniform(size=(rows, 1)) > 0.5,
            },
            "meta": {"source": "dream", "seed": i, "scores": {"video": 0.25 * i}},
        }
        return Episode(**values | change)

    return make


@pytest.fixture
def v2(tmp_path, robot, make_episode) -> tuple[Path, list[Episode]]:
    """A clean v2.1 dataset of three episodes, and these."""
    root, episodes = tmp_path / "v2", [make_episode(i) for i in range(3)]
    write_v2(root, robot, episodes)
    return root, episodes


@pytest.fixture
def make_episodes(make_episode) -> Callable[[int], Iterator[Episode]]:
    def make(n: int) -> Iterator[Episode]:
        return (make_episode(i) for i in range(n))

    return make
