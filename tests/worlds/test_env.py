"""Policies in a dream: tiny learned parts (an action-conditioned model, a judge, a flow policy); a server's."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dreamgen.core.clip import Prompt
from dreamgen.core.clock import Clock
from dreamgen.core.kinematics import follow
from dreamgen.filters.judge import VideoJudge
from dreamgen.policies.encoder import TinyEncoder
from dreamgen.policies.policy import FlowPolicy
from dreamgen.worlds.action import ActionWorld
from dreamgen.worlds.env import DreamEnv, dream_episodes
from dreamgen.worlds.prefix import PrefixWorld
from tests.serve import toy
from tests.worlds.conftest import pipeline_folder  # noqa: F401
from tests.worlds.test_action import disturbed, robot

TEXT = "open the drawer"


def encoder() -> TinyEncoder:
    return TinyEncoder(width=16, channels=(4, 8), halvings=2, keypoints=2, colours=2, patches=2, text_width=8,
                       buckets=31, length=4)  # fmt: skip


def prompts() -> list[Prompt]:
    rng = np.random.default_rng(3)
    known = np.array([0, 0.1, 0, 1], np.float32)
    return [Prompt(id=f"p{i}", image=rng.integers(0, 256, (32, 48, 3), np.uint8), instruction=text, seed=i, state=state)
            for i, (text, state) in enumerate([(TEXT, known), ("dance", known), (TEXT, known[:0])])]  # fmt: skip


def test_learned_parts_run_together(pipeline_folder) -> None:  # noqa: F811
    torch.manual_seed(0)
    base = PrefixWorld(robot=robot(), path=str(pipeline_folder), frames=9, steps=2, guidance=1.0, text_length=12,
                       precision="fp32")  # fmt: skip
    world = disturbed(ActionWorld(world=base, width=20, history=[0.2]))
    judge = VideoJudge(robot=robot(), encoder=encoder(), instructions=[TEXT], frames=3, layers=1, heads=2,
                       proprioception=["opening"])  # fmt: skip
    policy = FlowPolicy(robot=robot(), encoder=encoder(), horizon=8, layers=2, heads=2, head_width=8, draws=1).eval()
    rng = np.random.default_rng(0)
    judge.fit(rng.uniform(0, 1, (20, 1)).astype(np.float32))
    policy.fit(rng.normal(size=(20, 4)).astype(np.float32), rng.uniform(-1, 1, (20, 8, 4)).astype(np.float32))
    env = DreamEnv(world=world, judge=judge, num_envs=2, steps=16, execute=8)
    found = dream_episodes(env, policy, prompts(), [5, 6, 7])
    assert [np.isnan(e.probability) for e in found] == [False, True, False]
    for prompt, episode in zip(prompts(), found, strict=True):
        past = episode.past
        assert past.video.shape == (9, 32, 48, 3) and np.array_equal(past.video[0], prompt.image)
        assert past.action.shape == (16, 4) and np.abs(past.action).max() <= 1
        if len(prompt.state):
            np.testing.assert_allclose(past.state, follow(robot(), prompt.state, past.action)[0][-1], atol=1e-5)
        else:
            assert not len(past.state)
    (alone,) = dream_episodes(env, policy, prompts()[2:], [7])
    np.testing.assert_allclose(alone.past.action, found[2].past.action, atol=1e-2)
    other = replace(prompts()[2], state=np.zeros(4, np.float32))
    (zero,) = dream_episodes(env, policy, [other], [7])
    assert not np.allclose(zero.past.action, alone.past.action)  # unknown is not zero


class Still:
    """Nothing moves in this world."""

    robot, clock = toy.ROBOT, Clock(robot_hz="20", video_hz="10", frames=3)

    def imagine(self, pasts, actions):  # noqa: ANN001, ANN201
        return [np.repeat(p.video[-1:], len(a) // 2, 0) for p, a in zip(pasts, actions, strict=True)]


class Sure:
    threshold = 0.5

    def judge(self, clips):  # noqa: ANN001, ANN201
        return np.ones(len(clips))


def test_a_policy_behind_a_server_acts_in_a_dream() -> None:
    pytest.importorskip("websockets")
    from dreamgen.serve.clients import OpenpiPolicy
    from dreamgen.serve.openpi import OpenpiServer

    env = DreamEnv(world=Still(), judge=Sure(), num_envs=2, steps=8, execute=4)
    image = np.zeros((*toy.ROBOT.canvas, 3), np.uint8)
    known = [Prompt(id=f"p{i}", image=image, instruction="a", seed=i, state=np.full(3, -0.2 * (i + 1), np.float32))
             for i in range(3)]  # fmt: skip
    seeds = [97 * k for k in range(3)]
    with OpenpiServer(toy.Mean(), port=0) as server, OpenpiPolicy(server.address, robot=toy.ROBOT) as policy:
        found = dream_episodes(env, policy, known, seeds)
        for mine, local in zip(found, dream_episodes(env, toy.Mean(), known, seeds), strict=True):
            np.testing.assert_allclose(mine.past.action, local.past.action, atol=1e-6)
            assert mine.probability == 1 and len(mine.past.video) == 5
        with pytest.raises(ValueError, match="not finite numbers"):  # this policy cannot do without a state
            dream_episodes(env, policy, [replace(known[0], state=known[0].state[:0])], [0])


def test_what_a_dream_cannot_do_is_said() -> None:
    env = DreamEnv(world=Still(), judge=Sure(), num_envs=2, steps=8, execute=4)
    with pytest.raises(ValueError, match="step before reset"):
        env.step(np.zeros((2, 4, toy.ROBOT.action_dim), np.float32))
    with pytest.raises(ValueError, match="reset together"):
        env.reset(options={"prompts": [], "reset_mask": np.array([True, False])})
