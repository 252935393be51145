"""Recordings dreamt again: bits at both ends, and the closed form between."""

import numpy as np
import pytest
import torch

from dreamgen.core.clip import Prompt
from dreamgen.stages.train_labeler import through
from dreamgen.worlds.flow import Diffusion
from dreamgen.worlds.redream import redream


@pytest.fixture
def clip() -> torch.Tensor:
    frames = np.random.default_rng(5).integers(0, 256, (1, 9, 4, 6, 3), np.uint8)
    return torch.from_numpy(frames.repeat(8, 2).repeat(8, 3))


def test_at_level_zero_it_is_the_autoencoder(world, clip):
    assert torch.equal(redream(world, clip, level=0.0, seed=1), world.decode(world.encode(clip)))
    assert np.array_equal(through(world)(clip[0].numpy()), world.decode(world.encode(clip))[0].numpy())


def test_at_level_one_it_is_a_dream_without_a_prompt(world, clip):
    world.guidance = 1.0
    noise = torch.randn(1, *world.latent_shape, generator=torch.Generator().manual_seed(7))
    dream = world.dream([Prompt(id="p", image=clip[0, 0].numpy(), instruction="", seed=0)], noise=noise)[0]
    assert np.array_equal(redream(world, clip, level=1.0, seed=7)[0].numpy(), dream.video)


@pytest.mark.parametrize("level", [0.4, 0.8, 1.0])
def test_with_the_true_velocity_the_clip_comes_back(world, clip, level, monkeypatch):
    latents = world.encode(clip)
    unit = world.layout.process(world.latent_shape).unit
    monkeypatch.setattr(
        world, "predict", lambda x, given, time, text: (x - latents) / (time / unit).view(-1, 1, 1, 1, 1)
    )
    again = redream(world, clip, level=level, seed=3).int()
    assert (again - world.decode(latents).int()).abs().max() <= 1


def test_models_of_diffusion_are_refused(world, clip, monkeypatch):
    monkeypatch.setattr(world.layout, "process", lambda shape: Diffusion(torch.linspace(0.9, 0.1, 10)))
    with pytest.raises(ValueError, match="no model of flow matching.*redream_up_to=0"):
        redream(world, clip, level=0.5, seed=1)


def test_a_labelers_clips_are_drawn_at_levels_of_their_own_and_again_the_same(world, clip):
    frames = clip[0].numpy()
    one, two = (through(world, redream_up_to=0.9, seed=s) for s in (0, 0))
    first, second = one(frames), one(frames)
    assert np.array_equal(first, two(frames)) and not np.array_equal(first, second)
