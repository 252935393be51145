"""Adapters in the files of others on every model, against weights that their products are added to."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from dreamgen.worlds.world import VideoWorld
from tests.worlds import zoo
from tests.worlds.test_models import NAMES, apart, prompts

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]  # layer: (rank in), (out rank)
FILE, RANK = "pytorch_lora_weights.safetensors", 3
# the names of musubi-tuner, of the family of kohya's trainers
KOHYA = {"attn1.to_q": "self_attn_q", "attn1.to_k": "self_attn_k", "attn1.to_v": "self_attn_v",
         "attn1.to_out.0": "self_attn_o", "attn2.to_q": "cross_attn_q", "attn2.to_k": "cross_attn_k",
         "attn2.to_v": "cross_attn_v", "attn2.to_out.0": "cross_attn_o", "ffn.net.0.proj": "ffn_0",
         "ffn.net.2": "ffn_2"}  # fmt: skip


def drawn(world: VideoWorld) -> Factors:
    """Factors for every layer of a transformer that our own training adapts."""
    generator = torch.Generator().manual_seed(8)
    return {name: (0.3 * torch.randn(RANK, layer.in_features, generator=generator),
                   0.3 * torch.randn(layer.out_features, RANK, generator=generator))
            for name, layer in world.transformer.named_modules()
            if isinstance(layer, nn.Linear) and name.endswith(tuple(f".{t}" for t in world.kind.targets))}  # fmt: skip


def add(module: nn.Module, factors: Factors, scale: float) -> None:
    with torch.no_grad():
        for name, (down, up) in factors.items():
            module.get_submodule(name).weight += scale * up @ down


def trained(name: str, folder: Path, out: Path) -> dict[str, Factors]:
    """An adapter of our own of rank 2 and alpha 4 in `out`; its factors, by transformer."""
    world, found = zoo.world(name, folder), {}
    world.train_lora(rank=2, alpha=4)
    torch.manual_seed(4)
    for expert, module in world.layout.experts.items():
        layers = {layer: part for layer, part in module.named_modules() if hasattr(part, "lora_A")}
        for part in layers.values():
            part.lora_B["default"].weight.data.normal_(std=0.3)
        found[expert] = {layer: (part.lora_A["default"].weight.data.clone(), part.lora_B["default"].weight.data.clone())
                         for layer, part in layers.items()}  # fmt: skip
    world.save(out)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_of_stock_diffusers_stacks_on_ours(name, tmp_path):
    """Its file tells no alpha, which then is its rank."""
    folder = zoo.save(name, tmp_path / "toy")
    ours, world = trained(name, folder, tmp_path / "ours"), zoo.world(name, folder)
    few, kind = drawn(world), type(world.pipe)
    layers = {f"{layer}.lora_{part}.weight": value for layer, pair in few.items()
              for part, value in zip("AB", pair, strict=True)}  # fmt: skip
    (tmp_path / "few").mkdir()
    if hasattr(kind, "save_lora_weights"):
        kind.save_lora_weights(tmp_path / "few", transformer_lora_layers=layers)
    else:  # diffusers has no such method for this pipeline
        save_file(layers, tmp_path / "few" / FILE)
    with safe_open(tmp_path / "few" / FILE, "pt") as file:
        assert not any("alpha" in told for told in (file.metadata() or {}).values())
    stacked = zoo.world(name, folder, adapter=str(tmp_path / "ours" / "adapter"),
                        adapters=[{"path": str(tmp_path / "few"), "weight": 0.7}])  # fmt: skip
    found = stacked.dream(prompts(name, 1))[0].video
    for expert, module in world.layout.experts.items():
        add(module, ours[expert], 4 / 2)
    alone = world.dream(prompts(name, 1))[0].video
    for module in world.layout.experts.values():
        add(module, few, 0.7)
    assert apart(found, world.dream(prompts(name, 1))[0].video) <= 1 and apart(found, alone) > 2


@pytest.mark.parametrize("name", ["wan22_ti2v_5b", "wan21_i2v_14b"])
def test_an_adapter_of_kohyas_trainers_is_read_for_wan(name, tmp_path):
    """Also one of a model without pictures on one with them, whose layers for these it leaves as they are."""
    folder = zoo.save(name, tmp_path / "toy")
    world = zoo.world(name, folder)
    few, plain = drawn(world), world.dream(prompts(name, 1))[0].video
    state = {}
    for layer, (down, up) in few.items():
        _, number, rest = layer.split(".", 2)
        own = f"lora_unet_blocks_{number}_{KOHYA[rest]}"
        state |= {f"{own}.lora_down.weight": down, f"{own}.lora_up.weight": up, f"{own}.alpha": torch.tensor(6.0)}
    save_file(state, tmp_path / FILE)
    found = zoo.world(name, folder, adapters=[{"path": str(tmp_path), "weight": 0.5}]).dream(prompts(name, 1))[0].video
    add(world.transformer, few, 0.5 * 6 / RANK)
    assert apart(found, world.dream(prompts(name, 1))[0].video) <= 1 and apart(found, plain) > 2
