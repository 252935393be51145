"""Blocks compiled in place: when, and that nothing else changes."""

import pytest
import torch
from torch import nn

from dreamgen.engine import compiling
from dreamgen.engine.compiling import compile_blocks, no_new_code, wanted


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU("tanh")) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def on_cpu(monkeypatch, compiler, headers="."):
    monkeypatch.setattr(compiling, "best_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(compiling.sysconfig, "get_path", lambda name: headers)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: compiler)


def test_auto_compiles_where_there_is_a_compiler_and_enough_to_do(monkeypatch, tmp_path):
    on_cpu(monkeypatch, "/usr/bin/c++", tmp_path)
    assert not wanted("auto", steps=1000)  # no headers
    (tmp_path / "Python.h").touch()
    assert wanted("auto", steps=100) and not wanted("auto", steps=99) and wanted(True, steps=1)
    assert not wanted(False, steps=1000)
    on_cpu(monkeypatch, None)
    assert not wanted("auto", steps=1000)


def test_what_cannot_be_is_an_error(monkeypatch, tmp_path):
    on_cpu(monkeypatch, None)
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
        wanted(True, steps=1)
    on_cpu(monkeypatch, "/usr/bin/c++", tmp_path)
    with pytest.raises(ValueError, match="needs Python's headers"):
        wanted(True, steps=1)
    with pytest.raises(ValueError, match="expected one of"):
        wanted("sometimes", steps=1)


@pytest.mark.skipif(bool(compiling.missing()), reason="nothing to compile with")
def test_the_same_function_with_the_same_names():
    torch.manual_seed(0)
    net, x = Net(), torch.randn(4, 8)
    names, want = list(net.state_dict()), net(x)
    compile_blocks(net)
    torch.testing.assert_close(net(x), want)
    assert list(net.state_dict()) == names
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with no_new_code(), torch.no_grad():
        torch.testing.assert_close(net(torch.randn(7, 8)).shape, torch.Size([7, 8]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted
