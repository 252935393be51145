"""Vision towers of transformers, opened from folders with random weights, against the towers themselves."""

import pytest
import torch
from moving_square import CLOCK, ROBOT, Squares, clip_of
from transformers import AutoConfig, AutoModel

from idm.model import FlowIDM
from idm.tower import IMAGENET, PretrainedVision, open_tower, patches

SIGLIP = {"model_type": "siglip", "text_config": {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
          "num_attention_heads": 1, "vocab_size": 11}, "vision_config": {"hidden_size": 16, "intermediate_size": 24,
          "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}}  # fmt: skip
DINO2 = {"model_type": "dinov2_with_registers", "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
         "image_size": 42, "patch_size": 14, "mlp_ratio": 2, "num_register_tokens": 3}  # fmt: skip
DINO3 = {"model_type": "dinov3_vit", "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 1,
         "num_attention_heads": 2, "image_size": 32, "patch_size": 16, "num_register_tokens": 2}  # fmt: skip


@pytest.fixture(params=[SIGLIP, DINO2, DINO3], ids=lambda config: config["model_type"])
def folder(request, tmp_path):
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model(**request.param)).save_pretrained(tmp_path / "tower")
    return tmp_path / "tower", request.param


def test_a_tower_of_a_folder_gives_its_patch_tokens_in_its_own_colours(folder):
    path, config = folder
    tower = open_tower(str(path)).eval()
    edge = config.get("vision_config", config)["image_size"]
    side = edge // config.get("vision_config", config)["patch_size"]
    frames = torch.rand(2, 3, edge, edge) * 2 - 1
    mean, std = (torch.tensor(row)[:, None, None] for row in ((0.5,) * 3, (0.5,) * 3))
    if "dino" in config["model_type"]:
        mean, std = (torch.tensor(row)[:, None, None] for row in IMAGENET)
    with torch.no_grad():
        whole = tower(pixel_values=((frames + 1) / 2 - mean) / std).last_hidden_state
        found = patches(tower, frames)
        assert patches(tower, frames, 2 * edge).shape[2:] == (2 * side, 2 * side)
    torch.testing.assert_close(found.flatten(2).mT, whole[:, whole.shape[1] - side**2 :], atol=1e-5, rtol=1e-5)


def test_a_labeler_on_a_tower_is_saved_without_its_hub(folder, tmp_path):
    path, _ = folder
    options = {"robot": ROBOT, "clock": CLOCK, "frames": 2, "train_frames": 3, "width": 24, "layers": 2, "heads": 2,
               "precision": "fp32", "vision": {"path": str(path), "tokens": 2}}  # fmt: skip
    model = FlowIDM(**options)
    assert isinstance(model.vision, PretrainedVision)
    assert not any(p.requires_grad for p in model.vision.tower.parameters())
    assert not model.train().vision.tower.training
    model.save(tmp_path / "labeler")
    clip = clip_of(Squares(1), 0)
    before = model.label([clip])[0].value
    (path / "config.json").unlink()
    again = FlowIDM.load(tmp_path / "labeler")
    assert (again.label([clip])[0].value == before).all()


def test_errors_say_which_towers_there_are(tmp_path):
    with pytest.raises(ValueError, match="could not be opened.*name a local folder"):
        open_tower(str(tmp_path))
    with pytest.raises(ValueError, match="does not exist"):
        PretrainedVision(size=(32, 48), path=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="reads pictures of any size"):
        open_tower("none", {"model_type": "siglip2"})
