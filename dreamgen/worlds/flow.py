"""Flow matching in diffusers' convention, converted here and nowhere else.

sigma runs from 1 (noise) to 0 (data): x_sigma = (1 - sigma) * x + sigma * noise, velocity v = noise - x, and a step of
the sampler is x += (sigma_next - sigma) * v (Lipman et al. 2023, arXiv:2210.02747; Esser et al. 2024,
arXiv:2403.03206, for the logit-normal times and their shift).
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def draw_sigma(count: int, *, shift: float, device: torch.device | None = None) -> Float[Tensor, " b"]:
    """Logit-normal times, shifted: sigma = shift * u / (1 + (shift - 1) * u)."""
    u = torch.randn(count, device=device).sigmoid()
    return shift * u / (1 + (shift - 1) * u)


def noised(x: Tensor, noise: Tensor, sigma: Float[Tensor, " b"]) -> Tensor:
    """x_sigma for a batch."""
    s = sigma.view(-1, *[1] * (x.ndim - 1))
    return (1 - s) * x + s * noise


def velocity(x: Tensor, noise: Tensor) -> Tensor:
    """What the model learns to predict."""
    return noise - x


def sample(model: Callable[[Tensor, Tensor], Tensor], noise: Tensor, scheduler: Any, steps: int) -> Tensor:
    """Integrate from noise to data with a diffusers scheduler; `model(x, timestep)` predicts the velocity."""
    scheduler = deepcopy(scheduler)
    scheduler.set_timesteps(steps, device=noise.device)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x, return_dict=False)[0]
    return x
