"""What a run says of itself: waiting for data, speed, trackers, early stop, memory."""

import time

import pytest
import torch
from torch import nn

from dreamgen.engine.ahead import Ahead
from dreamgen.engine.devices import device
from dreamgen.engine.shares import WholeNoise, bounds, read, rows, share
from dreamgen.engine.state import save
from dreamgen.engine.train import read_losses, train


class Slope(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 2.0))

    def loss(self, batch):
        return (self.weight * batch["x"]).square().mean(), {}


def batch_at(step: int) -> dict[str, torch.Tensor]:
    return {"x": torch.ones(4, 3)}


def run(out, steps=6, make_batch=batch_at, **changed):
    model = Slope()
    options = {"lr": 1e-1, "warmup": 1, "ema": None, "precision": "fp32", "log_every": 1}
    return model, train(model, make_batch, out=out, steps=steps, **{**options, **changed})


def test_a_metric_of_some_steps_is_their_mean(tmp_path, monkeypatch):
    def loss(self, batch):
        error = (self.weight * batch["x"]).square().mean()
        return error, {"odd": torch.tensor(float(batch["step"]))} if batch["step"] % 2 else {}

    monkeypatch.setattr(Slope, "loss", loss)
    run(tmp_path, 7, lambda step: {"x": torch.ones(4, 3), "step": torch.tensor(step)}, log_every=4)
    first, last = read_losses(tmp_path)
    assert first["odd"] == (1 + 3) / 2 and last["odd"] == 5


def test_waiting_for_data_is_measured_and_reading_ahead_hides_it():
    def slow(step):
        time.sleep(0.03)
        return step

    ahead = Ahead(slow, 4)
    assert ahead(0) == 0 and ahead.waited >= 0.03
    before = ahead.waited
    time.sleep(0.2)  # while one works, two batches are made
    assert (ahead(1), ahead(2)) == (1, 2) and ahead.waited - before < 0.03
    assert ahead(3) == 3 and [ahead(k) for k in (1, 3)] == [1, 3]  # going back is slow, but right


def test_a_row_has_the_share_of_waiting_and_of_the_peak(tmp_path):
    def slow(step):
        time.sleep(0.05)
        return batch_at(step)

    _, found = run(tmp_path / "slow", make_batch=slow, flops=1e9)
    assert found["data_wait"] > 0.5 and all(0 < row["of_peak"] < 1 for row in read_losses(tmp_path / "slow"))
    row = read_losses(tmp_path / "slow")[-1]
    assert row["tflops"] == pytest.approx(row["of_peak"] * device("here").bf16 / 1e12, rel=0.05, abs=1e-4)


def test_it_stops_where_validation_stops_to_fall_and_returns_the_best(tmp_path):
    seen = {}

    def validate(model, step):
        seen[step] = model.weight.detach().clone()
        return {"loss": [9, 5, 6, 7, 8, 1][step - 1]}

    model, found = run(tmp_path, validate=validate, validate_every=1, patience=2, checkpoint_every=1)
    assert found["steps"] == 4 and torch.equal(model.weight, seen[2])
    assert found["validation"] == {"loss": 5, "step": 2}  # of the weights that are returned
    again, later = run(tmp_path, validate=validate, validate_every=1, patience=2)
    assert later["steps"] == 4 and torch.equal(again.weight, seen[2])


def test_a_killed_run_remembers_its_best(tmp_path):
    def validate(model, step):
        if step == 3 and not list(tmp_path.glob("told")):
            (tmp_path / "told").write_text("")
            raise KeyboardInterrupt
        return {"loss": [9, 5, 6, 7, 8, 1][step - 1]}

    options = dict(validate=validate, validate_every=1, patience=2, checkpoint_every=1)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, **options)
    assert run(tmp_path, **options)[1]["steps"] == 4


def test_a_state_that_is_kept_is_not_written_again(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr("dreamgen.engine.train.save", lambda folder, step, *rest, write: written.append(step)
                        or save(folder, step, *rest, write=write))  # fmt: skip
    options = dict(validate=lambda model, step: {"loss": [9, 5, 6, 7][step - 1]}, validate_every=1, patience=2)
    assert run(tmp_path, checkpoint_every=1, **options)[1]["steps"] == 4
    assert written == [1, 2, 3, 4]  # a kill within a fourth state that is written twice would leave none


def test_rows_are_whole_after_a_power_cut_and_while_they_are_written(tmp_path, monkeypatch):
    run(tmp_path, 3)
    rows = read_losses(tmp_path)
    with (tmp_path / "losses.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert read_losses(tmp_path) == rows and len(rows) == 3

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, 5)
    assert read_losses(tmp_path) == rows
    run(tmp_path, 5)
    assert [row["step"] for row in read_losses(tmp_path)] == [0, 1, 2, 3, 4]


def test_tensorboard_has_the_rows(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, tracker="tensorboard")
    events = EventAccumulator(str(tmp_path / "train")).Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([r["loss"] for r in read_losses(tmp_path)])


def test_trackers_that_are_not_there_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="tracker is 'paper'; expected one of tensorboard, wandb, trackio"):
        run(tmp_path, tracker="paper")
    monkeypatch.setattr("dreamgen.engine.journal.find_spec", lambda name: None)
    for tracker, package in (("tensorboard", "tensorboard"), ("wandb", r"-e '\.\[wandb\]' in dreamgen's folder")):
        with pytest.raises(ValueError, match=f"'{tracker}' is not installed; pip install {package}, or choose null"):
            run(tmp_path, tracker=tracker)


def test_out_of_memory_says_what_would_fit(tmp_path, monkeypatch):
    def large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    what = r"checkpointing=true, accumulate=4 \(the same result\), method=lora, sharding=fsdp2 .*, a smaller batch"
    with pytest.raises(ValueError, match=f"out of memory at step 0.*in this order: {what}"):
        run(tmp_path, make_batch=large, accumulate=2, sharding="ddp")
    with pytest.raises(ValueError, match=r"in this order: accumulate=2 \(the same result\), a smaller batch \("):
        run(tmp_path, make_batch=large, accumulate=1)
    with pytest.raises(ValueError, match=r"in this order: a smaller batch \("):  # of what the stage has
        run(tmp_path, validate=lambda model, step: large(step), validate_every=1)
    for place in ("torch.optim.AdamW.step", "dreamgen.engine.train.Ema"):  # moments; the average
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="out of memory at step 0"):
            patch.setattr(place, large)
            run(tmp_path / place, ema=0.9)


def test_parts_are_those_of_tensor_split():
    x = torch.arange(7)
    batch = {"x": x, "n": torch.tensor(3.0), "deep": {"y": x[:, None]}}
    for count in (1, 2, 3):
        for rank, part in enumerate(x.tensor_split(count)):
            start, stop = bounds(7, rank, count)
            assert torch.equal(x[start:stop], part) and torch.equal(share(batch, rank, count)["x"], part)
    assert rows(batch) == 7 and share(batch, 1, 2)["n"] == 3 and rows(torch.tensor(1.0)) == 1


@pytest.mark.parametrize("draw", [
    lambda n: torch.randn_like(torch.ones(n, 2)), lambda n: torch.rand(n), lambda n: torch.randn(size=(n, 3)),
    lambda n: torch.randint(9, (n,)), lambda n: torch.rand((n, 2, 1)), lambda n: torch.randn(n * 4, 2),
    lambda n: torch.randn(n * 4, 3),  # as many entries as a part has rows
    lambda n: torch.bernoulli(torch.full((n, 3), 0.4)),
])  # fmt: skip
def test_the_noise_of_a_part_is_its_part_of_the_whole(draw):
    torch.manual_seed(3)
    whole = draw(7)
    for start, stop in ((0, 3), (3, 7)):
        torch.manual_seed(3)
        with WholeNoise(start, stop, 7):
            found = draw(stop - start)
        times = len(whole) // 7
        assert torch.equal(found, whole[start * times : stop * times])
    assert read(whole) is whole
