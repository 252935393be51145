"""Actions on a tiny random world model: bits, closed forms of what a latent frame sees, guidance, rollouts, files."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, WanTransformer3DModel

from dreamgen.core.camera import Camera, Tool
from dreamgen.core.clip import Prompt
from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment, Part, View
from dreamgen.core.kinematics import follow, within
from dreamgen.core.manifest import read_json, write_json
from dreamgen.worlds.action import ActionWorld
from dreamgen.worlds.action_frames import latent_actions, pose_maps
from dreamgen.worlds.action_hooks import ActionExtension, Given, Hooks
from dreamgen.worlds.prefix import PrefixWorld, open_pipeline
from tests.worlds import zoo
from tests.worlds.conftest import pipeline_folder  # noqa: F401

CAMERA = Camera(focal=(1.0, 1.5), position=(0, 0, -2), rotation=(1, 0, 0, 0, 1, 0, 0, 0, 1))


def robot(robot_hz="20") -> Embodiment:
    """A gripper before one standing camera that looks along z."""
    return Embodiment(
        name="gripper", robot_hz=robot_hz,
        views=[View(name="front", key="observation.images.front", height=32, width=48, camera=CAMERA)],
        state=[Part(name="place", start=0, stop=3), Part(name="opening", start=3, stop=4)],
        action=[Part(name="move", start=0, stop=3, kind="delta", scale=0.5, moves="place", limits=(-1, 1)),
                Part(name="grip", start=3, stop=4, kind="binary", limits=(-1, 1), moves="opening", sets=(1, 0),
                     travel=0.1)],
        tools=[Tool(position="place", opening="opening")],
    )  # fmt: skip


@pytest.fixture(scope="module")
def make(pipeline_folder):  # noqa: F811
    pipe = open_pipeline(str(pipeline_folder))

    def built(**changed) -> ActionWorld:
        torch.manual_seed(0)
        guidance, own = changed.pop("guidance", 2.0), {} if changed.pop("own", False) else {"pipeline": pipe}
        own["step_cache"] = changed.pop("step_cache", None)
        world = PrefixWorld(robot=robot(), path=str(pipeline_folder), frames=9, steps=2, guidance=guidance,
                            text_length=15, precision="fp32", **own)  # fmt: skip
        return ActionWorld(world=world, width=20, **{"maps": True, **changed})

    return built


def disturbed(world: ActionWorld) -> ActionWorld:
    """With weights that are not zero anywhere."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in world.extension.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return world


def prompts(steps: int = 16, count: int = 2) -> list[Prompt]:
    rng = np.random.default_rng(3)
    return [
        Prompt(id=f"p{i}", image=rng.integers(0, 256, (32, 48, 3), np.uint8), instruction="open the drawer", seed=i,
               state=np.array([0, 0.1 * i, 0, 1], np.float32),
               action=rng.uniform(-0.9, 0.9, (steps, 4)).astype(np.float32))
        for i in range(count)
    ]  # fmt: skip


def test_untrained_it_is_the_base_to_the_bit(make):
    world = make(anchor=False, history=())
    given = prompts()
    for mine, base in zip(world.dream(given), world.world.dream(given), strict=True):
        assert np.array_equal(mine.video[1:], base.video[1:]) and np.array_equal(mine.video[0], given[0].image)
        given = given[1:]
    latents, text = torch.randn(2, 6, 3, 4, 6), world.embed(["open the drawer", ""])
    fixed = {"latents": latents, "text": text, "noise": torch.randn_like(latents), "sigma": torch.tensor([0.2, 0.7])}
    features = torch.randn(2, 2, 16)
    maps = torch.randn(2, 8, 3, 4, 6)
    assert world.loss({**fixed, "features": features, "maps": maps})[0] == world.world.loss(fixed)[0]


def test_concatenated_channels_are_the_base_to_the_bit_and_listen():
    """The other family: 4 mask and 6 condition channels beside 6 noisy ones, one time per clip."""
    torch.manual_seed(2)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=6, text_dim=10,
        freq_dim=8, ffn_dim=20, num_layers=2, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    extension = ActionExtension(transformer, features=8, channels=2, width=11)
    hooks = Hooks(transformer, extension, latents=6)
    x, text = torch.randn(2, 16, 3, 4, 6), torch.randn(2, 5, 10)

    clip_time = torch.tensor([300.0, 800.0])

    def call(time=clip_time) -> torch.Tensor:
        return transformer(hidden_states=x, timestep=time, encoder_hidden_states=text, return_dict=False)[0]

    given = Given(features=torch.randn(2, 2, 8), present=torch.tensor([True, True]), level=torch.zeros(2),
                  maps=torch.randn(2, 2, 3, 4, 6))  # fmt: skip
    with torch.no_grad():
        base = call()
        with hooks(given):
            assert torch.equal(call(), base)
        torch.nn.init.normal_(extension.proj_out.weight, std=0.5)
        torch.nn.init.normal_(extension.patch_maps.weight)
        with hooks(given):
            once = call()
        with hooks(given, guidance=3.0):
            thrice = call()
        without = Given(**{**vars(given), "present": torch.tensor([False, False])})
        with hooks(without):
            plain = call()
        assert (once - base).abs().max() > 1e-3
        assert torch.allclose(thrice, plain + 3 * (once - plain), atol=1e-5)
        memory = Given(**{**vars(given), "memory": torch.randn(2, 6, 2, 4, 6), "ages": torch.tensor([[1.0, 0.1]] * 2)})
        with hooks(memory):
            assert call().shape == base.shape
        # a time per token gives what a time per clip gives
        with hooks(given):
            assert torch.allclose(call(clip_time[:, None].expand(2, 18)), once, atol=1e-5)
        assert torch.equal(call(), base)


@pytest.mark.parametrize("name", ["wan21_i2v_14b", "wan22_i2v_a14b"])
def test_whole_pipelines_of_the_other_family(name):
    base = zoo.world(name, "", pipeline=zoo.build(name), steps=2)
    action = np.random.default_rng(1).uniform(-1, 1, (16, 3)).astype(np.float32)
    image = np.full((*zoo.robot().canvas, 3), 90, np.uint8)
    prompt = Prompt(id="p", image=image, instruction="open the drawer", seed=4, action=action)
    plain = base.dream([prompt])[0].video
    world = ActionWorld(world=base, width=8, anchor=False, history=())
    assert len(world.hooks) == 1 + name.endswith("a14b")  # both experts
    assert np.array_equal(world.dream([prompt])[0].video[1:], plain[1:])
    moved = disturbed(ActionWorld(world=base, width=8, level=0.3))
    videos = [moved.dream([Prompt(**{**vars(prompt), "action": a})])[0].video for a in (action, -action)]
    assert (videos[0] != videos[1]).any() and (videos[0] != plain).any()
    assert np.array_equal(base.dream([prompt])[0].video, plain)


def test_other_transformers_are_named():
    with pytest.raises(ValueError, match="has a LTXVideoTransformer3DModel"):
        ActionWorld(world=zoo.world("ltx_video", "", pipeline=zoo.build("ltx_video")))


def test_actions_maps_memory_and_text_matter(make):
    world = disturbed(make(guidance=1.0))
    (a, b) = prompts()
    other = Prompt(**{**vars(a), "action": -a.action})
    moved = Prompt(**{**vars(a), "state": a.state + np.float32(0.4)})
    said = Prompt(**{**vars(a), "instruction": "put the red block on the plate"})
    dreams = [clip.video.astype(int) for clip in world.dream([a, other, moved, said])]
    assert all((dreams[0] != video).any() for video in dreams[1:])
    (alone,) = world.dream([a])
    assert np.abs(alone.video.astype(int) - dreams[0]).max() <= 1
    silent = Prompt(**{**vars(a), "action": np.zeros((0, 0), np.float32)})
    mixed = world.dream([silent, b])
    assert np.array_equal(mixed[0].video, world.world.dream([silent])[0].video)
    assert [clip.id for clip in mixed] == ["p0", "p1"]


def test_a_world_that_is_not_told_what_is_asked_for(make):
    world = disturbed(make(instructions=False))
    said = prompts()[0]
    other = Prompt(**{**vars(said), "instruction": "put the red block on the plate"})
    assert np.array_equal(world.dream([said])[0].video, world.dream([other])[0].video)
    assert world.spec()["instructions"] is False


def test_latent_frames_see_composed_actions():
    action = np.zeros((16, 4), np.float32)
    action[:, 0], action[:, 1], action[:, 3] = 1.0, np.arange(16), [-1] * 8 + [1] * 8
    found = latent_actions(robot(), np.arange(0, 17, 2), action, gaps=4).reshape(2, 4, 4)
    assert np.allclose(found[:, :, 0], [[1, 2, 3, 4]] * 2)  # 2 steps a gap, scale one half, anew in each latent frame
    assert np.allclose(found[1, :, 1], 0.5 * np.array([8 + 9, 8 + 9 + 10 + 11, sum(range(8, 14)), sum(range(8, 16))]))
    assert np.allclose(found[0, :, 3], -1) and np.allclose(found[1, :, 3], 1)
    rows = Clock(robot_hz="50/3", video_hz=10, frames=5).rows  # 0 1 3 5 6
    assert np.allclose(latent_actions(robot(), rows, action[:6], gaps=4).reshape(4, 4)[:, 0], [0.5, 1.5, 2.5, 3])
    with pytest.raises(ValueError, match="5 frames span"):
        latent_actions(robot(), rows, action[:7], gaps=4)


def test_absolute_commands_are_relative_to_the_pose():
    arm = Embodiment(name="arm", robot_hz=10, views=robot().views, state=[Part(name="q", start=0, stop=1)],
                     action=[Part(name="go", start=0, stop=1, moves="q")])  # fmt: skip
    action = np.array([[2.0], [3.0], [5.0], [9.0]], np.float32)
    rows, state = np.arange(5), np.array([1.0], np.float32)
    assert latent_actions(arm, rows, action, gaps=2, state=state).tolist() == [[1, 2], [2, 6]]
    assert latent_actions(arm, rows, action, gaps=2).tolist() == [[0, 1], [2, 6]]


def test_maps_draw_the_projected_gripper():
    action = np.zeros((8, 4), np.float32)
    action[:, 0], action[:, 3] = 0.1, 1.0  # 0.05 m a step to the right; the gripper closes within two steps
    state = np.array([-0.2, 0.1, 0, 1], np.float32)
    maps = pose_maps(robot(), np.arange(0, 9, 2), action, state, size=(16, 24), gaps=4)
    assert maps.shape == (8, 2, 16, 24)
    for k, place in enumerate((-0.1, 0.0, 0.1, 0.2)):
        u, v = 0.5 + 1.0 * place / 2, 0.5 + 1.5 * 0.1 / 2
        y, x = np.unravel_index(maps[2 * k, 1].argmax(), (16, 24))
        assert (y, x) == (int(16 * v), int(24 * u - 1e-6)) or abs(x + 0.5 - 24 * u) <= 0.51
        assert np.allclose(maps[2 * k + 1, 1], 0.0)  # closed
    assert np.allclose(maps[1, 0], maps[0, 0])  # open at first
    with pytest.raises(ValueError, match="need the first state"):
        pose_maps(robot(), np.arange(0, 9, 2), action, state[:0], size=(16, 24), gaps=4)


def test_states_follow_the_commands():
    action = np.array([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, -1, -1]], np.float32)
    state, known = follow(robot(), np.array([0, 0, 1, 1], np.float32), action)
    assert known.all() and np.allclose(state[:, :3], [[0, 0, 1], [0.5, 0, 1], [0.5, 0.5, 1], [0.5, 0.5, 0.5]])
    assert np.allclose(state[:, 3], [1, 0.5, 0, 0.5])  # 0.1 s for the whole way at 20 Hz
    with pytest.raises(ValueError, match="part 'move' is 1.5; embodiment 'gripper' allows -1 to 1"):
        within(robot(), np.array([[1.5, 0, 0, 0]]), "here")


def test_noise_on_the_context_is_the_models_input(make):
    quiet, noisy = disturbed(make(guidance=1.0)), disturbed(make(guidance=1.0, level=0.4))
    (a, _) = prompts()
    assert (quiet.dream([a])[0].video != noisy.dream([a])[0].video).any()
    seen = {}
    noisy.world.transformer.condition_embedder.timesteps_proj.register_forward_pre_hook(
        lambda module, args: seen.setdefault("time", args[0])
    )
    noisy.dream([a])
    times = seen["time"].view(-1, 2 + 3, 6)  # of each row: two remembered frames, then the clip's
    assert (times[:, :3] == 400).all() and (times[:, 3:] > 900).all()


def test_guidance_by_actions_extrapolates_from_none(make):
    base, guided = disturbed(make(guidance=1.0)), disturbed(make(guidance=1.0, action_guidance=2.0))
    (a, _) = prompts()
    assert (base.dream([a])[0].video != guided.dream([a])[0].video).any()


@pytest.mark.parametrize("cache", [
    FirstBlockCacheConfig(threshold=1e9),
    PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=3,
                                    spatial_attention_timestep_skip_range=(-1, 2000)),
], ids=["first_block", "broadcast"])  # fmt: skip
def test_a_step_cache_reuses_nothing_of_other_actions(make, cache):
    def cached(**changed):
        return disturbed(make(own=True, step_cache=cache, **changed))

    mine, other = (prompts(), [replace(p, action=-p.action) for p in prompts()])
    world = cached()
    world.dream(mine)
    for again, fresh in zip(world.dream(other), cached().dream(other), strict=True):
        assert np.array_equal(again.video, fresh.video)
    with pytest.raises(ValueError, match="action_guidance=2.0 makes a prediction with the actions and"):
        cached(action_guidance=2.0)
    with pytest.raises(ValueError, match="adapters and step_cache are for dreaming"):
        world.train_actions()


@pytest.mark.parametrize("method", ["full", "lora", "actions"])
def test_files_bring_back_the_same_model(make, tmp_path, method):
    world = make(own=True, action_guidance=1.5, history=(0.2,))
    world.train_lora(rank=2, alpha=2) if method == "lora" else getattr(world, f"train_{method}")()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in world.parameters() if p.requires_grad):
            parameter.add_(0.05 * torch.randn_like(parameter))
    world.extension.normaliser.scale.fill_(1.7)
    batch = {"latents": torch.randn(3, 6, 3, 4, 6), "text": world.embed(["open the drawer"] * 3),
             "features": torch.randn(3, 2, 16), "maps": torch.rand(3, 8, 3, 4, 6),
             "memory": torch.randn(3, 6, 2, 4, 6), "ages": torch.rand(3, 2)}  # fmt: skip
    world.train()
    loss, _ = world.loss(batch)
    loss.backward()
    assert math.isfinite(float(loss.detach())) and world.extension.enter.weight.grad.abs().sum() > 0
    world.requires_grad_(False).eval()
    world.save(tmp_path)
    again = ActionWorld.load(tmp_path, steps=2)
    assert again.spec() == world.spec() and again.robot == world.robot and again.folder == tmp_path
    before = read_json(tmp_path / "action_world.json")
    del before["spec"]["tool_weight"]  # as 0.10.0 wrote it
    write_json(tmp_path / "action_world.json", before)
    assert ActionWorld.load(tmp_path, tool_weight=2.0).tool_weight == 2.0
    (a, _) = prompts()
    assert np.abs(again.dream([a])[0].video.astype(int) - world.dream([a])[0].video.astype(int)).max() <= 1
    other = Embodiment.from_contract(robot().contract())
    far = Camera(focal=(1.0, 1.5), position=(0, 1, -2), rotation=CAMERA.rotation)
    view = View(name="front", key="observation.images.front", height=32, width=48, camera=far)
    with pytest.raises(ValueError, match="another robot.*\n.*views 'front'"):
        ActionWorld.load(tmp_path, robot=Embodiment(**{**vars(other), "views": (view,)}))


def test_a_robot_without_a_camera_has_no_maps(make):
    plain = robot()
    view = View(name="front", key="observation.images.front", height=32, width=48)
    bare = Embodiment(**{**vars(plain), "views": (view,)})
    assert bare.mismatches(plain.contract()) == []  # recordings need not know where the camera stood
    with pytest.raises(ValueError, match="cameras for .*maps=false"):
        pose_maps(bare, np.arange(5), np.zeros((4, 4), np.float32), np.zeros(4, np.float32), size=(4, 6), gaps=4)
