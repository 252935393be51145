"""Several processes: the result of one, on the same global batch, however the batch and the model are shared."""

import gc
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dreamgen.engine.precision import autocast
from dreamgen.engine.processes import PATIENCE, Processes, first_node, from_slurm, join, wait
from dreamgen.engine.shares import Rows
from dreamgen.engine.state import read_losses
from dreamgen.engine.train import train

ROOT = Path(__file__).parents[2]


class Noisy(nn.Module):
    """Draws noise of every kind that our losses draw."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.out = nn.Linear(7, 11), nn.Linear(11, 3)

    def loss(self, batch):
        x = batch["x"]
        time = torch.distributions.Beta(torch.tensor(1.5), torch.tensor(1.0)).sample((len(x),))
        x = x + time[:, None] * torch.randn_like(x) + torch.randint(-2, 3, (len(x), 2, 1))[:, 0] * torch.rand(len(x), 1)
        error = (self.out(self.inner(x).tanh()) - batch["x"][:, :3]).square().mean()
        return error, {"time": time.mean()}


def batch_at(step: int) -> Rows:
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(step))
    return Rows(5, lambda part: {"x": x[part]})


def run(out: Path, steps: int = 4, make=Noisy, **changed) -> nn.Module:
    model = make()
    options = {"lr": 1e-2, "warmup": 2, "ema": 0.9, "precision": "fp32", "checkpoint_every": 2, "log_every": 1}
    train(model, batch_at, out=out, steps=steps, **{**options, **changed})
    return model


def forked(count: int, work: Callable[[int], None], *, killed: bool = False) -> None:
    """`work(rank)` in `count` forked processes, named as `torchrun` names those it starts; killed: one does not end."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def one(rank: int) -> None:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)  # of the process that was forked
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="localhost",
                          MASTER_PORT=str(port))  # fmt: skip
        work(rank)

    forks = [multiprocessing.get_context("fork").Process(target=one, args=(rank,)) for rank in range(count)]
    gc.collect()
    gc.freeze()  # as `dreamgen.engine.replicas.begin`: what has threads here has none there
    for fork in forks:
        fork.start()
    gc.unfreeze()
    for fork in forks:
        fork.join(240)
    codes = [fork.exitcode for fork in forks]
    assert -signal.SIGKILL in codes and 0 not in codes if killed else codes == [0] * count


def on_processes(count: int, out: Path, make=Noisy, **changed) -> dict[str, torch.Tensor]:
    """The weights that `count` processes end with, the same in all of them."""
    out.mkdir(parents=True, exist_ok=True)

    def work(rank: int) -> None:
        model = run(out, make=make, **changed)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, out / f"rank_{rank}.safetensors")

    forked(count, work)
    found = [load_file(out / f"rank_{rank}.safetensors") for rank in range(count)]
    assert all(torch.equal(found[0][k], other[k]) for other in found for k in other)
    return found[0]


def require_near(model: nn.Module, weights: dict[str, torch.Tensor], tolerance: float = 2e-6) -> None:
    for name, value in model.state_dict().items():
        assert torch.allclose(value, weights[name], atol=tolerance), name


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    out = tmp_path_factory.mktemp("single")
    return run(out), [row["loss"] for row in read_losses(out)]


@pytest.mark.parametrize(("count", "accumulate"), [(2, 1), (2, 2)])
def test_two_processes_give_the_result_of_one(single, tmp_path, count, accumulate):
    """Five rows on two processes: parts of three and two rows, or of two, one, one, one."""
    weights = on_processes(count, tmp_path, accumulate=accumulate)
    require_near(single[0], weights)
    assert [row["loss"] for row in read_losses(tmp_path)] == pytest.approx(single[1], rel=1e-5)


def test_gradients_lie_where_processes_exchange_them():
    def work(rank: int) -> None:
        team = Processes(model := Noisy())
        team.loss({"x": torch.ones(2, 7)})[0].backward()
        assert len({p.grad.untyped_storage().data_ptr() for p in model.parameters()}) == 1  # one bucket, not copied

    forked(2, work)


def test_accumulation_gives_the_result_of_the_whole_batch(single, tmp_path):
    require_near(single[0], run(tmp_path, accumulate=3).state_dict())


def test_a_run_goes_on_with_another_number_of_processes(single, tmp_path):
    class Killed(Exception):
        pass

    def dies(model, step):
        raise Killed

    with pytest.raises(Killed):  # alone, until the state of step 2 lies there
        run(tmp_path, validate=dies, validate_every=3)
    weights = on_processes(2, tmp_path)
    require_near(single[0], weights)
    assert [row["step"] for row in read_losses(tmp_path)] == [0, 1, 2, 3]


def blocks() -> nn.Module:
    from diffusers import WanTransformer3DModel

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.transformer = WanTransformer3DModel(
                patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=3, out_channels=3,
                text_dim=7, freq_dim=16, ffn_dim=40, num_layers=2, rope_max_seq_len=32,
            )  # fmt: skip
            self.video, self.text = torch.randn(3, 2, 4, 4), torch.randn(6, 7)

        def loss(self, batch):
            x = batch["x"][:, :3].view(-1, 3, 1, 1, 1) * self.video
            noise, sigma = torch.randn_like(x), torch.rand(len(x))
            found = self.transformer(
                hidden_states=x + noise * sigma.view(-1, 1, 1, 1, 1),
                timestep=sigma * 1000,
                encoder_hidden_states=batch["x"][:, None] * self.text,
                return_dict=False,
            )[0]
            return (found - x + noise).square().mean(), {}

    return Tiny()


@pytest.mark.slow
def test_a_model_cut_over_two_processes_learns_the_same_and_comes_back_whole(tmp_path):
    alone = run(tmp_path / "one", steps=3, make=blocks)
    # AdamW divides by the size of a gradient, rounding and all: how far does another order of the same sums lead?
    parts = run(tmp_path / "parts", steps=3, make=blocks, accumulate=3).state_dict()
    rounding = max(float((value - parts[name]).abs().max()) for name, value in alone.state_dict().items())
    assert rounding < 1e-3  # of steps of 1e-2
    weights = on_processes(2, tmp_path / "cut", steps=3, make=blocks, sharding="fsdp2")
    require_near(alone, weights, max(2e-6, 4 * rounding))
    whole = on_processes(2, tmp_path / "whole", steps=3, make=blocks)  # adds the same parts in the same order
    assert all(torch.allclose(value, whole[name], atol=2e-6) for name, value in weights.items())
    kept = run(tmp_path / "cut", steps=3, make=blocks)  # one process reads the state that two have cut
    require_near(kept, weights, 0.0)


@pytest.mark.slow
def test_a_model_that_is_cut_stays_cut_through_validation_and_accumulation(tmp_path):
    """Five rows in parts of two, one and one, one; the loss of the averaged weights after every step."""
    options = {"steps": 2, "make": blocks, "accumulate": 2, "validate_every": 1}
    fixed, told = {"x": torch.randn(3, 7, generator=torch.Generator().manual_seed(9))}, []

    def validate(model: nn.Module, step: int) -> dict[str, float]:
        torch.manual_seed(0)
        return {"loss": float(model.loss(fixed)[0])}

    def work(rank: int) -> None:
        model = blocks()
        plain, weight = model.loss, "transformer.blocks.0.attn1.to_q.weight"

        def loss(batch):
            if torch.is_grad_enabled():
                of = dict(model.named_parameters())[weight]
                told.append((hasattr(of, "full_tensor"), of.grad is not None and tuple(of.grad.to_local().shape)))
            return plain(batch)

        model.loss = loss
        run(tmp_path / "cut", **{**options, "make": lambda: model}, validate=validate, sharding="fsdp2")
        del model.loss
        assert told == [(True, False), (True, (12, 24))] * 2  # half of the gradient lies here between the parts
        weights = model.state_dict()  # plain, whole, and the same when it is asked for again
        assert all(type(value) is torch.Tensor for value in weights.values()) and weights[weight].shape == (24, 24)
        save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / f"rank_{rank}.safetensors")

    forked(2, work)
    whole = on_processes(2, tmp_path / "whole", **options, validate=validate)
    for rank in range(2):
        found = load_file(tmp_path / f"rank_{rank}.safetensors")
        assert all(torch.allclose(value, whole[name], atol=2e-6) for name, value in found.items())
    one, two = ([row["val_loss"] for row in read_losses(tmp_path / name)] for name in ("whole", "cut"))
    assert len(one) == 2 and one == pytest.approx(two, rel=1e-5)


def test_processes_wait_for_hours_for_one_another(tmp_path):
    def work(rank: int) -> None:
        begin = torch.distributed.init_process_group

        def spied(*given, **options):
            (tmp_path / str(rank)).write_text(str(options["timeout"]))
            begin(*given, **options)

        torch.distributed.init_process_group = spied
        join()
        wait()  # the first keeps the store in which the other looks for it

    forked(2, work)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == [str(PATIENCE)] * 2


def test_a_model_that_is_cut_keeps_no_bf16_copies():
    for cached, before in ((True, True), (False, False)):
        with autocast("bf16", cached=cached):
            assert torch.is_autocast_cache_enabled() == before
            with autocast("bf16"):  # of a sampler, in validation
                assert torch.is_autocast_cache_enabled() == before
    assert torch.is_autocast_cache_enabled()


def test_torchrun_starts_it(tmp_path):
    script = tmp_path / "run.py"
    script.write_text("import atexit, sys; from pathlib import Path; import torch.distributed as dist\n"
                      "from tests.engine.test_processes import run\n"
                      "atexit.register(lambda: print('threads left', dist.is_initialized()))\n"
                      "run(Path(sys.argv[1]), steps=2)\n")  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           str(script), str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("threads left False") == 2
    assert "steps 0 to 2" in (tmp_path / "out" / "train.log").read_text() and len(read_losses(tmp_path / "out")) == 2


def test_slurm_names_its_tasks_as_torchrun_does():
    task = {"SLURM_PROCID": "3", "SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1",
            "SLURM_STEP_NODELIST": "gpu[07-09,12],cpu1", "SLURM_JOB_ID": "345678"}  # fmt: skip
    from_slurm(task)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert [task[name] for name in names] == ["3", "8", "1", "gpu07", "25678"]
    script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}  # of a job, without srun
    for alone in (
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, script,
        {"RANK": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"},
    ):  # fmt: skip
        before = dict(alone)
        from_slurm(alone)
        assert alone == before
    assert [first_node(text) for text in ("a", "a,b", "n[3,5]", "x-[001-004]")] == ["a", "a", "n3", "x-001"]


def test_more_parts_than_rows_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"5 rows cannot be cut into 6 parts \(1 processes, accumulate 6\)"):
        run(tmp_path, accumulate=6)
    with pytest.raises(ValueError, match="sharding is 'zero'; expected one of ddp, fsdp2"):
        run(tmp_path, sharding="zero")
