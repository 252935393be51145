"""What moves the weights, and how far at each step."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from dreamgen.engine.muon import Muon, is_hidden


def schedule(step: int, *, steps: int, warmup: int) -> float:
    """Learning-rate factor: linear warm-up, then a cosine to 0 at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def optimisers(
    model: nn.Module, *, lr: float, muon_lr: float | None, weight_decay: float, betas: Sequence[float]
) -> list[torch.optim.Optimizer]:
    """AdamW, without decay on vectors; with `muon_lr`, Muon for the hidden matrices. Each group keeps its `peak`."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = [p for name, p in named if muon_lr and is_hidden(name, p)]
    taken = {id(p) for p in hidden}
    rest = [p for _, p in named if id(p) not in taken]
    groups = [{"params": [p for p in rest if p.ndim > 1], "weight_decay": weight_decay},
              {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0}]  # fmt: skip
    made: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]))]
    if hidden:
        made.append(Muon(hidden, lr=muon_lr or 0.0))
    for optimiser in made:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return made
