"""What a policy is given in a dream, beside what a simulator gives it, and episodes that begin in the middle."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from dreamgen.data.lerobot import Dataset
from dreamgen.sims.keyframes import FromKeyframe
from dreamgen.sims.rollout import replay, rollout
from dreamgen.stages.collect import collect
from dreamgen.worlds.env import DreamEnv, dream_episodes
from tests.stages.test_correlation import Column, oracle, prompt

sys.path.insert(0, str(Path(__file__).parents[1] / "sims"))
from point import ROBOT, Point, Walker  # noqa: E402


class Asked(Walker):
    """Keeps what it was shown."""

    def __init__(self) -> None:
        self.seen: list = []

    def act(self, observations, seeds):
        self.seen += observations
        return super().act(observations, seeds)


def test_an_unknown_state_stays_unknown() -> None:
    env, policy = DreamEnv(world=oracle(), judge=Column(), num_envs=2, steps=6, execute=3), Asked()
    photo = replace(prompt(seed=1), state=np.zeros(0, np.float32))
    dream_episodes(env, policy, [photo, prompt(seed=1)], [1, 1])
    states = np.array([seen.state[0] for seen in policy.seen]).reshape(2, 2)
    assert np.isnan(states[:, 0]).all() and states[0, 1] == -1 and states[1, 1] > -1


def test_parts_that_no_rule_moves_are_said_once(caplog) -> None:
    free = replace(ROBOT, action=(replace(ROBOT.action[0], moves=None),))
    world = oracle()
    world.robot = free
    env = DreamEnv(world=world, judge=Column(), num_envs=1, steps=6, execute=3)
    env.reset(options={"prompts": [replace(prompt(), state=np.zeros(0, np.float32))]})
    assert not caplog.records
    for _ in range(2):
        env.reset(options={"prompts": [prompt(seed=1)]})
        seen, *_ = env.step(np.full((1, 3, 1), 0.5))
        assert seen["state"][0, 0] == -1  # its first value
    assert [r.getMessage().count("state parts place") for r in caplog.records] == [1]
    assert "`moves`" in caplog.text and "`sets`" in caplog.text


class Remembering(Walker):
    """Twice as fast with every chunk of an episode, from what it remembers."""

    remembers = True

    def act(self, observations, seeds, memories=None, now=0):
        memories = [{} for _ in observations] if memories is None else memories
        for memory in memories:
            assert memory.get("now", now - 2) == now - 2
            memory.update(now=now, speed=2 * memory.get("speed", 0.02))
        return np.array([[[memory["speed"]]] * 3 for memory in memories], np.float32)


def test_a_policy_remembers_in_a_dream_as_in_the_simulator(tmp_path) -> None:
    plan = [("home", seed) for seed in (2, 4, 5)]
    real = list(rollout(Point, Remembering(), plan, steps=6, execute=2))
    env = DreamEnv(world=oracle(), judge=Column(), num_envs=2, steps=6, execute=2)
    dreams = dream_episodes(env, Remembering(), [prompt(*one) for one in plan], [seed for _, seed in plan])
    collect(Point, out=tmp_path, episodes=2, instructions=["home"], source="policy", policy=Remembering(), execute=2,
            rows=6, record={})  # fmt: skip
    recorded = [Dataset(tmp_path, ROBOT).episode(i).action for i in range(2)]
    for action in [e.action for e in real] + [d.past.action for d in dreams] + recorded:
        assert np.allclose(action[:, 0], [0.04, 0.04, 0.08, 0.08, 0.16, 0.16])


class Scenes(Point):
    """Lays out the scene of another instruction: one place further."""

    def reset(self, instruction, seed, *, scene_of=None):
        super().reset(instruction, seed)
        self.place -= (scene_of or instruction) == "away"

    def expert(self, instruction=None):
        while True:
            yield np.array([0.5 if (instruction or self.instruction) == "home" else -0.5], np.float32)


def test_another_instruction_in_the_middle_of_an_episode() -> None:
    sim = FromKeyframe(sim=Scenes, steps=2)
    sim.reset("away", 1)
    first = sim.state()
    assert first == -3
    assert replay(sim, "home", 1, np.full((8, 1), 0.5), scene_of="away") and sim.state() == 1
    sim.reset("home", 1, scene_of="away")
    assert sim.state() == first and sim.sim.instruction == "home"
