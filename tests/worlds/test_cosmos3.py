"""Cosmos 3 by both protocols, on a tiny random pipeline."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, Cosmos3OmniPipeline, Cosmos3OmniTransformer, UniPCMultistepScheduler
from hydra.utils import instantiate
from scipy.spatial.transform import Rotation

from dreamgen.core import rotations
from dreamgen.core.clip import Clip, Prompt
from dreamgen.core.embodiment import Embodiment, Part, View
from dreamgen.core.protocols import ActionWorldModel, Labeler
from dreamgen.worlds.cosmos3 import Cosmos3Labeler, Cosmos3World, _merged
from dreamgen.worlds.tiny import tokenizer
from jobs.recipe import load
from jobs.running import check

TEMPLATE = "{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }} {% endfor %}"


def robot(width: int = 10) -> Embodiment:
    return Embodiment(name="arm", robot_hz=8, views=[View(name="eye", key="eye", height=32, width=48)],
                      action=[Part(name="pose", start=0, stop=width, kind="delta", limits=(-1, 1))])  # fmt: skip


@pytest.fixture(scope="module")
def pipe() -> Cosmos3OmniPipeline:
    torch.manual_seed(0)
    words = tokenizer(["push the block"])
    words.add_special_tokens({"additional_special_tokens": ["<|vision_start|>"]})
    words.chat_template = TEMPLATE
    vae = AutoencoderKLWan(base_dim=4, z_dim=6, dim_mult=[1, 1, 1], num_res_blocks=1, attn_scales=[],
                           temperal_downsample=[True, True], is_residual=True, patch_size=2, in_channels=12,
                           out_channels=12, scale_factor_temporal=4, scale_factor_spatial=8, latents_mean=[0.0] * 6,
                           latents_std=[1.0] * 6)  # fmt: skip
    transformer = Cosmos3OmniTransformer(
        head_dim=16, hidden_size=32, intermediate_size=24, latent_channel=6, num_attention_heads=2, num_hidden_layers=1,
        num_key_value_heads=1, patch_latent_dim=24, rope_axes_dim=[4, 2, 2], action_dim=12, action_gen=True,
        vocab_size=len(words),
    )  # fmt: skip
    return Cosmos3OmniPipeline(transformer=transformer.eval(), text_tokenizer=words, vae=vae.eval(),
                               scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction",
                                                                 use_flow_sigmas=True),
                               enable_safety_checker=False)  # fmt: skip


def test_forward_dynamics_imagines(pipe) -> None:
    world = Cosmos3World(robot=robot(), pipeline=pipe, frames=5, tier=256, steps=2, safety=False)
    assert isinstance(world, ActionWorldModel)
    rng = np.random.default_rng(0)
    prompt = Prompt(id="x", image=rng.integers(0, 256, (32, 48, 3), np.uint8), instruction="push the block", seed=1,
                    action=rng.uniform(-1, 1, (8, 10)).astype(np.float32))  # fmt: skip
    (clip,) = world.dream([prompt])
    assert clip.video.shape == (9, 32, 48, 3) and np.array_equal(clip.video[0], prompt.image)
    (again,) = world.dream([prompt])
    assert np.array_equal(again.video, clip.video)
    with pytest.raises(ValueError, match="no actions"):
        world.dream([Prompt(**{**vars(prompt), "action": np.zeros((0, 0), np.float32)})])


def test_inverse_dynamics_labels(pipe) -> None:
    labeler = Cosmos3Labeler(robot=robot(), pipeline=pipe, frames=5, tier=256, steps=2, safety=False)
    assert isinstance(labeler, Labeler)
    video = np.random.default_rng(1).integers(0, 256, (7, 32, 48, 3), np.uint8)
    clip = Clip(id="c", video=video, video_hz="8", instruction="push the block", seed=4)
    (labels,) = labeler.label([clip])
    assert labels.value.shape == labels.spread.shape == (6, 10) and (labels.spread > 0).any()
    assert np.array_equal(labeler.label([clip])[0].value, labels.value)
    with pytest.raises(ValueError, match="labels videos at the robot's 8"):
        labeler.label([Clip(**{**vars(clip), "video_hz": "10"})])


def test_draws_are_merged_as_rotations_and_votes() -> None:
    turn = Part(name="turn", start=3, stop=9, rotation="rot6d")
    arm = replace(robot(), action=(Part(name="move", start=0, stop=3, kind="delta", limits=(-0.5, 0.5)), turn,
                                   Part(name="grip", start=9, stop=10, kind="binary", limits=(0, 1))))  # fmt: skip
    rng, turns = np.random.default_rng(0), Rotation.from_rotvec(np.random.default_rng(1).normal(0, 0.4, (15, 3)))
    told = 1.3 * rotations.tell(turn, np.roll(turns.as_quat(), 1, -1)).reshape(3, 5, 6)  # sizes do not count
    drawn = np.concatenate([rng.normal(size=(3, 5, 3)), told, rng.random((3, 5, 1))], 2)
    labels = _merged(arm, drawn)
    np.testing.assert_allclose(labels.value[:, :3], drawn[..., :3].mean(0).clip(-0.5, 0.5), atol=1e-6)
    np.testing.assert_array_equal(labels.value[:, 9], (drawn[..., 9] > 0.5).sum(0) > 1)
    for step in range(5):
        three = turns[[step, 5 + step, 10 + step]]
        matrix = three.mean().as_matrix()
        np.testing.assert_allclose(labels.value[step, 3:9], matrix[:2].ravel(), atol=1e-5)
        off = (three.mean().inv() * three).magnitude()
        np.testing.assert_allclose(labels.spread[step, 3:9], np.sqrt((off**2).mean() / 3), atol=1e-5)


def test_robots_it_does_not_know_are_named(pipe) -> None:
    with pytest.raises(ValueError, match="has 7 action entries, Cosmos 3's domain 'droid_lerobot' 10"):
        Cosmos3World(robot=robot(7), pipeline=pipe)
    with pytest.raises(ValueError, match="domain is 'mine'"):
        Cosmos3World(robot=robot(), pipeline=pipe, domain="mine")
    with pytest.raises(ValueError, match="frames is 16; expected 1"):
        Cosmos3World(robot=robot(), pipeline=pipe, frames=16)
    with pytest.raises(ValueError, match="video_hz is 10, embodiment 'arm' moves at 8 Hz"):
        Cosmos3World(robot=robot(), pipeline=pipe, video_hz="10")


def test_a_saved_pipeline_is_opened(pipe, tmp_path) -> None:
    pipe.save_pretrained(tmp_path / "cosmos")
    settings = dict(robot=robot(), frames=5, tier=256, steps=1, safety=False)
    opened = Cosmos3World(path=str(tmp_path / "cosmos"), video_hz="8", **settings)
    assert opened.clock.frames == 5 and opened.pipe.transformer.dtype == torch.bfloat16
    for name, value in pipe.transformer.state_dict().items():
        assert torch.allclose(opened.pipe.transformer.state_dict()[name].float(), value, atol=0.01), name


def test_the_labeler_of_the_configuration_labels(pipe, tmp_path) -> None:
    pipe.save_pretrained(tmp_path / "cosmos")
    words = [f"labeler.path={tmp_path / 'cosmos'}", "labeler.frames=5", "labeler.tier=256", "labeler.steps=1"]
    cfg, _ = load("label", ["labeler=cosmos3", "stage.labeler=${labeler}", "labeler.safety=false", *words])
    check(cfg.stage)
    labeler = instantiate(cfg.stage.labeler, _partial_=True, _convert_="all")(robot=robot())
    assert labeler.samples == 2 and labeler.place() is labeler
    video = np.random.default_rng(2).integers(0, 256, (5, 32, 48, 3), np.uint8)
    (labels,) = labeler.label([Clip(id="c", video=video, video_hz="8", instruction="push the block", seed=4)])
    assert labels.value.shape == (4, 10) and np.isfinite(labels.value).all()
