"""What moves the weights, and how far at each step."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from dreamgen.engine.muon import Muon, is_hidden


def schedule(step: int, *, steps: int, warmup: int) -> float:
    """Learning-rate factor: linear warm-up, then a cosine to 0 at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def optimisers(
    model: nn.Module,
    *,
    lr: float,
    muon_lr: float | None,
    weight_decay: float,
    betas: Sequence[float],
    rates: Mapping[str, float] | None = None,
) -> list[torch.optim.Optimizer]:
    """AdamW, without decay on vectors; with `muon_lr`, Muon for the hidden matrices. Each group keeps its `peak`.

    rates: beginning of names to what `lr` is multiplied by for these weights, which Muon leaves alone.
    """

    def rate(name: str) -> float:
        return next((times for start, times in (rates or {}).items() if name.startswith(start)), 1.0)

    named = [(name, p, rate(name)) for name, p in model.named_parameters() if p.requires_grad]
    hidden = [p for name, p, times in named if muon_lr and is_hidden(name, p) and times == 1]
    taken = {id(p) for p in hidden}
    rest = [(p, times) for _, p, times in named if id(p) not in taken]
    groups = [{"params": [p for p, own in rest if own == times and (p.ndim > 1) == matrix], "lr": lr * times,
               "weight_decay": weight_decay if matrix else 0.0}
              for times in sorted({1.0, *(own for _, own in rest)}) for matrix in (True, False)]  # fmt: skip
    made: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]))]
    if hidden:
        made.append(Muon(hidden, lr=muon_lr or 0.0))
    for optimiser in made:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return made
