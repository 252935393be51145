"""The state of a training on disk: gathered by one process, whole before it counts, gone without a trace."""

import os

import pytest
import torch

from dreamgen.engine.state import gathered, save
from dreamgen.engine.train import Ema, clear_state, read_losses
from tests.engine.test_train import Line, run


class Cut(torch.Tensor):
    """A tensor that is shared out, on a GPU; `calls` are what was done to it."""

    @staticmethod
    def of(name: str, calls: list[str]) -> "Cut":
        made = torch.zeros(3).as_subclass(Cut)
        made.called, made.calls = name, calls
        return made

    def full_tensor(self) -> "Cut":
        self.calls.append(f"gather {self.called}")
        return self

    def contiguous(self) -> "Cut":
        return self

    def cpu(self) -> torch.Tensor:
        self.calls.append(f"keep {self.called}")
        return torch.ones(3)


@pytest.mark.parametrize("write", [True, False])
def test_what_is_shared_out_is_gathered_one_tensor_at_a_time_and_kept_by_one_process(tmp_path, write):
    calls: list[str] = []
    found = gathered([(name, Cut.of(name, calls)) for name in "ab"], keep=write)
    assert calls == (["gather a", "keep a", "gather b", "keep b"] if write else ["gather a", "gather b"])
    assert list(found) == (["a", "b"] if write else [])

    mover = torch.optim.AdamW(Line().parameters())
    state = {"state": {k: {"exp_avg": Cut.of(str(k), calls)} for k in range(2)}, "param_groups": [{"lr": 1.0}]}
    mover.state_dict = lambda: state
    calls.clear()
    average = Ema(Line(), 0.9)
    average.shadow = {"out.bias": Cut.of("average", calls)}
    save(tmp_path, 3, Line(), average, [mover], write=write)
    assert [call for call in calls if call.startswith("gather")] == ["gather 0", "gather 1", "gather average"]
    assert (tmp_path / "latest.json").is_file() == write and (write or len(calls) == 3)
    if write:
        (kept,) = torch.load(tmp_path / "step_00000003" / "optimisers.pt", weights_only=True)
        assert all(row["exp_avg"].device.type == "cpu" for row in kept["state"].values())
        assert kept["param_groups"] == [{"lr": 1.0}]


def test_a_state_is_read_to_the_cpu_and_settled_before_it_counts(tmp_path, monkeypatch):
    seen, load, fsync = [], torch.load, os.fsync

    def synced(handle):
        if not (tmp_path / "training" / "latest.json").exists():
            seen.append(os.readlink(f"/proc/self/fd/{handle}").rpartition("/")[2])
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", synced)
        run(tmp_path, 3, checkpoint_every=9)
    named = {name for name in seen if ".partial" not in name}  # `latest.json` itself is settled before it has its name
    assert named == {"model.safetensors", "buffers.safetensors", "ema.safetensors", "optimisers.pt",
                         "step_00000003", "training", tmp_path.name}  # fmt: skip
    where = []
    monkeypatch.setattr(torch, "load", lambda *a, **k: where.append(k["map_location"]) or load(*a, **k))
    run(tmp_path, 3)
    assert where == ["cpu"]


def test_a_kill_while_the_state_is_removed_leaves_none(tmp_path, monkeypatch):
    run(tmp_path, 3)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            clear_state(tmp_path)
    assert (tmp_path / "training" / "step_00000003").is_dir()
    _, again = run(tmp_path, 3)  # begins anew
    assert again["steps"] == 3 and len(read_losses(tmp_path)) == 3
    clear_state(tmp_path)
    clear_state(tmp_path)
    assert not (tmp_path / "training").exists()
