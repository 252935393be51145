"""A spatio-temporal transformer over the patches of a clip; time is causal and local.

Each layer attends over the patches of a frame, then over the past of each patch: frame k sees frames k - reach to k, by
their distance alone, so that a clip of any length is read as the training clips were, each frame once.
"""

import torch
from torch import Tensor, nn

from idm.flow import attend


class Attention(nn.Module):
    """Multi-head self-attention over the second last axis of (n l width), with an additive bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} must be divisible by its {heads} heads")
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        query, key, value = self.query_key_value(self.norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        found = attend(*(side.transpose(-3, -2) for side in (query, key, value)), bias)
        return x + self.out(found.transpose(-3, -2).flatten(-2).to(x.dtype))


class Feed(nn.Module):
    """Two linear layers around a GELU, with a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU("tanh"),
                                 nn.Linear(4 * width, width))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class Layer(nn.Module):
    """Attention within frames, then over the past where `reach` is positive, then feed-forward."""

    def __init__(self, width: int, heads: int, reach: int) -> None:
        super().__init__()
        self.reach, self.space, self.feed = reach, Attention(width, heads), Feed(width)
        self.time = Attention(width, heads) if reach else None
        self.distance = nn.Parameter(torch.zeros(heads, reach + 1)) if reach else None

    def past(self, frames: int) -> Tensor:
        """Bias (heads f f): learned by distance where frame i may see frame j, minus infinity elsewhere."""
        place = torch.arange(frames, device=self.distance.device)
        ago = place[:, None] - place
        seen = (ago >= 0) & (ago <= self.reach)
        return self.distance[:, ago.clamp(0, self.reach)].masked_fill(~seen, float("-inf"))

    def forward(self, x: Tensor) -> Tensor:
        """x (b f p width) to the same."""
        b, f, p, _ = x.shape
        x = self.space(x.flatten(0, 1)).unflatten(0, (b, f))
        if self.time is not None:
            along = x.transpose(1, 2).flatten(0, 1)
            x = self.time(along, self.past(f)).unflatten(0, (b, p)).transpose(1, 2)
        return self.feed(x)


class Patches(nn.Module):
    """Pictures (n channels h w) -> tokens (n p width) of stride 8, with their places."""

    def __init__(self, channels: int, size: tuple[int, int], width: int) -> None:
        super().__init__()
        if any(edge % 8 for edge in size):
            raise ValueError(f"the canvas is {size[0]}x{size[1]} pixels; latent actions need sides divisible by 8")
        self.grid = (size[0] // 8, size[1] // 8)
        self.net = nn.Sequential(nn.Conv2d(channels, 32, 5, 2, 2), nn.GELU(), nn.Conv2d(32, 64, 3, 2, 1), nn.GELU(),
                                 nn.Conv2d(64, width, 3, 2, 1))  # fmt: skip
        self.place = nn.Parameter(torch.randn(1, self.grid[0] * self.grid[1], width) * 0.02)

    def forward(self, frames: Tensor) -> Tensor:
        return self.net(frames).flatten(2).mT.float() + self.place
