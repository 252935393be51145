"""The fine-tuning of a large model as it is documented for several GPUs: an adapter on a base in bf16, whose blocks are
computed again, on the parts of a batch."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dreamgen.engine.train import read_losses
from dreamgen.stages.finetune import finetune
from tests.engine.test_processes import forked
from tests.stages.test_finetune import OPTIONS, dataset, make  # noqa: F401
from tests.worlds.conftest import pipeline_folder  # noqa: F401

LORA = dict(OPTIONS, steps=2, lengths=[5], validation=0, samples=0, validate_every=0, method="lora", rank=2, lr=1e-2,
            checkpointing=True, accumulate=2)  # fmt: skip


@pytest.fixture(scope="module")
def single():
    """The run of one process."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_two_processes_write_the_adapter_that_one_writes(make, dataset, tmp_path, single, sharding):  # noqa: F811
    def work(out: Path, **how: str) -> None:
        world = make(weights="bf16")
        finetune(world, dataset, out=out, **LORA, **how)
        held = {p.dtype for p in world.transformer.parameters() if not p.requires_grad}
        assert torch.bfloat16 in held

    if not single:
        single["out"] = tmp_path / "one"
        work(single["out"])
    forked(2, lambda rank: work(tmp_path / "two", sharding=sharding))
    runs = single["out"], tmp_path / "two"
    one, two = (json.loads((out / "manifest.json").read_text()) for out in runs)
    assert one["id"] == two["id"] and (one["results"]["final_processes"], two["results"]["final_processes"]) == (1, 2)
    alone, together = (load_file(next((out / "adapter").glob("*.safetensors"))) for out in runs)
    assert alone.keys() == together.keys() and not (tmp_path / "two" / "training").exists()
    apart = torch.cat([(alone[name] - together[name]).abs().flatten() for name in alone])
    # of steps of 1e-2: AdamW divides by the size of a gradient, rounding and all, which turns a few that are nearly 0
    assert (apart > 2e-4).float().mean() < 0.01
    assert all(value.abs().max() > 5e-3 for name, value in alone.items() if "lora_B" in name)  # it was 0
    (row,), (other,) = map(read_losses, runs)
    assert row["loss"] == pytest.approx(other["loss"], rel=1e-3)
