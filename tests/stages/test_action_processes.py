"""Fine-tuning under actions on several processes, on shared latents, and as much of it as a device holds."""

import json
import os
import signal

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from safetensors.torch import load_file, save_file

from dreamgen.engine.processes import Processes
from dreamgen.engine.state import whole
from dreamgen.engine.train import read_losses
from dreamgen.stages import memory
from dreamgen.stages.action_windows import Source
from dreamgen.stages.finetune_actions import finetune_actions
from dreamgen.worlds.action import ActionWorld
from dreamgen.worlds.prefix import PrefixWorld
from tests.engine.test_processes import forked
from tests.stages.test_action_worlds import dataset  # noqa: F401
from tests.worlds.conftest import pipeline_folder  # noqa: F401
from tests.worlds.test_action import disturbed, robot

OPTIONS = dict(steps=2, batch_size=5, lr=1e-2, warmup=1, hop=4, validation=1, validate_every=2, samples=1, seed=1,
               compile=False, record={"a": 1})  # fmt: skip


@pytest.fixture
def make(pipeline_folder):  # noqa: F811
    def built(**changed) -> ActionWorld:
        torch.manual_seed(0)
        world = PrefixWorld(robot=robot(), path=str(pipeline_folder), frames=9, steps=2, guidance=1.0, text_length=15,
                            precision="fp32")  # fmt: skip
        return ActionWorld(world=world, width=20, **{"maps": True, "history": [0.2], **changed})

    return built


def weights(out) -> dict[str, torch.Tensor]:
    """All that a run has saved."""
    return {f"{path.relative_to(out)} {name}": value for path in sorted(out.glob("**/*.safetensors"))
            if "cache" not in path.parts for name, value in load_file(path).items()}  # fmt: skip


@pytest.fixture(scope="module")
def single():
    """Runs of one process, by method."""
    return {}


@pytest.mark.parametrize(("sharding", "method"), [
    ("ddp", "full"), *(pytest.param(*both, marks=pytest.mark.slow)
                       for both in (("ddp", "actions"), ("fsdp2", "full"), ("fsdp2", "lora"), ("fsdp2", "actions"))),
])  # fmt: skip
def test_two_processes_write_what_one_writes(make, dataset, tmp_path, single, sharding, method):  # noqa: F811
    """Five rows in parts of three and two, with blocks that are computed again and both passes of action guidance."""
    how = {"full": {"checkpointing": True}, "lora": {"rank": 2, "alpha": 2}, "actions": {}}[method]
    options = dict(OPTIONS, method=method, **how)

    def work(out, **changed) -> None:
        finetune_actions(make(action_guidance=1.5), [dataset, dataset], out=out, **options, **changed)

    if method not in single:
        single[method] = tmp_path / "one"
        work(single[method])
    forked(2, lambda rank: work(tmp_path / "two", sharding=sharding))
    runs = single[method], tmp_path / "two"
    one, two = (json.loads((out / "manifest.json").read_text()) for out in runs)
    assert one["id"] == two["id"] and (one["results"]["final_processes"], two["results"]["final_processes"]) == (1, 2)
    alone, together = map(weights, runs)
    assert alone.keys() == together.keys() and not (tmp_path / "two" / "training").exists()
    apart = {name: float((alone[name] - together[name]).abs().max()) for name in alone}
    assert max(apart.values()) < 2e-4  # of steps of 1e-2: AdamW divides by the size of a gradient, rounding and all
    assert alone["actions.safetensors proj_out.weight"].abs().max() > 5e-3  # it was 0
    (row,), (other,) = map(read_losses, runs)
    for key in ("loss", "val_loss", "val_loss_shuffled", "val_loss_without", "val_psnr"):
        assert row[key] == pytest.approx(other[key], rel=1e-4), key
    assert (tmp_path / "two" / "samples" / "step_000002.mp4").is_file()


def test_two_processes_of_which_one_is_killed_end_in_the_same_bits(make, dataset, tmp_path, monkeypatch):  # noqa: F811
    options = dict(OPTIONS, steps=4, samples=0, cache=tmp_path / "cache", method="actions")

    def work(out, kill: bool = False) -> None:
        calls, loss = [], ActionWorld.loss

        def dying(world: ActionWorld, batch: dict) -> tuple:
            calls.extend([0] * world.training)
            if len(calls) == 4:  # after the state of step 2, in the middle of step 4
                os.kill(os.getpid(), signal.SIGKILL)
            return loss(world, batch)

        if kill:
            monkeypatch.setattr(ActionWorld, "loss", dying)
        finetune_actions(make(), [dataset], out=tmp_path / out, **options)

    forked(2, lambda rank: work("whole"))
    forked(2, lambda rank: work("killed", kill=rank == 1), killed=True)
    state = json.loads((tmp_path / "killed" / "training" / "latest.json").read_text())
    assert state == {"step": 2} and not (tmp_path / "killed" / "manifest.json").exists()
    forked(2, lambda rank: work("killed"))
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert whole.keys() == killed.keys() and all(torch.equal(whole[name], killed[name]) for name in whole)
    rows = [[{k: v for k, v in row.items() if "val" in k or k == "loss"} for row in read_losses(tmp_path / name)]
            for name in ("whole", "killed")]  # fmt: skip
    assert rows[0] == rows[1] and len(rows[0]) == 2


@pytest.mark.slow
def test_gradients_of_a_cut_model_and_its_extension_are_those_of_the_whole(make, tmp_path):
    """Weights that are zero nowhere, with memory, maps and blocks that are computed again."""
    torch.manual_seed(4)
    batch = {"latents": torch.randn(5, 6, 3, 4, 6), "text": torch.randn(5, 15, 16), "features": torch.randn(5, 2, 16),
             "maps": torch.rand(5, 8, 3, 4, 6), "memory": torch.randn(5, 6, 2, 4, 6), "ages": torch.rand(5, 2),
             "noise": torch.randn(5, 6, 3, 4, 6), "sigma": torch.linspace(0.1, 0.9, 5)}  # fmt: skip

    def world() -> ActionWorld:
        made = disturbed(make())
        made.train_full()
        made.world.transformer.enable_gradient_checkpointing()
        return made.eval()

    def work(rank: int) -> None:
        team, mine = Processes(model := world(), sharding="fsdp2"), slice(0, 3) if rank == 0 else slice(3, 5)
        assert all(whole(p) is not p for p in model.parameters() if p.requires_grad)
        rows = {key: value[mine] for key, value in batch.items()}
        (team.loss(rows)[0] * len(rows["sigma"]) / 5 * team.count).backward()
        found = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        save_file({name: value.contiguous() for name, value in found.items()}, tmp_path / str(rank))

    forked(2, work)
    (model := world()).loss(batch)[0].backward()
    want = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for rank in range(2):
        found = load_file(tmp_path / str(rank))
        assert found.keys() == want.keys() and {"extension.enter.weight", "extension.patch_maps.weight"} < want.keys()
        for name, value in want.items():
            assert value.abs().max() > 0 or "bias" in name, name
            assert torch.allclose(value, found[name], atol=1e-5 * max(1.0, float(value.abs().max()))), name


def test_runs_share_their_latents(make, dataset, tmp_path, monkeypatch):  # noqa: F811
    options = dict(OPTIONS, steps=1, method="actions")
    finetune_actions(make(), [dataset], out=tmp_path / "own", **options)
    finetune_actions(make(), [dataset], out=tmp_path / "first", cache=tmp_path / "cache", **options)
    with monkeypatch.context() as patch:
        patch.setattr(Source, "encode", lambda *_: pytest.fail("they are there"))
        finetune_actions(make(), [dataset], out=tmp_path / "again", cache=tmp_path / "cache", **options)
    assert not (tmp_path / "again" / "cache").exists()
    own, again = weights(tmp_path / "own"), weights(tmp_path / "again")
    assert own.keys() == again.keys() and all(torch.equal(own[name], again[name]) for name in own)
    with pytest.raises(ValueError, match=r"of other content \(hop: 4 -> 8\)"):
        finetune_actions(make(), [dataset], out=tmp_path / "other", cache=tmp_path / "cache", **{**options, "hop": 8})


def test_what_cannot_fit_is_said_before_the_first_step(make, dataset, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(memory, "best_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(memory, "memory_left", lambda: 1e3)
    tokens = (3 + 2) * 2 * 3  # three latent frames behind the first and one that is remembered
    with pytest.raises(ValueError, match=f"5 clips of {tokens} tokens needs .* fit: stage.method=lora"):
        finetune_actions(make(), [dataset], out=tmp_path, **OPTIONS)


def test_what_is_known_before_is_said_before_anything_is_encoded(make, dataset, tmp_path):  # noqa: F811
    for options, words in (({"sharding": "zero"}, "sharding is 'zero'"),
                           ({"accumulate": 6}, "5 rows cannot be cut into 6 parts")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            finetune_actions(make(), [dataset], out=tmp_path, **OPTIONS, **options)
        assert not (tmp_path / "cache").exists()
    world = make()
    world.world.sampler.cache = FirstBlockCacheConfig(threshold=0.1)
    with pytest.raises(ValueError, match="adapters and step_cache are for dreaming; leave them out"):
        finetune_actions(world, [dataset], out=tmp_path, **OPTIONS)
    assert not (tmp_path / "cache").exists()
