"""Noise levels, shifted in training and in sampling, and as many clips decoded at once as fit."""
# ruff: noqa: F401, F811 (fixtures come by import)

from importlib import import_module

import pytest
import torch
from omegaconf import OmegaConf

from dreamgen.worlds.flow import Flow
from tests.engine.test_processes import ROOT
from tests.worlds import zoo
from tests.worlds.test_models import apart, folders, prompts, require_same, stock, worlds


@pytest.mark.parametrize("name", ["wan22_ti2v_5b", "ltx_video", "cogvideox_5b_i2v"])
def test_clips_are_decoded_as_many_at_once_as_fit(name, worlds, monkeypatch):
    world, sizes = worlds[name], []
    latents = torch.randn(5, *world.latent_shape, generator=torch.Generator().manual_seed(3))
    whole, decode = world.decode(latents), world.layout.decode
    assert whole.shape == (5, zoo.FRAMES, *zoo.sizes(name), 3)
    monkeypatch.setattr("dreamgen.worlds.autoencoder.PIXELS", 2 * whole[0, ..., 0].numel() + 1)
    monkeypatch.setattr(world.layout, "decode", lambda z: sizes.append(len(z)) or decode(z))
    assert apart(world.decode(latents).numpy(), whole.numpy()) <= 1
    assert sizes == [2, 2, 2]  # the last is one, twice


@pytest.mark.parametrize("name", ["wan22_ti2v_5b", "wan21_i2v_14b", "ltx_video"])
def test_a_shift_samples_as_the_stock_scheduler_of_that_shift(name, folders):
    world, pipe = zoo.world(name, folders[name], shift=9.0), stock(zoo.world(name, folders[name]), folders[name])
    (prompt,), config = prompts(name, 1), pipe.scheduler.config
    plain = zoo.world(name, folders[name]).dream([prompt])[0].video
    assert apart(world.dream([prompt])[0].video, plain) > 1
    fixed = {"flow_shift": 9.0} if "flow_shift" in config else {"shift": 9.0, "use_dynamic_shifting": False}
    pipe.scheduler = type(pipe.scheduler).from_config(config, **fixed)
    require_same(name, pipe, world, prompt)


def test_the_share_of_high_noise_in_training_is_that_of_its_shift(folders):
    name = "cosmos_predict25_2b"
    shares = {}
    for shift in (None, 5.0):
        world = zoo.world(name, folders[name], train_shift=shift)
        torch.manual_seed(0)
        drawn = world.draw(20000, world.latent_shape, torch.device("cpu"))
        shares[shift] = float((drawn > 0.9).float().mean())
        assert world.spec()["train_shift"] == shift
    assert shares[None] == pytest.approx(0.014, abs=0.004) and shares[5.0] == pytest.approx(0.278, abs=0.01)
    assert Flow(5.0).above(0.9) == pytest.approx(0.278, abs=0.001)


@pytest.mark.parametrize("name", ["cosmos_predict25_2b", "cosmos_predict2_2b"])
def test_cosmos_has_the_negative_prompt_of_its_stock_pipeline_and_the_shift_of_its_trainer(name):
    settings = OmegaConf.load(ROOT / "conf" / "world_model" / f"{name}.yaml")
    stock = import_module(zoo.WORLDS[name].kind.pipeline.__module__)
    assert (settings.negative_prompt, settings.train_shift) == (stock.DEFAULT_NEGATIVE_PROMPT, 5.0)


@pytest.mark.parametrize(("name", "setting"), [
    ("cosmos_predict25_2b", "shift"), ("cosmos_predict2_2b", "shift"), ("cogvideox_5b_i2v", "shift"),
    ("cogvideox_5b_i2v", "train_shift"),
])  # fmt: skip
def test_a_shift_that_would_do_nothing_is_refused(name, setting, folders):
    with pytest.raises(ValueError, match=f"{setting} is 3.0, .*leave it null"):
        zoo.world(name, folders[name], **{setting: 3.0})
