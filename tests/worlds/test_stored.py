"""How a world model names its weights."""

import pytest
import torch

from tests.worlds import zoo


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
