"""Matrix products in fp32 on a CPU by oneDNN.

torch gives them to MKL, whose kernels take half the width of the vector units on CPUs that are not Intel's: 100 GFLOP/s
a core where oneDNN reaches 230 (4,608 x 320 x 960, a Zen 5 core). bf16 goes through oneDNN anyway.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

SMALL = 2**21  # multiply-adds: 20 microseconds, about what calling costs


def available() -> bool:
    """Whether this build of torch and this CPU have what the module is about."""
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return wide and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@torch.library.custom_op("dreamgen::linear", mutates_args=(), device_types="cpu")  # so that compiled code calls it
def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of dense fp32 tensors on a CPU."""
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], None)


@product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    (x, weight), flat = ctx.saved_tensors, grad.flatten(0, -2)
    return (product(grad, weight.t().contiguous(), None) if ctx.needs_input_grad[0] else None,
            product(flat.t(), x.flatten(0, -2).t().contiguous(), None) if ctx.needs_input_grad[1] else None,
            flat.sum(0) if ctx.needs_input_grad[2] else None)  # fmt: skip


product.register_autograd(backward, setup_context=keep)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, by oneDNN where all are dense fp32 on a CPU and it is worth the call."""
    parts = (x, weight) if bias is None else (x, weight, bias)
    plain = all(type(p) in (Tensor, torch.nn.Parameter) and p.dtype == torch.float32 for p in parts)
    if not plain or x.device.type != "cpu" or x.ndim < 2 or weight.ndim != 2 or not x.numel():
        return F.linear(x, weight, bias)
    if x.shape[-2:].numel() * len(weight) < SMALL:  # of one of a batch, whatever its size: both round differently
        return F.linear(x, weight, bias)
    return product(x, weight, bias)


class OneDnn(TorchFunctionMode):
    """Within it every `F.linear`, that of `nn.Linear` too, is `linear`."""

    def __torch_function__(self, func: Callable, types: Sequence, args: tuple = (), kwargs: dict | None = None) -> Any:
        return (linear if func is F.linear else func)(*args, **(kwargs or {}))
