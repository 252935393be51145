"""Every instruction is fulfilled by its own expert, in view and in time, and by nothing else."""

import itertools

import numpy as np
import pytest

from dreamgen.sims.renderer import project
from dreamgen.sims.rollout import replay
from dreamgen.sims.tabletop import Tabletop
from dreamgen.sims.tabletop.scene import TIP
from dreamgen.sims.tabletop.tasks import TASKS

STEPS = 36
SEEDS = range(5)


def run(sim: Tabletop, expert: str | None = None) -> tuple[np.ndarray, int | None]:
    """Actions (s 4) of an expert in the scene that was reset last, and the step at which it succeeded."""
    actions, when = [], None
    for step, action in zip(range(STEPS), sim.expert(expert), strict=False):
        actions.append(action)
        if sim.step(action) and when is None:
            when = step + 1
    return np.stack(actions), when


def test_instructions(tabletop: Tabletop) -> None:
    assert len(TASKS) == 14 and tuple(TASKS) == tabletop.instructions


@pytest.mark.parametrize("instruction", TASKS)
def test_experts_succeed_in_time_and_hold_still(tabletop: Tabletop, instruction: str) -> None:
    for seed in (11, 12):
        tabletop.reset(instruction, seed)
        actions, when = run(tabletop)
        assert when is not None and when <= 32, f"{instruction}, seed {seed}: succeeded at {when}"
        assert np.abs(actions).max() <= 1 and actions.dtype == np.float32
        moving = np.flatnonzero(np.abs(actions[:, :3]).max(1) > 0)
        assert moving[-1] < 32 and (actions[when:, 3] == actions[-1, 3]).all()
        assert np.abs(np.diff(actions[:, :3], axis=0)).max() <= 0.86  # no jumps but the stop


@pytest.mark.parametrize("instruction", TASKS)
def test_hand_and_fingers_stay_in_view(tabletop: Tabletop, instruction: str) -> None:
    tabletop.reset(instruction, 21)
    camera, fovy = tabletop.appearance.view("front"), tabletop.model.vis.global_.fovy
    for _, action in zip(range(STEPS), tabletop.expert(), strict=False):
        body = [tabletop.data.body(name).xpos for name in ("hand", "leftclaw", "rightclaw")]
        seen = project(np.stack([body[0], *(claw - [0, 0, TIP] for claw in body[1:])]), camera, fovy)
        assert seen.min() > 0.08 and seen.max() < 0.95, f"outside the picture: {seen}"
        tabletop.step(action)


@pytest.mark.parametrize("instruction", TASKS)
def test_nothing_else_succeeds(tabletop: Tabletop, instruction: str) -> None:
    """Zero actions, random actions and another task's expert, on 70 seeds in all."""
    others = itertools.cycle([text for text in TASKS if text != instruction])
    for k in SEEDS:
        seed = 100 + 7 * k + 31 * list(TASKS).index(instruction)
        assert not replay(tabletop, instruction, seed, np.tile(np.float32([0, 0, 0, 1 if k % 2 else -1]), (10, 1)))
        rng = np.random.default_rng(seed)
        noise = rng.uniform(-1, 1, (STEPS, 4))
        assert not replay(tabletop, instruction, seed, noise), f"random actions on seed {seed}"
        for other in itertools.islice(others, 1 + k % 2):
            tabletop.reset(instruction, seed)
            assert run(tabletop, other)[1] is None, f"the expert of '{other}' on seed {seed}"


def test_lift_is_not_met_on_the_way_to_the_plate(tabletop: Tabletop) -> None:
    for seed, carrying in itertools.product(range(3), ("put the red block on the plate",
                                                       "stack the red block on the green block")):  # fmt: skip
        tabletop.reset("lift the red block", seed)
        assert run(tabletop, carrying)[1] is None


def test_plate_needs_the_release(tabletop: Tabletop) -> None:
    instruction = "put the red block on the plate"
    tabletop.reset(instruction, 3)
    actions, when = run(tabletop)
    kept = actions.copy()
    kept[int(np.argmax(actions[:, 3] > 0)) :, 3] = 1.0  # never lets go
    assert when is not None and not replay(tabletop, instruction, 3, kept)


def test_actions_of_half_the_rate_and_inexact_ones_succeed(tabletop: Tabletop) -> None:
    """Labels come at the video's rate and with errors: the scene forgives both."""
    coarse, noisy = 0, 0
    for k, instruction in enumerate(TASKS):
        tabletop.reset(instruction, 30 + k)
        actions, _ = run(tabletop)
        halved = actions.reshape(-1, 2, 4).mean(1).repeat(2, 0)
        halved[:, 3] = np.where(halved[:, 3] > 0, 1, -1)
        coarse += replay(tabletop, instruction, 30 + k, halved)
        actions[:, :3] += np.random.default_rng(k).normal(0, 0.1, (STEPS, 3))
        noisy += replay(tabletop, instruction, 30 + k, actions)
    assert coarse >= 13 and noisy >= 11
