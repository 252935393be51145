"""Muon: what it makes of a gradient, and which weights it moves."""

import pytest
import torch
from torch import nn

from dreamgen.engine.muon import Muon, is_hidden, orthogonal


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_muon_steps_are_orthogonal(precision, monkeypatch):
    """In bf16 where the hardware has it; elsewhere no bf16 is touched, which would be imitated, many times slower."""
    monkeypatch.setattr("dreamgen.engine.muon.resolve", lambda *_: precision)
    if precision == "fp32":
        monkeypatch.setattr(torch.Tensor, "bfloat16", None, raising=False)
    torch.manual_seed(1)
    matrix = torch.randn(24, 40)
    singular = torch.linalg.svdvals(orthogonal(matrix))
    assert 0.6 < singular.min() and singular.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    cosine = (orthogonal(matrix) * (u @ v)).sum() / orthogonal(matrix).norm() / (u @ v).norm()
    assert cosine > 0.97
    kernel = nn.Parameter(torch.zeros(24, 5, 3, 3))
    kernel.grad = torch.randn(24, 5, 3, 3)
    Muon([kernel], lr=0.5).step()
    assert torch.linalg.svdvals(kernel.detach().flatten(1)).max() == pytest.approx(0.5, rel=0.3)


def test_muon_moves_inner_matrices_alone():
    assert is_hidden("blocks.0.attn1.to_q.weight", nn.Parameter(torch.zeros(32, 32)))
    others = {"patch_embedding.weight": (32, 24), "blocks.0.bias": (32,), "proj_out.weight": (96, 32),
              "blocks.0.small.weight": (8, 32), "position": (32, 32), "text.table.weight": (99, 32)}  # fmt: skip
    for name, shape in others.items():
        assert not is_hidden(name, nn.Parameter(torch.zeros(shape)))
