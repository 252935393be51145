"""Muon: momentum whose matrices are replaced by their nearest orthogonal one (K. Jordan et al., 2024).

Hidden weights then move equally in all directions, and small models learn in a fraction of AdamW's steps. Convolutions
count as matrices (out, in * kernel), which `torch.optim.Muon` does not take. Embeddings, first and last layers, gains
and biases stay with AdamW.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from dreamgen.engine.precision import resolve

OUTER = ("embed", "conv_in", "conv_out", "proj_out", "shared", "relative", "table", "quant_conv")


def is_hidden(name: str, parameter: nn.Parameter) -> bool:
    """True for the matrices that Muon moves: inner layers with at least 16 inputs and outputs."""
    if parameter.ndim < 2 or not name.endswith("weight") or any(part in name for part in OUTER):
        return False
    return min(parameter.shape[0], parameter[0].numel()) >= 16


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """About U V^T of `matrix` = U S V^T, by a quintic Newton-Schulz iteration.

    It is in bf16 where the hardware multiplies it; a CPU that must imitate bf16 takes thirty times as long as in fp32.
    """
    x = matrix.bfloat16() if resolve("auto", matrix.device) == "bf16" else matrix.float()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        a = x @ x.T
        x = torch.addmm(x, torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)  # 3.4445 x + (...) x
    return (x.T if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; an update has spectral norm lr * sqrt(max(1, out / in))."""

    def __init__(self, parameters: Iterable[nn.Parameter], *, lr: float = 0.02, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update. On a CPU each core works on matrices of its own: they are too small to be shared."""
        moved = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        if not moved or moved[0][0].is_cuda or cores == 1:
            for parameter, group in moved:
                self._move(parameter, group)
            return
        moved.sort(key=lambda pair: -pair[0].numel())
        with ThreadPoolExecutor(min(cores, 8), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(lambda pair: self._move(*pair), moved))

    @torch.no_grad()
    def _move(self, parameter: Tensor, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        moved = state["momentum"].mul_(group["momentum"]).add_(parameter.grad)
        ahead = parameter.grad.add(moved, alpha=group["momentum"]).flatten(1)
        scale = max(1.0, ahead.shape[0] / ahead.shape[1]) ** 0.5
        parameter.add_(orthogonal(ahead).view_as(parameter), alpha=-group["lr"] * scale)
