"""How a world model names its weights, and what it is opened again with."""

import diffusers
import pytest
import torch

from dreamgen.core.manifest import read_json, write_json
from tests.worlds import zoo

SAVED = {"guidance_interval": [0.3, 1.0], "guidance_mode": "two_pass", "attention_backend": "native", "compile": "auto",
         "lora": {"rank": 4, "alpha": 8, "targets": ["to_q"]}}  # fmt: skip


def test_a_world_model_is_opened_as_it_was_saved(tmp_path):
    name = "wan22_i2v_a14b"
    zoo.world(name, zoo.save(name, tmp_path / "base"), expert="high", **SAVED).save(tmp_path / "run")
    load = zoo.WORLDS[name].load
    world = load(tmp_path / "run")
    assert SAVED.items() <= world.spec().items() and (world.expert, list(world.trained())) == ("high", ["transformer"])
    assert (world.sampler.mode, world.sampler.interval) == ("two_pass", [0.3, 1.0])
    world.train_lora()
    assert {module.r["default"] for module in world.modules() if hasattr(module, "lora_A")} == {4}
    for changed in ({"guidance": 1.0}, {"step_cache": diffusers.FirstBlockCacheConfig(threshold=0.1)}):
        assert load(tmp_path / "run", **changed).sampler.interval is None
        with pytest.raises(ValueError, match="guidance_interval"):  # one that is asked for stays
            load(tmp_path / "run", guidance_interval=[0.5, 1.0], **changed)


def test_a_folder_that_tells_less_is_opened_with_the_defaults(tmp_path):
    world = zoo.world("wan22_i2v_a14b", "", pipeline=zoo.build("wan22_i2v_a14b"))
    world.save(tmp_path)
    saved, spec = read_json(tmp_path / "world.json"), world.spec()
    old = {key: value for key, value in saved["spec"].items() if key not in {*SAVED, "expert"}}
    write_json(tmp_path / "world.json", {**saved, "spec": old})
    assert type(world).load(tmp_path).spec() == spec and spec["lora"] == {"rank": 16, "alpha": 16}


def test_a_pipeline_without_a_path_is_named_by_its_weights(tmp_path, monkeypatch):
    world = zoo.world("ltx_video", "", pipeline=zoo.build("ltx_video"))
    named = world.fingerprint()
    monkeypatch.chdir(tmp_path)
    assert world.fingerprint() == named
    (tmp_path / "a.txt").write_text("not of the model")
    assert zoo.world("ltx_video", "", pipeline=zoo.build("ltx_video")).fingerprint() == named
    with torch.no_grad():
        next(world.pipe.text_encoder.parameters()).add_(1)
    assert world.fingerprint() != named
    with pytest.raises(ValueError, match="path of the world model is empty"):
        zoo.world("ltx_video", "")
