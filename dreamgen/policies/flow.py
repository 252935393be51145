"""Flow matching: x_t = (1 - t) noise + t x, velocity u = x - noise, integrated from t = 0 (noise) to t = 1."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def sample_time(count: int, *, like: Tensor) -> Float[Tensor, " b"]:
    """t = 1 - s, s ~ Beta(1.5, 1): more weight near the noise, where the choice between modes is made (pi0, GR00T)."""
    return 1 - torch.rand(count, device=like.device) ** (1 / 1.5)


def interpolate(x: Float[Tensor, "b h a"], noise: Float[Tensor, "b h a"], t: Float[Tensor, " b"]) -> Tensor:
    """x_t (b h a)."""
    t = t[:, None, None]
    return (1 - t) * noise + t * x


def weighed(batch: dict[str, Tensor], steps: Bool[Tensor, "b h"]) -> dict[str, Tensor]:
    """A whole batch with what `mean_error` divides its parts by: `row_weight`, the weight of the `steps` of a row on
    average, and with FLARE `row_known`, the share of rows whose future is known. Numbers are not cut, so a part keeps
    them."""
    found = {"row_weight": (batch["weight"] * steps).sum(1).mean()}
    known = batch.get("future_known")
    return {**batch, **found, **({} if known is None else {"row_known": known.float().mean()})}


def mean_error(
    error: Float[Tensor, "b h a"],
    weight: Float[Tensor, "b h"],
    entries: Float[Tensor, "b 1 a"] | None,
    row_weight: Float[Tensor, ""],
) -> Tensor:
    """Mean over the steps of squared errors by their weights; entries: 1 where an action has an entry, None if all.

    row_weight: see `weighed`. The mean over the parts of a batch is that of the whole, wherever it was cut.
    """
    error = error.mean(-1) if entries is None else (error * entries).sum(-1) / entries.sum(-1)
    return (error * weight).sum() / (len(error) * row_weight).clamp(min=1e-6)


def euler(velocity: Callable[[Tensor, Tensor], Tensor], noise: Float[Tensor, "b h a"], steps: int) -> Tensor:
    """Integrate `velocity(x_t (b h a), t (b,))` in `steps` Euler steps; returns x at t = 1."""
    x = noise
    for k in range(steps):
        x = x + velocity(x, torch.full((len(x),), k / steps, device=x.device)) / steps
    return x
