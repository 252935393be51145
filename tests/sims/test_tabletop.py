"""Resets, replays and pictures of the tabletop are exact; its looks are data."""

import colorsys
import itertools
import math

import numpy as np
import pytest
from conftest import embodiment

from dreamgen.core.embodiment import Embodiment, Part, View
from dreamgen.core.protocols import Sim
from dreamgen.sims.renderer import Renderer, project
from dreamgen.sims.tabletop import Appearance, Tabletop
from dreamgen.sims.tabletop.appearance import APART, NAMED
from dreamgen.video.tiling import tile, untile


def trace(sim: Tabletop, instruction: str, seed: int, steps: int = 25) -> np.ndarray:
    """Joint positions along an expert's episode."""
    sim.reset(instruction, seed)
    rows = [sim.data.qpos.copy()]
    for action in itertools.islice(sim.expert(), steps):
        sim.step(action)
        rows.append(sim.data.qpos.copy())
    return np.stack(rows)


def test_protocol(tabletop: Tabletop) -> None:
    assert isinstance(tabletop, Sim)


def test_reset_and_replay_are_exact_whatever_came_before(tabletop: Tabletop) -> None:
    instruction = "put the red block in the drawer"
    first = trace(tabletop, instruction, 5)
    trace(tabletop, "press the button", 6, steps=9)
    again = trace(tabletop, instruction, 5)
    fresh = trace(Tabletop(robot=tabletop.robot, appearance=3), instruction, 5)  # looks change no physics
    assert np.array_equal(first, again) and np.array_equal(first, fresh)
    assert not np.array_equal(first[0], trace(tabletop, instruction, 6)[0])


def test_one_scene_under_another_instruction(tabletop: Tabletop) -> None:
    tabletop.reset("open the drawer", 8)
    before = tabletop.data.qpos.copy()
    tabletop.reset("lift the blue block", 8, scene_of="open the drawer")
    assert np.array_equal(before, tabletop.data.qpos) and tabletop.task.text == "lift the blue block"


def test_state_follows_the_action(tabletop: Tabletop) -> None:
    """An action of 0.5 along x moves the hand 0.5 * 0.04 m a step once it has caught up, and +1 closes."""
    tabletop.reset("press the button", 2)
    before = tabletop.state()
    for _ in range(6):
        tabletop.step(np.array([0.5, 0, 0, 1]))
    for _ in range(6):
        tabletop.step(np.array([0, 0, 0, 1]))
    after = tabletop.state()
    assert after[0] - before[0] == pytest.approx(6 * 0.5 * 0.04, abs=0.004)
    assert before[3] > 0.9 and after[3] < 0.1


def test_observation(tabletop: Tabletop, drawing: None) -> None:
    tabletop.reset("press the button", 4)
    seen = tabletop.observe()
    assert {name: view.shape for name, view in seen.views.items()} == {"front": (48, 48, 3), "wrist": (48, 48, 3)}
    assert all(view.std() > 10 for view in seen.views.values()) and seen.instruction == "press the button"
    assert np.array_equal(seen.state, tabletop.state())
    qpos = tabletop.data.qpos.copy()
    assert np.array_equal(tabletop.observe().views["front"], seen.views["front"])
    assert np.array_equal(qpos, tabletop.data.qpos)


def test_two_large_views_fill_a_canvas(drawing: None) -> None:
    sim = Tabletop(robot=embodiment(("front", 128, 128), ("side", 128, 128)))
    sim.reset("press the button", 4)
    views = {name: view[None] for name, view in sim.observe().views.items()}
    canvas = tile(sim.robot, views)
    assert canvas.shape == (1, *sim.robot.canvas, 3) and canvas[0].size == 2 * 128 * 128 * 3
    for name, view in untile(sim.robot, canvas).items():
        assert np.array_equal(view, views[name]) and view.std() > 10
    assert np.abs(views["front"].astype(int) - views["side"]).mean() > 5  # another place to look from
    sim.close()


@pytest.mark.parametrize("look", NAMED, ids=lambda look: look.name)
def test_blocks_are_drawn_where_they_project_and_six_pixels_wide(drawing: None, look: Appearance) -> None:
    sim = Tabletop(robot=embodiment(("front", 64, 64)), appearance=look.name)
    sim.reset("close the drawer", 3)
    picture = sim.observe().views["front"].astype(float)
    hue = np.apply_along_axis(lambda p: colorsys.rgb_to_hsv(*p / 255)[0], 2, picture)
    vivid = (picture.max(2) - picture.min(2)) > 90
    for colour, middle in (("green", 0.37), ("blue", 0.64)):
        rows, columns = np.nonzero(vivid & (abs(hue - middle) < 0.08))
        x, y = project(sim.block(colour)[None], sim.appearance.view("front"), sim.model.vis.global_.fovy)[0] * 64
        assert abs(columns.mean() + 0.5 - x) < 1.5 and abs(rows.mean() + 0.5 - y) < 2
        assert np.ptp(columns) + 1 >= 6
    sim.close()


def test_target_is_fixed_and_drawn_robots_are_never_close_to_it() -> None:
    target = Appearance.named("target")
    looks = [Appearance.drawn(seed) for seed in range(60)]
    assert Appearance.drawn(7) == looks[7] and len({look.arm for look in looks}) == 60
    assert min(look.distance(named) for look in looks for named in NAMED) > APART
    assert target.distance(target) == 0
    for look in looks:  # each block's own channel is clearly the strongest
        for channel, colour in enumerate((look.red, look.green, look.blue)):
            assert colour[channel] > max(c for i, c in enumerate(colour) if i != channel) + 0.2


def test_elsewhere_is_the_same_robot_with_its_camera_in_another_room() -> None:
    here, there = Appearance.named("target"), Appearance.named("elsewhere")
    same = ("arm", "hand", "fingers", "red", "green", "blue", "camera")
    assert all(getattr(here, name) == getattr(there, name) for name in same)
    other = ("table", "floor", "cabinet", "tray", "handle", "plate", "button", "button_base")
    assert min(math.dist(getattr(here, name), getattr(there, name)) for name in other) > 0.2
    # whatever must be told apart in the room can be
    assert min(math.dist(there.table, getattr(there, name)) for name in ("fingers", "plate", "handle", "arm")) > 0.3
    assert min(math.dist(getattr(there, b), t) for b in ("red", "green", "blue")
               for t in (there.table, there.cabinet, there.tray, there.plate)) > 0.42  # fmt: skip


def test_random_appearance_is_drawn_from_the_episode(drawing: None) -> None:
    sim = Tabletop(robot=embodiment(("front", 32, 40)), appearance="random")
    pictures = []
    for seed in (1, 2, 1):
        sim.reset("press the button", seed)
        pictures.append(sim.observe().views["front"])
    assert pictures[0].shape == (32, 40, 3)
    assert np.array_equal(pictures[0], pictures[2]) and not np.array_equal(pictures[0], pictures[1])
    sim.close()


@pytest.mark.parametrize(("options", "words"), [({"appearance": "pink"}, "target"),
                                                ({"instructions": ["fly"]}, "it knows")])  # fmt: skip
def test_unknown_names(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Tabletop(robot=embodiment(("front", 8, 8)), **options)


def test_unfit_robot_camera_and_action(tabletop: Tabletop) -> None:
    with pytest.raises(ValueError, match="no camera 'ceiling'"):
        Tabletop(robot=embodiment(("ceiling", 8, 8)))
    other = Embodiment(name="r", robot_hz=20, views=(View(name="front", key="k", height=8, width=8),),
                       action=(Part(name="p", start=0, stop=7),))  # fmt: skip
    with pytest.raises(ValueError, match="needs 4 action"):
        Tabletop(robot=other)
    with pytest.raises(ValueError, match="4 finite entries"):
        tabletop.step(np.array([0, 0, np.nan, 0]))


def test_missing_system_library_is_named(tabletop: Tabletop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "off")
    with pytest.raises(ValueError, match="libegl1.*libosmesa6"):
        Renderer(tabletop.model, 8, 8)
