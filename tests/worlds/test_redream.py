"""Recordings dreamt again: bits at both ends, and the closed form between."""

import numpy as np
import pytest
import torch

from dreamgen.core.clip import Prompt
from dreamgen.worlds.flow import Flow
from dreamgen.worlds.redream import redream
from tests.worlds import zoo


@pytest.fixture
def clip() -> torch.Tensor:
    frames = np.random.default_rng(5).integers(0, 256, (1, 9, 4, 6, 3), np.uint8)
    return torch.from_numpy(frames.repeat(8, 2).repeat(8, 3))


def test_at_level_zero_it_is_the_autoencoder(world, clip):
    assert torch.equal(redream(world, clip, [""], levels=[0.0], seeds=[1]), world.decode(world.encode(clip)))


def test_at_level_one_it_is_a_dream_without_a_prompt(world, clip):
    world.guidance = 1.0
    noise = torch.randn(1, *world.latent_shape, generator=torch.Generator().manual_seed(7))
    dream = world.dream([Prompt(id="p", image=clip[0, 0].numpy(), instruction="", seed=0)], noise=noise)[0]
    assert np.array_equal(redream(world, clip, [""], levels=[1.0], seeds=[7])[0].numpy(), dream.video)


@pytest.mark.parametrize("level", [0.4, 0.8, 1.0])
def test_with_the_true_velocity_the_clip_comes_back(world, clip, level, monkeypatch):
    latents = world.encode(clip)
    unit = world.layout.process(world.latent_shape).unit
    monkeypatch.setattr(
        world, "predict", lambda x, given, time, text: (x - latents) / (time / unit).view(-1, 1, 1, 1, 1)
    )
    again = redream(world, clip, [""], levels=[level], seeds=[3]).int()
    assert (again - world.decode(latents).int()).abs().max() <= 1


@pytest.mark.parametrize("name", list(zoo.WORLDS))
def test_every_model_gives_the_clip_back_with_the_true_prediction(name, tmp_path, monkeypatch):
    model = zoo.world(name, zoo.save(name, tmp_path / name))
    h, w = zoo.sizes(name)
    frames = np.random.default_rng(5).integers(0, 256, (1, zoo.FRAMES, h // 8, w // 8, 3), np.uint8)
    clip = torch.from_numpy(frames.repeat(8, 2).repeat(8, 3))
    latents = model.encode(clip)
    clean, process = model.split(latents)[0], model.layout.process(model.latent_shape)
    sigmas = getattr(model.layout.schedule(model.steps, clean.shape[1:], model.device)[0], "sigmas", None)

    def true(x, given, time, text):
        """The flow's velocity, or v of diffusion, from x and the clean latents."""
        sigma = time[:1] / process.unit
        if isinstance(process, Flow):  # the scheduler's own, of which some models get told a whole number
            return (x - clean) / sigmas[(sigmas - sigma).abs().argmin()]
        signal, rest = process._roots(sigma, x)
        return signal * (x - signal * clean) / rest - rest * clean

    monkeypatch.setattr(model, "predict", true)
    again = redream(model, clip, [zoo.TEXTS[0]], levels=[0.9], seeds=[3]).int()
    assert (again - model.decode(latents).int()).abs().max() <= 2  # Cosmos-Predict2 stops at sigma_min
    monkeypatch.setattr(model, "predict", lambda x, given, time, text: torch.zeros_like(x))
    assert (redream(model, clip, [zoo.TEXTS[0]], levels=[0.9], seeds=[3]).int() - again).abs().max() > 1


def test_the_instruction_and_guidance_matter(world, clip):
    once = redream(world, clip, ["open the drawer"], levels=[1.0], seeds=[7])
    assert not torch.equal(once, redream(world, clip, ["put the red block on the plate"], levels=[1.0], seeds=[7]))
    world.guidance = 6.0
    assert not torch.equal(once, redream(world, clip, ["open the drawer"], levels=[1.0], seeds=[7]))


def test_a_clip_of_a_batch_is_what_it_is_alone(world, clip):
    many = torch.cat([clip, clip.flip(2), clip.flip(3), clip])
    texts, levels, seeds = ["open the drawer", "", "lift the red block", ""], [0.9, 0.0, 0.5, 0.9], [3, 4, 5, 6]
    together = redream(world, many, texts, levels=levels, seeds=seeds)
    for k in range(4):
        alone = redream(world, many[k : k + 1], texts[k : k + 1], levels=levels[k : k + 1], seeds=seeds[k : k + 1])
        assert torch.equal(alone[0], together[k])
    assert not torch.equal(together[0], together[3])
