"""One tabletop for all tests: it compiles in seconds and every reset starts it anew."""

import os

import pytest

from dreamgen.core.embodiment import Embodiment, Part, View
from dreamgen.sims.tabletop import Tabletop


def embodiment(*views: tuple[str, int, int]) -> Embodiment:
    """The tabletop's robot, seen by these (camera, height, width)."""
    return Embodiment(
        name="tabletop", robot_hz=20,
        views=tuple(View(name=name, key=f"observation.images.{name}", height=h, width=w) for name, h, w in views),
        state=(Part(name="hand_position", start=0, stop=3, unit="m"), Part(name="gripper_opening", start=3, stop=4)),
        action=(Part(name="translation", start=0, stop=3, kind="delta", scale=0.04, moves="hand_position"),
                Part(name="gripper", start=3, stop=4, kind="binary", moves="gripper_opening", limits=(-1, 1))),
    )  # fmt: skip


@pytest.fixture(scope="session")
def tabletop():
    sim = Tabletop(robot=embodiment(("front", 48, 48), ("wrist", 48, 48)))
    yield sim
    sim.close()


@pytest.fixture(scope="session")
def drawing() -> None:
    """Skips what needs pictures where nothing can be drawn."""
    if os.environ.get("MUJOCO_GL") == "off":
        pytest.skip("neither libegl1 nor libosmesa6 is installed")
