"""The action denoiser: a DiT over the robot steps of a window.

`x_t = (1 - t) * noise + t * x`, velocity target `u = x - noise`, integrated from t = 0 to t = 1. Time and frame spacing
enter through AdaLN; layers alternate cross-attention to the frame tokens and self-attention over the chunk. Keys and
values of the frames are computed once per frame, outside the denoising loop, and shared by all windows that see it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEMORIES = 1 << 27  # numbers: keys and values of all layers that are held at once


def waves(position: Tensor, width: int, longest: float = 256.0) -> Tensor:
    """Sines and cosines of `position` (...,) -> (..., width) fp32; longest: the longest wave, in its unit."""
    count = width // 2
    rate = torch.exp(torch.linspace(0, -math.log(longest), count, device=position.device)) * math.pi
    angle = position.float()[..., None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention, on CPUs in fp32: there its bf16 backward pass is four times slower."""
    mixed = query.is_cuda and torch.is_autocast_enabled("cuda")  # entered anew under fp32 it would mean fp16
    with torch.autocast(query.device.type, enabled=mixed):
        if not mixed:
            query, key, value = query.float(), key.float(), value.float()
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


class Block(nn.Module):
    """AdaLN attention (cross or self) and feed-forward; gates start open, since trainings are short."""

    def __init__(self, width: int, heads: int, cross: bool) -> None:
        super().__init__()
        self.heads, self.cross = heads, cross
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulate = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def forward(self, x: Tensor, condition: Tensor, memory: tuple[Tensor, Tensor] | None, mask: Tensor) -> Tensor:
        """x (n m s width): m draws of the chunk of window n, which share its memory; condition (n m width);
        mask (n s), True where a step exists."""
        n, m, s, _ = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulate(F.silu(condition))[:, :, None].chunk(6, dim=-1)
        h = self.norm1(x) * (1 + scale1) + shift1
        if self.cross:
            h = attend(self.split(self.query(h).flatten(1, 2)), *memory)
        else:
            key, value = self.key_value(h).flatten(0, 1).chunk(2, dim=-1)
            seen = mask[:, None].expand(n, m, s).reshape(n * m, 1, 1, s)
            h = attend(self.split(self.query(h).flatten(0, 1)), self.split(key), self.split(value), seen)
        x = x + (1 + gate1) * self.out(h.transpose(1, 2).flatten(2)).view(x.shape)
        return x + (1 + gate2) * self.feed(self.norm2(x) * (1 + scale2) + shift2)


class Denoiser(nn.Module):
    """Velocity of a chunk of embedded actions, given the tokens of the window's frames.

    Beside the attention, the summaries of the window's frames reach every step of the chunk through one perceptron:
    what a plain regression would see, and learned first.
    """

    def __init__(self, *, width: int, layers: int, heads: int, frames: int, steps: int) -> None:
        super().__init__()
        if width % heads or width % 2:
            raise ValueError(f"denoiser width {width} must be even and divisible by its {heads} heads")
        self.width = width
        self.blocks = nn.ModuleList(Block(width, heads, cross=index % 2 == 0) for index in range(layers))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.spacing = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.place = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.direct = nn.Sequential(nn.Linear(frames * width, 2 * width), nn.SiLU(),
                                    nn.Linear(2 * width, steps * width))  # fmt: skip

    def reach(self, steps: int) -> None:
        """Chunks of up to `steps` steps: weights for those that it does not reach yet are made anew."""
        last, rows = self.direct[-1], steps * self.width
        if rows <= last.out_features:
            return
        longer = nn.Linear(last.in_features, rows)
        with torch.no_grad():
            longer.weight[: last.out_features] = last.weight
            longer.bias[: last.out_features] = last.bias
        self.direct[-1] = longer

    def windows_at_once(self, tokens: Tensor, frames: int) -> int:
        """How many windows of each clip are denoised at once, at least 1: what a long clip takes is bounded."""
        each = len(tokens) * sum(block.cross for block in self.blocks) * frames * tokens.shape[2] * 2 * self.width
        return max(1, MEMORIES // each)

    def memories(self, tokens: Tensor, at: Tensor) -> tuple[list[tuple[Tensor, Tensor] | None], Tensor]:
        """Keys and values per layer, (b*k heads f*l width / heads), and what the summaries say of each step,
        (b*k s width), for all k windows of f frames at stride one.

        tokens (b c l width) of a clip's frames: projected once each, then shared by the windows that see them;
        at (k f): place of each window's frames in robot steps from its first.
        """
        count, frames = at.shape
        seen = torch.arange(count, device=at.device)[:, None] + torch.arange(frames, device=at.device)
        place = self.place(waves(at, self.width))
        found: list[tuple[Tensor, Tensor] | None] = []
        for block in self.blocks:
            if not block.cross:
                found.append(None)
                continue
            projected = block.key_value(tokens)[:, seen]  # b k f l 2w
            placed = F.linear(place, block.key_value.weight)[None, :, :, None].to(projected.dtype)
            key, value = (projected + placed).flatten(2, 3).flatten(0, 1).chunk(2, dim=-1)
            found.append((block.split(key), block.split(value)))
        summaries = tokens[:, seen, 0].flatten(0, 1).flatten(1)  # b*k f*width
        return found, self.direct(summaries).unflatten(1, (-1, self.width))

    def forward(self, x: Tensor, t: Tensor, spacing: Tensor, memories: tuple[list, Tensor], mask: Tensor) -> Tensor:
        """x (n m s width), t (n m) in [0, 1], spacing (n,) robot steps a gap, mask (n s) -> (n m s width)."""
        attended, direct = memories
        condition = self.time(waves(t * 100, self.width)) + self.spacing(waves(spacing, self.width))[:, None]
        steps = torch.arange(x.shape[2], device=x.device)
        x = x + self.place(waves(steps + 0.5, self.width)) + direct[:, None, : x.shape[2]]
        for block, memory in zip(self.blocks, attended, strict=True):
            x = block(x, condition, memory, mask)
        return self.norm(x)
