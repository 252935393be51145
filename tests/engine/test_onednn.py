"""oneDNN's products are those of `F.linear`, forward and backward, and only where they can be."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dreamgen.engine.onednn import OneDnn, available, linear
from dreamgen.engine.precision import autocast


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch):
    monkeypatch.setattr("dreamgen.engine.onednn.SMALL", 1)


pytestmark = pytest.mark.skipif(not available(), reason="oneDNN needs AVX-512 here")


@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12), (2, 3, 5, 12)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_and_gradients_are_those_of_torch(shape, bias):
    layer, x = nn.Linear(12, 9, bias=bias), torch.randn(shape, requires_grad=True)
    want = layer(x)
    want.square().sum().backward()
    wanted = [x.grad, *(p.grad for p in layer.parameters())]
    x.grad = None
    layer.zero_grad()
    with OneDnn():
        found = layer(x)
    found.square().sum().backward()
    torch.testing.assert_close(found, want)
    for grad, right in zip([x.grad, *(p.grad for p in layer.parameters())], wanted, strict=True):
        torch.testing.assert_close(grad, right)


def test_frozen_weights_get_no_gradient_and_strides_do_not_matter():
    layer, x = nn.Linear(6, 4).requires_grad_(False), torch.randn(6, 5).t().requires_grad_()
    with OneDnn():
        layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(5, 6))
    assert layer.weight.grad is None


@pytest.mark.parametrize(
    "x", [torch.randn(3, 4).double(), torch.randn(4), torch.randn(0, 4), torch.empty(3, 4, device="meta")]
)
def test_what_it_cannot_do_torch_does(x):
    weight = torch.randn(2, 4).to(x.dtype).to(x.device)
    found, want = linear(x, weight), F.linear(x, weight)
    assert found.shape == want.shape and found.dtype == want.dtype and found.device == want.device


def test_it_works_where_fp32_is_chosen_and_nowhere_else(monkeypatch):
    asked, layer, x = [], nn.Linear(4, 4), torch.randn(2, 4)
    monkeypatch.setattr("dreamgen.engine.onednn.linear", lambda *a: asked.append(1) or F.linear(*a))
    with autocast("fp32"):
        layer(x)
    assert len(asked) == 1
    with autocast("bf16"):
        assert layer(x).dtype == torch.bfloat16
    layer(x)
    assert len(asked) == 1


def test_compiled_code_calls_it():
    layer, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)), torch.randn(5, 8)
    with OneDnn(), torch.no_grad():
        torch.testing.assert_close(torch.compile(layer)(x), layer(x))
