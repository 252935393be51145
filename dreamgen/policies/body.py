"""Embodiment-specific weights: one matrix per body, chosen row by row of the batch.

A body is what a stream of actions belongs to: the real robot, its dreams, a latent action space. The transformer is
shared, the way in and out is each body's own.
"""

import math

import torch
from diffusers.models.embeddings import Timesteps
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F


class BodyLinear(nn.Module):
    """y = x W[body] + c[body], (b l inner) -> (b l outer); body: of each row, or one for all."""

    def __init__(self, bodies: int, inner: int, outer: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(bodies, inner, outer) / math.sqrt(max(1, inner)))
        self.bias = nn.Parameter(torch.zeros(bodies, 1, outer))

    def forward(self, x: Float[Tensor, "b l i"], body: Int64[Tensor, " b"] | int) -> Float[Tensor, "b l o"]:
        if isinstance(body, int):
            return x @ self.weight[body] + self.bias[body]
        # bodies are few: computing all and choosing is cheaper than gathering a matrix for each row
        y = x @ self.weight[0] + self.bias[0]
        for k in range(1, len(self.weight)):
            y = torch.where((body == k)[:, None, None], x @ self.weight[k] + self.bias[k], y)
        return y


class BodyMLP(nn.Module):
    """Two layers with a ReLU between."""

    def __init__(self, bodies: int, inner: int, hidden: int, outer: int) -> None:
        super().__init__()
        self.layer1 = BodyLinear(bodies, inner, hidden)
        self.layer2 = BodyLinear(bodies, hidden, outer)

    def forward(self, x: Float[Tensor, "b l i"], body: Int64[Tensor, " b"] | int) -> Float[Tensor, "b l o"]:
        return self.layer2(F.relu(self.layer1(x, body)), body)


class ActionEncoder(nn.Module):
    """Noisy actions with their flow time to tokens: W3 swish(W2 [W1 a, sinusoid(t)])."""

    def __init__(self, bodies: int, action: int, width: int) -> None:
        super().__init__()
        self.time = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=1)
        self.layer1 = BodyLinear(bodies, action, width)
        self.layer2 = BodyLinear(bodies, 2 * width, width)
        self.layer3 = BodyLinear(bodies, width, width)

    def forward(
        self,
        action: Float[Tensor, "b h a"],
        time: Float[Tensor, " b"] | Float[Tensor, "b h"],
        body: Int64[Tensor, " b"] | int,
    ) -> Float[Tensor, "b h d"]:
        """time: of each row, or of each step."""
        x = self.layer1(action, body)
        t = self.time(time.float().flatten() * 1000).to(x.dtype)
        t = t[:, None].expand(-1, x.shape[1], -1) if time.ndim == 1 else t.view_as(x)
        return self.layer3(F.silu(self.layer2(torch.cat([x, t], -1), body)), body)
