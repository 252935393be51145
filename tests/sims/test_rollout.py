"""Closed loops and replays on a point whose answers are known."""

import numpy as np
import pytest
from point import ROBOT, Deadly, Loud, Point, Walker

from dreamgen.core.embodiment import Embodiment
from dreamgen.core.seeding import seed_for
from dreamgen.sims.rollout import GROUP, film, replay, rollout


def test_replay_and_film() -> None:
    sim, actions = Point(), np.full((4, 1), 0.5, np.float32)
    assert replay(sim, "home", 1, actions) and not replay(sim, "home", 2, actions)
    frames = film(sim, "home", 1, actions)["eye"]
    assert frames.shape == (5, 16, 24, 3)
    assert [int(np.argmax(frame[0, :, 0])) for frame in frames] == [10, 11, 12, 13, 14]


def alone(instruction: str, seed: int, steps: int, execute: int) -> tuple[bool, np.ndarray]:
    """One episode by hand, one simulator, one policy call a chunk."""
    sim, policy, done, actions = Point(), Walker(), False, []
    sim.reset(instruction, seed)
    for start in range(0, steps, execute):
        for action in policy.act([sim.observe()], [seed_for(seed, "chunk", start)])[0][: min(execute, steps - start)]:
            actions.append(action)
            if done := sim.step(action):
                return True, np.stack(actions)
    return done, np.stack(actions)


@pytest.mark.parametrize("workers", [1, 2])
def test_rollouts_equal_single_episodes_for_any_number_of_processes(workers: int) -> None:
    plan = [("home" if k % 4 else "away", 10 + k) for k in range(2 * GROUP + 3)]
    found = list(rollout(Point, Walker(), plan, steps=7, execute=2, workers=workers))
    assert [(r.instruction, r.seed) for r in found] == plan
    for result, (instruction, seed) in zip(found, plan, strict=True):
        success, actions = alone(instruction, seed, 7, 2)
        assert result.success == success and np.array_equal(result.action, actions)
        assert replay(Point(), instruction, seed, result.action) == success
    assert 0 < sum(r.success for r in found) < len(found)


class Placed(Walker):
    """Stands still until it was placed."""

    speed = 0.0

    def act(self, observations, seeds):
        return self.speed * super().act(observations, seeds)


def go(policy: Placed) -> None:
    policy.speed = 1.0


@pytest.mark.parametrize("workers", [1, 2])
def test_each_process_that_asks_a_policy_places_it(workers: int) -> None:
    plan, policy = [("home", 10 + k) for k in range(GROUP + 1)], Placed()
    want = list(rollout(Point, Walker(), plan, execute=2))
    found = list(rollout(Point, policy, plan, execute=2, workers=workers, place=go))
    assert all(np.array_equal(a.action, b.action) for a, b in zip(want, found, strict=True))
    assert policy.speed == (1.0 if workers == 1 else 0.0)  # it is sent as it is


def test_unfit_policies() -> None:
    with pytest.raises(ValueError, match="horizon is 3"):
        list(rollout(Point, Walker(), [("home", 1)], execute=4))
    policy = Walker()
    policy.robot = Embodiment(name="other", robot_hz=5, views=ROBOT.views, action=ROBOT.action, state=ROBOT.state)
    for plan, workers in (([("home", 1)], 1), ([("home", k) for k in range(GROUP + 1)], 2)):
        with pytest.raises(ValueError, match="made for another robot"):
            list(rollout(Point, policy, plan, execute=2, workers=workers))


def test_processes_end_quietly(capfd: pytest.CaptureFixture) -> None:
    plan = [("home", k) for k in range(GROUP + 1)]
    assert len(list(rollout(Loud, Walker(), plan, execute=2, workers=2))) == len(plan)
    assert capfd.readouterr().err == ""


def test_a_process_that_is_killed_ends_the_run() -> None:
    plan = [("home", k) for k in range(GROUP + 1)]
    with pytest.raises(ValueError, match="a worker process was killed, perhaps for memory.*fewer `workers`"):
        list(rollout(Deadly, Walker(), plan, execute=2, workers=2))
