"""The camera that the embodiment writes down is the one that the simulator draws with."""

import numpy as np
import pytest
from hydra.utils import instantiate

from dreamgen.core.camera import Camera
from jobs.recipe import load

pytest.importorskip("mujoco")


def test_the_posed_tabletop_projects_as_the_renderer_does() -> None:
    from dreamgen.sims.renderer import project
    from dreamgen.sims.tabletop.appearance import FOVY, Appearance

    robot = instantiate(load("collect", ["embodiment=tabletop_posed"])[0].embodiment, _convert_="all")
    points = np.random.default_rng(0).uniform((-0.2, 0.4, 0), (0.2, 0.8, 0.3), (50, 3))
    found, depth = robot.view("front").camera.project(points)
    assert np.allclose(found, project(points, Appearance.named("target").view("front"), FOVY), atol=1e-4)
    assert (depth > 0.5).all() and robot.tools[0].position == "hand_position"
    plain = instantiate(load("collect", [])[0].embodiment, _convert_="all")
    assert robot.mismatches(plain.contract()) == [] == plain.mismatches(robot.contract())


def test_a_camera_is_a_rotation() -> None:
    with pytest.raises(ValueError, match="no rotation"):
        Camera(focal=(1, 1), position=(0, 0, 0), rotation=(1, 0, 0, 0, 1, 0, 0, 1, 1))
    with pytest.raises(ValueError, match="position has 2 numbers"):
        Camera(focal=(1, 1), position=(0, 0), rotation=np.eye(3).ravel().tolist())
