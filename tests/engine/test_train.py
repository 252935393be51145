"""The training loop: exact resume, averaged weights, clear ends."""

import errno
import os
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dreamgen.core.seeding import rng_for
from dreamgen.engine.optimiser import optimisers
from dreamgen.engine.replicas import Replicas, in_forks
from dreamgen.engine.state import begin_with
from dreamgen.engine.train import Ema, clear_state, read_losses, schedule, train


class Line(nn.Module):
    """y = W x with noise drawn in the loss, so that the generators' state shows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(17, 19)
        self.out = nn.Linear(19, 3)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def loss(self, batch):
        found = self.out(self.inner(batch["x"] + 0.01 * torch.randn_like(batch["x"])).tanh())
        error = (found - batch["y"]).square().mean()
        return error, {"twice": 2 * error}


def batch_at(step: int) -> dict[str, torch.Tensor]:
    x = rng_for(3, "batch", step).normal(size=(5, 17)).astype(np.float32)
    return {"x": torch.from_numpy(x), "y": torch.from_numpy(x[:, :3] * 2)}


def run(out, steps, batches=batch_at, **changed):
    model = Line()
    options = {"lr": 1e-2, "warmup": 2, "ema": 0.9, "precision": "fp32", "checkpoint_every": 2, "log_every": 1}
    options |= changed
    result = train(model, batches, out=out, steps=steps, **options)
    return model, result


@pytest.mark.parametrize("muon_lr", [None, 0.02])
def test_a_run_that_is_killed_ends_in_the_same_bits(tmp_path, muon_lr):
    whole, result = run(tmp_path / "whole", 5, muon_lr=muon_lr)
    calls = []

    def dies(step):
        calls.append(step)
        if step == 3:
            raise KeyboardInterrupt
        return batch_at(step)

    with pytest.raises(KeyboardInterrupt):
        train(Line(), dies, out=tmp_path / "cut", steps=5, lr=1e-2, warmup=2, ema=0.9, precision="fp32",
              checkpoint_every=2, log_every=1, muon_lr=muon_lr)  # fmt: skip
    again, second = run(tmp_path / "cut", 5, muon_lr=muon_lr)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    first, later = read_losses(tmp_path / "whole"), read_losses(tmp_path / "cut")
    assert [row["loss"] for row in first] == [row["loss"] for row in later]
    assert [row["step"] for row in later] == [0, 1, 2, 3, 4] and result["loss"] == second["loss"]


@pytest.mark.parametrize("rows", [5, 4])
def test_replicas_give_the_gradient_of_the_whole_batch(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)  # without noise a batch in two parts is the same batch
    some = lambda step: {k: v[:rows] for k, v in batch_at(step).items()}  # noqa: E731
    results = []
    for count in (1, 2):
        model = Line()
        train(model, some, out=tmp_path / str(count), steps=4, lr=1e-2, warmup=2, ema=None, precision="fp32",
              log_every=1, replicas=count)  # fmt: skip
        results.append((model, read_losses(tmp_path / str(count))))
    for a, b in zip(results[0][0].parameters(), results[1][0].parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert [r["loss"] for r in results[0][1]] == pytest.approx([r["loss"] for r in results[1][1]], rel=1e-5)


class Two(Line):
    """With a head that only some steps use."""

    def __init__(self):
        super().__init__()
        self.second = nn.Linear(17, 2)

    def loss(self, batch):
        error, metrics = super().loss(batch)
        return error + (self.second(batch["x"]).square().mean() if "second" in batch else 0.0), metrics


def test_replicas_leave_alone_what_a_step_did_not_use(tmp_path, monkeypatch):
    """As one process does: neither momentum nor weight decay moves it."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    results = []
    for count in (1, 2):
        model = Two()
        train(model, lambda step: batch_at(step) | ({"second": True} if step == 1 else {}), out=tmp_path / str(count),
              steps=4, lr=1e-2, warmup=2, ema=None, precision="fp32", replicas=count, weight_decay=0.3)  # fmt: skip
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)


def test_a_finished_run_only_restores(tmp_path):
    model, _ = run(tmp_path, 3)
    again = Line()
    train(again, lambda step: pytest.fail("no batch is needed"), out=tmp_path, steps=3, ema=0.9, precision="fp32")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    clear_state(tmp_path)
    assert not (tmp_path / "training").exists() and read_losses(tmp_path)


def test_it_learns_and_leaves_frozen_weights_alone(tmp_path):
    model, result = run(tmp_path, 150, lr=2e-2, log_every=50)
    rows = read_losses(tmp_path)
    assert rows[-1]["loss"] < 0.3 * rows[0]["loss"]
    assert rows[-1]["twice"] == pytest.approx(2 * rows[-1]["loss"], rel=1e-5)
    assert torch.equal(model.frozen, torch.ones(2)) and result["steps"] == 150


def test_validation_sees_the_averaged_weights(tmp_path):
    seen = {}

    def validate(model, step):
        seen[step] = model.out.weight.clone()
        return {"norm": model.out.weight.norm().item()}

    model, result = run(tmp_path, 4, validate=validate, validate_every=2)
    assert set(seen) == {2, 4} and torch.equal(seen[4], model.out.weight)
    assert result["validation"]["norm"] == pytest.approx(float(model.out.weight.norm()))
    assert "val_norm" in read_losses(tmp_path)[1] and "val_norm" not in read_losses(tmp_path)[0]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path):
    def bad(step):
        batch = batch_at(step)
        return {k: v * float("nan") for k, v in batch.items()} if step == 3 else batch

    whole, _ = run(tmp_path / "whole", 5)
    for every in (2, 3, 5):  # states kept on the way: an older one, this one, none
        with pytest.raises(ValueError, match="loss is nan at step 3 of episode 7.*training holds .* that of step 3"
                           ) as said:  # fmt: skip
            run(tmp_path / str(every), 5, batches=bad, checkpoint_every=every, describe=lambda s: "episode 7",
                restarts=tmp_path / "run" if every == 2 else None)  # fmt: skip
        assert "choose another `out`" in str(said.value)
        assert (f"(stage.start={tmp_path / 'run'} begins with its weights)" in str(said.value)) == (every == 2)
        again, _ = run(tmp_path / str(every), 5)  # with the data mended
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
        assert [row["step"] for row in read_losses(tmp_path / str(every))] == [0, 1, 2, 3, 4]


class Steep(Line):
    """Of finite loss, whose gradient is none: the root of 0."""

    def loss(self, batch):
        error, metrics = super().loss(batch)
        return error + (self.out.bias * batch.get("steep", 0.0)).abs().sum().sqrt() * 0.0, metrics


def test_a_model_that_moves_in_its_loss_has_no_replicas(tmp_path):
    model = Line()
    model.moves_in_loss = True
    with pytest.raises(ValueError, match=r"set stage\.replicas=1"):
        train(model, batch_at, out=tmp_path, steps=1, precision="fp32", replicas=2)


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path, replicas):
    def bad(step):
        return {**batch_at(step), "steep": torch.zeros(()) if step == 1 else torch.ones(())}

    model = Steep()
    with pytest.raises(ValueError, match="norm of the gradient is nan at step 1 of episode 7.*that of step 1"):
        train(model, bad, out=tmp_path, steps=3, precision="fp32", replicas=replicas, describe=lambda s: "episode 7")
    assert all(p.isfinite().all() for p in model.parameters())
    kept = load_file(tmp_path / "training/step_00000001/model.safetensors")
    assert all(torch.equal(kept[name], p) for name, p in model.named_parameters() if p.requires_grad)


class Codebook(Line):
    """Something that a loss moves, and spoils."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("code", torch.zeros(3))

    def loss(self, batch):
        error, metrics = super().loss(batch)
        self.code.lerp_(error.detach().expand(3), 0.5)
        return error, metrics


def test_what_a_loss_has_spoilt_is_not_kept(tmp_path):
    bad = lambda step: {k: v * float("nan") for k, v in batch_at(step).items()} if step else batch_at(0)  # noqa: E731
    with pytest.raises(ValueError, match="nan at step 1.*No state was kept"):
        train(Codebook(), bad, out=tmp_path, steps=3, precision="fp32")
    assert not (tmp_path / "training").exists()


def test_what_moves_with_the_weights_moves_once_a_step(tmp_path):
    class Counted(Line):
        def after_step(self):
            seen.append(self.out.weight.clone())

    seen, model = [], Counted()
    train(model, batch_at, out=tmp_path, steps=3, ema=None, precision="fp32", accumulate=2)
    assert len(seen) == 3 and torch.equal(seen[-1], model.out.weight) and not torch.equal(seen[0], seen[1])


class Torn(Exception):
    pass


@pytest.mark.parametrize(("raised", "told"), [
    (UnicodeDecodeError("utf-8", b"x", 0, 1, "video 3 cannot be read"), (ValueError, "video 3 cannot be read")),
    (OSError(errno.ENOSPC, "No space left on device", "x.bin"), (OSError, "No space left on device: 'x.bin'")),
    (Torn("video 3"), (RuntimeError, "with Torn: video 3")),
])  # fmt: skip
def test_an_error_of_a_fork_is_told_as_it_is(raised, told):
    def step(step: int, rank: int) -> dict[str, float]:
        if rank and step:
            raise raised
        return {"loss": 1.0}

    def work(rank: int) -> None:
        step(1, rank)

    kind, text = told
    with pytest.raises(kind, match=text) as found, Replicas(Line(), step, 2) as group:
        assert group.run(0) == {"loss": 1.0}
        group.run(1)
    assert getattr(found.value, "errno", None) == getattr(raised, "errno", None)
    with pytest.raises(kind, match=text):
        in_forks(work, 2)


def test_a_fork_that_is_killed_is_told():
    def work(rank: int) -> None:
        if rank:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match="was killed; run the job again"):
        in_forks(work, 2)


def test_average_warms_up():
    model = Line()
    average = Ema(model, 0.999)
    with torch.no_grad():
        model.out.bias.fill_(1.0)
    before = average.shadow["out.bias"].clone()
    average.update(model, 0)  # decay 1 / 10
    assert torch.allclose(average.shadow["out.bias"], before * 0.1 + 0.9)
    assert "frozen" not in average.shadow


def test_some_weights_have_a_rate_of_their_own():
    """A tenth of the step for what begins with `inner`; Muon leaves it alone."""
    before = [p.detach().clone() for p in Line().parameters()]
    for muon_lr in (None, 0.02):
        model = Line()
        (mover,) = optimisers(model, lr=1e-2, muon_lr=muon_lr, weight_decay=0.0, betas=(0.9, 0.99),
                              rates={"inner.": 0.1})  # fmt: skip
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        mover.step()
        moved = {name: float((p - old).abs().max())
                 for (name, p), old in zip(model.named_parameters(), before, strict=True)}  # fmt: skip
        want = {"inner.weight": 1e-3, "inner.bias": 1e-3, "out.weight": 1e-2, "out.bias": 1e-2, "frozen": 0.0}
        assert moved == pytest.approx(want, rel=1e-3)
    plain = optimisers(Line(), lr=1e-2, muon_lr=None, weight_decay=0.3, betas=(0.9, 0.99))[0].param_groups
    assert [(len(g["params"]), g["weight_decay"], g["peak"]) for g in plain] == [(2, 0.3, 1e-2), (2, 0.0, 1e-2)]


def test_a_model_begins_with_the_weights_of_a_run(tmp_path):
    model, _ = run(tmp_path / "a", 3)
    averaged = Line()
    begin_with(averaged, tmp_path / "a")  # of the state that was kept
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), averaged.parameters(), strict=True))
    (tmp_path / "b").mkdir()
    save_file({**Line().state_dict(), "out.bias": torch.full((3,), 7.0)}, tmp_path / "b/model.safetensors")
    begin_with(averaged, tmp_path / "b")  # of what was saved
    assert (averaged.out.bias == 7).all()
    other = Line()
    other.out = nn.Linear(19, 4)
    with pytest.raises(ValueError, match="b is no beginning for this model: 0 .*, and 2 .*the first is out"):
        begin_with(other, tmp_path / "b")
    with pytest.raises(ValueError, match="holds neither saved weights nor the state of a training"):
        begin_with(other, tmp_path)


def test_schedule_is_linear_then_cosine():
    assert [schedule(s, steps=12, warmup=2) for s in (0, 1, 2, 7)] == pytest.approx([0.5, 1.0, 1.0, 0.5])


def test_nothing_to_train_is_said(tmp_path):
    model = Line().requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable weight"):
        train(model, batch_at, out=tmp_path, steps=1)
