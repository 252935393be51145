"""How noise is added, what is predicted, and how a sampler goes back: diffusers' conventions, converted here alone.

Flow matching: sigma runs from 1 (noise) to 0 (data), x_sigma = (1 - sigma) * x + sigma * noise, velocity v = noise - x,
and a step of the sampler is x += (sigma_next - sigma) * v (Lipman et al. 2023, arXiv:2210.02747; Esser et al. 2024,
arXiv:2403.03206, for the logit-normal times and their shift). Diffusion with v-prediction (Salimans & Ho 2022,
arXiv:2202.00512), as in CogVideoX: x_t = sqrt(a) * x + sqrt(1 - a) * noise, v = sqrt(a) * noise - sqrt(1 - a) * x.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def draw_sigma(count: int, *, shift: float, device: torch.device | None = None) -> Float[Tensor, " b"]:
    """Logit-normal times, shifted: sigma = shift * u / (1 + (shift - 1) * u)."""
    u = torch.randn(count, device=device).sigmoid()
    return shift * u / (1 + (shift - 1) * u)


def spread(value: Float[Tensor, " b"], like: Tensor) -> Tensor:
    """One value per row, to be multiplied with `like` (b ...)."""
    return value.view(-1, *[1] * (like.ndim - 1))


def noised(x: Tensor, noise: Tensor, sigma: Float[Tensor, " b"]) -> Tensor:
    """x_sigma for a batch."""
    s = spread(sigma, x)
    return (1 - s) * x + s * noise


def velocity(x: Tensor, noise: Tensor) -> Tensor:
    """What the model learns to predict."""
    return noise - x


@dataclass(frozen=True)
class Flow:
    """Flow matching; unit: what the model calls the time sigma = 1."""

    shift: float
    unit: float = 1000.0

    def draw(self, count: int, device: torch.device | None = None) -> Float[Tensor, " b"]:
        return draw_sigma(count, shift=self.shift, device=device)

    def above(self, sigma: float) -> float:
        """The share of drawn times at or above `sigma`, which is in (0, 1)."""
        u = sigma / (self.shift - (self.shift - 1) * sigma)
        return 0.5 * math.erfc(math.log(u / (1 - u)) / math.sqrt(2))

    def noised(self, x: Tensor, noise: Tensor, sigma: Float[Tensor, " b"]) -> Tensor:
        return noised(x, noise, sigma)

    def target(self, x: Tensor, noise: Tensor, sigma: Float[Tensor, " b"]) -> Tensor:
        return velocity(x, noise)

    def time(self, sigma: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The model's name for sigma."""
        return sigma * self.unit


@dataclass(frozen=True, eq=False)
class Diffusion:
    """v-prediction on a table of alpha_t (cumulated, first step first); sigma in [0, 1] is the place in the table."""

    alphas: Float[Tensor, " n"]

    @property
    def unit(self) -> float:
        """What the model calls the time sigma = 1."""
        return len(self.alphas) - 1.0

    def draw(self, count: int, device: torch.device | None = None) -> Float[Tensor, " b"]:
        return torch.rand(count, device=device)

    def time(self, sigma: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        return (sigma * self.unit).round()

    def _roots(self, sigma: Float[Tensor, " b"], like: Tensor) -> tuple[Tensor, Tensor]:
        alpha = spread(self.alphas.to(sigma.device)[self.time(sigma).long()], like).to(like.dtype)
        return alpha.sqrt(), (1 - alpha).sqrt()

    def noised(self, x: Tensor, noise: Tensor, sigma: Float[Tensor, " b"]) -> Tensor:
        signal, rest = self._roots(sigma, x)
        return signal * x + rest * noise

    def target(self, x: Tensor, noise: Tensor, sigma: Float[Tensor, " b"]) -> Tensor:
        signal, rest = self._roots(sigma, x)
        return signal * noise - rest * x


def integrate(model: Callable[[Tensor, Tensor], Tensor], x: Tensor, scheduler: Any, times: Iterable[Tensor],
              first: int = 0) -> Tensor:  # fmt: skip
    """The steps of a diffusers scheduler, whose steps are set, from number `first` on; `model(x, time)` predicts what
    the scheduler expects.

    times: the model's name for each of the scheduler's steps.
    """
    if first and hasattr(scheduler, "set_begin_index"):  # one that does not find its place from the time
        scheduler.set_begin_index(first)
    for t, time in list(zip(scheduler.timesteps, times, strict=True))[first:]:
        x = scheduler.step(model(x, time), t, x, return_dict=False)[0]
    return x
