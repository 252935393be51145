"""Stock tasks behind the same protocol: all 50 are named, experts work at 20 Hz, resets are exact."""

import itertools

import numpy as np
import pytest
from conftest import embodiment

from dreamgen.core.protocols import Sim
from dreamgen.sims.metaworld import INSTRUCTIONS, MetaWorld
from dreamgen.sims.tabletop.tasks import TASKS


def test_every_stock_task_has_its_own_instruction() -> None:
    from metaworld.env_dict import ENV_CLS_MAP

    assert len(INSTRUCTIONS) == 50 and set(INSTRUCTIONS.values()) == set(ENV_CLS_MAP)
    assert not set(INSTRUCTIONS) & set(TASKS)


def test_every_stock_task_begins() -> None:
    """Without pictures, which take longer: the scene compiles, the expert reads it, a step is taken."""
    sim = MetaWorld(robot=embodiment(("front", 24, 32)))
    for instruction in INSTRUCTIONS:
        sim.reset(instruction, 3)
        first, action = sim.state(), next(iter(sim.expert()))
        sim.step(action)
        assert first.shape == action.shape == (4,) and np.isfinite(sim.state()).all(), instruction
        assert not np.array_equal(first, sim.state()), instruction
    sim.close()


def test_experts_succeed_and_resets_are_exact(drawing: None) -> None:
    sim = MetaWorld(robot=embodiment(("front", 24, 32), ("wrist", 24, 32)))
    assert isinstance(sim, Sim)
    traces = []
    for instruction, seed in (("open the window", 3), ("move the hand to the goal", 3), ("open the window", 3)):
        sim.reset(instruction, seed)
        states, done = [sim.state()], False
        for action in itertools.islice(sim.expert(), 40):
            done = sim.step(action)
            states.append(sim.state())
        assert done, instruction
        assert np.array_equal(next(iter(itertools.islice(sim.expert(), 1, None)))[:3], np.zeros(3))
        traces.append((np.stack(states), sim.observe()))
    assert np.array_equal(traces[0][0], traces[2][0]) and traces[0][0].shape == (41, 4)
    views = [seen.views for _, seen in traces]
    assert views[0]["front"].shape == views[0]["wrist"].shape == (24, 32, 3)
    assert np.array_equal(views[0]["front"], views[2]["front"])
    assert not np.array_equal(views[0]["front"], views[1]["front"])
    sim.close()


def test_a_look_by_number_is_the_same_in_every_episode() -> None:
    for appearance, same in ((7, True), ("random", False)):
        sim = MetaWorld(robot=embodiment(("front", 8, 8)), instructions=["open the window"], appearance=appearance)
        looks = []
        for seed in (3, 4):
            sim.reset("open the window", seed)
            looks.append(sim._env.model.mat_rgba.copy())
        assert np.array_equal(*looks) == same
        sim.close()


def test_unknown_names() -> None:
    robot = embodiment(("front", 8, 8))
    with pytest.raises(ValueError, match="does not know"):
        MetaWorld(robot=robot, instructions=["fly"])
    with pytest.raises(ValueError, match="'random', 'stock' or an integer"):
        MetaWorld(robot=robot, appearance="pink")
    with pytest.raises(ValueError, match="does not know the instruction"):
        MetaWorld(robot=robot).reset("fly", 0)
