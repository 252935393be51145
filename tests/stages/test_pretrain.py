"""A tiny base from nothing: what is trained, what stays as it was fitted, and that it can be gone on from."""

import json

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline

from dreamgen.core.clip import Episode
from dreamgen.data.lerobot import Dataset
from dreamgen.data.writer import write_dataset
from dreamgen.stages.pretrain import pretrain
from dreamgen.worlds.prefix import PrefixWorld
from dreamgen.worlds.tiny import TinyLayout
from tests.worlds.conftest import tiny_robot

LAYOUT = TinyLayout(z_dim=8, vae_dim=8, vae_decoder_dim=8, width=48, heads=2, ffn=40, layers=2, text_width=16,
                    text_layers=1)  # fmt: skip
OPTIONS = dict(robot=tiny_robot(), layout=LAYOUT, frames=5, hop=2, text_length=12, frame_batch=4, frame_steps=3,
               vae_frames=5, vae_batch=2, vae_steps=3, steps=3, batch_size=4, precision="fp32", compile=False,
               record={"a": 1})  # fmt: skip


def recordings(root, seed: int, count: int) -> Dataset:
    rng = np.random.default_rng(seed)
    write_dataset(root, [
        Episode(instruction=("open the drawer", "close it")[i % 2], state=rng.normal(size=(14, 2)).astype(np.float32),
                action=rng.normal(size=(14, 3)).astype(np.float32), meta={},
                video={"front": rng.integers(0, 256, (14, 4, 6, 3), np.uint8).repeat(8, 1).repeat(8, 2)})
        for i in range(count)
    ], tiny_robot())  # fmt: skip
    return Dataset(root, tiny_robot())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("pretrain")
    return [recordings(root / "looks", 0, 5), recordings(root / "play", 1, 3)], recordings(root / "target", 2, 2)


def weights(out, part: str) -> dict[str, torch.Tensor]:
    return getattr(PrefixWorld.load(out).pipe, part).state_dict()


def test_a_base_from_nothing_and_on_from_there(data, tmp_path):
    pretrain(data[0], data[1], out=tmp_path / "base", replicas=2, **OPTIONS)
    results = json.loads((tmp_path / "base" / "manifest.json").read_text())["results"]
    assert {"psnr"} == set(results["frames"]["validation"]) == set(results["vae"]["validation"])
    assert results["transformer"]["steps"] == 3 and results["episodes"] == 8
    stock = WanImageToVideoPipeline.from_pretrained(tmp_path / "base" / "model")
    assert stock.vae_scale_factor_temporal == 2 and stock.vae_scale_factor_spatial == 8
    assert max(map(abs, stock.vae.config.latents_mean)) < 2 and not (tmp_path / "base" / "vae" / "training").exists()

    pretrain(data[0], data[1], out=tmp_path / "more", start=str(tmp_path / "base" / "model"), **OPTIONS)
    before, after = weights(tmp_path / "base", "vae"), weights(tmp_path / "more", "vae")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert not [name for name in before if name.startswith(("encoder", "quant_conv")) and name not in same]
    assert not any(name in same for name in before if name.startswith("decoder") and name.endswith("conv1.weight"))
    old, new = weights(tmp_path / "base", "transformer"), weights(tmp_path / "more", "transformer")
    assert any(not torch.equal(old[name], new[name]) for name in old)


def test_a_killed_one_goes_on_to_the_same_weights(data, tmp_path, monkeypatch):
    from dreamgen.stages import pretrain as module

    pretrain(data[0], data[1], out=tmp_path / "whole", **OPTIONS)
    kept = module._train_transformer

    def killed(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_train_transformer", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain(data[0], data[1], out=tmp_path / "killed", **OPTIONS)
    monkeypatch.setattr(module, "_train_transformer", kept)
    pretrain(data[0], data[1], out=tmp_path / "killed", **OPTIONS)
    for part in ("vae", "transformer", "text_encoder"):
        whole, again = weights(tmp_path / "whole", part), weights(tmp_path / "killed", part)
        assert all(torch.equal(whole[name], again[name]) for name in whole), part


def test_texts_are_counted_and_the_model_is_placed_before_anything_is_trained(data, tmp_path, monkeypatch):
    class Placed(Exception):
        pass

    def place(world):
        raise Placed

    monkeypatch.setattr(PrefixWorld, "place", place)
    monkeypatch.setattr("dreamgen.stages.pretrain.train", lambda *_, **__: pytest.fail("it is trained"))
    with pytest.raises(Placed):
        pretrain(data[0], data[1], out=tmp_path / "placed", **OPTIONS)
    with pytest.raises(ValueError, match="a prompt has .* tokens, .*text_length is 2"):
        pretrain(data[0], data[1], out=tmp_path / "short", **{**OPTIONS, "text_length": 2})
