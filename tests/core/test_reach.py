"""Commands bring a robot no further than it reaches: the embodiment's rule beside the simulated tabletop."""

from dataclasses import replace

import numpy as np
import pytest
from hydra.utils import instantiate

from dreamgen.core.embodiment import Embodiment, View
from dreamgen.core.kinematics import follow
from dreamgen.core.part import Part
from jobs.recipe import load


def test_the_rule_leads_where_the_tabletop_is_sent() -> None:
    pytest.importorskip("mujoco")
    cfg = load("collect", ["embodiment=tabletop_posed"])[0]
    sim = instantiate(cfg.sim, _convert_="all")()
    robot, rng = sim.robot, np.random.default_rng(3)
    drift = np.repeat(rng.choice([-0.7, 0.7], (5, 4)), 12, 0)  # twelve steps each: against all sides of the box
    action = (drift + rng.uniform(-0.6, 0.6, drift.shape)).clip(-1, 1).astype(np.float32)
    sim.reset("press the button", 5)
    start, measured, sent = sim.commanded, sim.state(), []
    for row in action:
        sim.step(row)
        sent.append(sim.commanded)
    sim.close()
    low, high = np.array(robot.state[0].reach)
    at_edge = np.isclose(sent, low) | np.isclose(sent, high)
    assert at_edge.any(0).all() and not at_edge.any(1).all() and np.ptp(sent, 0).min() > 0.15
    found = follow(robot, np.array([*start, measured[3]]), action)[0][1:, :3]
    np.testing.assert_allclose(found, sent, atol=1e-6)
    seen = follow(robot, measured, action)[0][1:, :3]  # what a recording knows of the start is off by some millimetres
    assert (np.abs(seen - sent) <= np.abs(measured[:3] - start) + 1e-6).all() and np.abs(
        measured[:3] - start
    ).max() < 0.02
    free = replace(robot, state=(replace(robot.state[0], reach=None), robot.state[1]))
    assert np.abs(follow(free, measured, action)[0][1:, :3] - sent).max() > 0.1


def test_a_reach_holds_each_entry_and_draws_nothing_in() -> None:
    hand, move = Part(name="hand", start=0, stop=2, reach=([0, 0], [1, 2])), Part(name="move", start=0, stop=2)
    view = View(name="eye", key="eye", height=8, width=8)
    robot = Embodiment(name="arm", robot_hz=10, views=(view,), state=(hand,), action=(move,))
    steps = np.array([[0.75, 0.75], [0.75, 0.75], [-0.25, 1.0]])
    by_steps = replace(robot, action=(replace(move, kind="delta", moves="hand"),))
    assert follow(by_steps, np.zeros(2), steps)[0].tolist() == [[0, 0], [0.75, 0.75], [1, 1.5], [0.75, 2]]
    assert follow(by_steps, np.array([1.5, 0]), steps)[0][:, 0].tolist() == [1.5, 1.5, 1.5, 1.25]  # begins beyond it
    by_place = replace(robot, action=(replace(move, moves="hand"),))
    assert follow(by_place, np.zeros(2), 2 * steps)[0][1:].tolist() == [[1, 1.5], [1, 1.5], [0, 2]]


@pytest.mark.parametrize("reach", [([0], [1]), ([0, 0, 0], [1, 1, 1]), ([0, 0],), ([0, 1], [1, 1]), ([0, 0], [1, -1])])
def test_a_wrong_reach_is_refused(reach) -> None:
    with pytest.raises(ValueError, match="part 'hand' has the reach .*lowest and the highest value of each of its 2"):
        Part(name="hand", start=0, stop=2, reach=reach)


@pytest.mark.parametrize("limits", [(1, -1), (0, 0), (1,), (-1, 0, 1), (0, float("nan"))])
def test_limits_are_the_lowest_and_the_highest_value(limits) -> None:
    """Swapped, a command would be its opposite."""
    with pytest.raises(ValueError, match=r"part 'grip' has the limits \[.*\]; expected .* .low, high."):
        Part(name="grip", start=0, stop=1, kind="binary", limits=limits)


def test_a_rotation_has_no_reach() -> None:
    with pytest.raises(ValueError, match="of no rotation"):
        Part(name="wrist", start=0, stop=3, rotation="axis_angle", reach=([0, 0, 0], [1, 1, 1]))
