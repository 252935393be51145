"""An action-conditioned dream chunk by chunk: how chunks join, what one is, and what is dreamt without actions."""

import numpy as np
import pytest
import torch

from dreamgen.core.clip import Observation, Past, Prompt, read_prompts
from dreamgen.core.clock import Clock
from dreamgen.core.kinematics import follow
from dreamgen.policies.encoder import TinyEncoder
from dreamgen.policies.policy import FlowPolicy
from dreamgen.worlds.action import ActionWorld
from dreamgen.worlds.alternatives import ActionPrompts
from dreamgen.worlds.rollout import extend, frame_rows, rollout
from tests.worlds.conftest import pipeline_folder  # noqa: F401
from tests.worlds.test_action import disturbed, make, prompts, robot  # noqa: F401


class Still:
    """Shows these first frames, one after another, and never moves."""

    robot, instructions = robot(), ("open the drawer",)

    def __init__(self, first: list[Prompt]) -> None:
        self.first, self.now = first, -1

    def reset(self, instruction: str, seed: int) -> None:
        self.now = (self.now + 1) % len(self.first)

    def observe(self) -> Observation:
        shown = self.first[self.now]
        return Observation(views={"front": shown.image}, state=shown.state, instruction=shown.instruction)

    def expert(self):
        return iter(self.first[self.now].action)

    def step(self, action: np.ndarray) -> bool:
        return False

    def close(self) -> None: ...


def test_a_rollout_joins_its_chunks(make):  # noqa: F811
    world = disturbed(make(guidance=1.0))
    given = prompts(steps=24)
    seen = []
    plain = world.world.dream

    def spied(asked):
        seen.append([(p.image.copy(), p.seed, world.world.clock.frames) for p in asked])
        return plain(asked)

    world.world.dream = spied
    pasts = extend(world, [Past.begin(p, 4) for p in given], [p.action for p in given])
    assert [row[0][2] for row in seen] == [9, 5] and world.clock.frames == 9
    for i, (prompt, past) in enumerate(zip(given, pasts, strict=True)):
        assert past.video.shape == (13, 32, 48, 3) and past.action.shape == (24, 4)
        assert np.array_equal(past.video[0], prompt.image) and np.array_equal(seen[1][i][0], past.video[8])
        assert np.allclose(past.state, follow(robot(), prompt.state, prompt.action)[0][-1], atol=1e-5)
    half = extend(world, [Past.begin(p, 4) for p in given], [p.action[:16] for p in given])
    whole = extend(world, half, [p.action[16:] for p in given])
    assert all(np.array_equal(a.video, b.video) for a, b in zip(whole, pasts, strict=True))
    with pytest.raises(ValueError, match="takes 8, 16, 24, 32, ... steps"):
        world.imagine(pasts, [p.action[:6] for p in given])
    with pytest.raises(ValueError, match="actions of 'p0': action part 'move' is 3"):
        world.imagine(pasts, [3 + 0 * p.action[:8] for p in given])
    world.world.dream = plain


def test_a_chunk_is_one_window(make):  # noqa: F811
    world = make().world
    world.windows = 2
    with pytest.raises(ValueError, match="windows is 2.*leave windows at 1"):
        ActionWorld(world=world)
    world.windows = 1
    for name in ("level", "context_noise", "action_dropout"):
        with pytest.raises(ValueError, match=f"{name} is -0.1; expected a number from 0 to 1"):
            ActionWorld(world=world, **{name: -0.1})
    with pytest.raises(ValueError, match="history is .0.4, -1.; expected ages in s, above 0"):
        ActionWorld(world=world, history=[0.4, -1])
    late = [Past.begin(p, 4) for p in prompts(steps=8)]
    with pytest.raises(AssertionError, match="one frame for each"):
        rollout(lambda pasts, _: [np.zeros((5, 32, 48, 3), np.uint8) for _ in pasts], robot(), world.clock, late,
                [p.prompt.action for p in late])  # fmt: skip


def test_memory_is_not_saved_by_windows(make, monkeypatch):  # noqa: F811
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    world = make()
    monkeypatch.setattr(world.world, "predict", full)
    with pytest.raises(ValueError, match="out of memory.*stage.world_model.frames=5, or stage.world_model.weights"):
        world.dream(prompts(count=1))


def test_without_actions_a_trained_transformer_dreams_as_it_was_trained(make):  # noqa: F811
    """With actions dropped: flags and memory say so, and no state is needed for the maps."""
    world, (a, _) = disturbed(make(instructions=False, action_guidance=2.0)), prompts()
    silent = Prompt(**{**vars(a), "action": np.zeros((0, 0), np.float32), "state": np.zeros(0, np.float32)})
    plain = world.world.dream([silent])[0].video
    assert np.array_equal(world.dream([silent])[0].video, plain)
    world.moved = True  # as `train_full` and `train_lora` say
    seen = []
    hooks = world.hooks[0]
    hooks.extension.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    found = world.dream([silent])[0]
    assert found.video.shape == plain.shape and (found.video[1:] != plain[1:]).any()
    assert np.array_equal(found.video[0], a.image) and found.video_hz == world.clock.video_hz
    assert not any(given.present.any() for given in seen) and len(seen) == world.world.steps * 1
    assert seen[0].memory.shape[2] == 2


def test_a_policy_acts_in_a_batch_of_dreams_as_in_each(make):  # noqa: F811
    """The same to the bit but for the rounding of larger products, which no picture here shows."""
    torch.manual_seed(5)
    encoder = TinyEncoder(width=20, channels=(6, 10), halvings=1, keypoints=4, patches=2, text_width=11, buckets=31)
    policy = FlowPolicy(robot=robot(), encoder=encoder, horizon=8, layers=2, heads=2, head_width=8).eval()
    world = disturbed(make(guidance=1.0))
    first = prompts(count=3, steps=24)
    made = ActionPrompts(sim=lambda: Still(first), instructions=["open the drawer"], first_frames=3, rows=24,
                         streams=("policy",), policy=policy, world=world)()  # fmt: skip
    together, alone = read_prompts(made[1::2]), [read_prompts([draft])[0] for draft in made[1::2]]
    for a, b in zip(together, alone, strict=True):
        assert a.action.shape == (24, 4) and np.abs(a.action - b.action).max() < 1e-5
    assert np.abs(together[0].action - together[1].action).max() > 1e-2


def test_frames_of_a_rate_that_does_not_divide():
    clock = Clock(robot_hz="50/3", video_hz=10, frames=5)
    rows = clock.with_frames(40).rows
    for now in (0, 4, 8):
        steps = int(rows[now + 4] - rows[now])
        assert np.array_equal(frame_rows(clock, now, steps, 4), rows[now : now + 5] - rows[now])
