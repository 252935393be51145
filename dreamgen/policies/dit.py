"""The diffusion transformer of the action head, in the layout of GR00T N1.

Even layers attend to the vision-language tokens (cross), odd layers attend within the sequence (self). Every layer is
`x += attention(AdaLN(x, time))`, then `x += feed_forward(LN(x))`; AdaLN shifts and scales by the flow time, without
gates. Keys and values of the cross attention depend on the observation alone: `context` computes them once and the
Euler steps share them. 16 layers of 32 x 48 on 1536-wide tokens give N1's published 537.8M parameters, 32 on 2048-wide
tokens N1.6's 1,091.7M.
"""

import contextlib

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

KeyValue = tuple[Tensor, Tensor, Tensor | None]  # and which of them are there; None: all


class Attention(nn.Module):
    """Multi-head attention whose keys and values can be computed ahead."""

    def __init__(self, *, width: int, heads: int, context_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(context_width, width)
        self.to_v = nn.Linear(context_width, width)
        self.to_out = nn.Linear(width, width)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def key_value(self, context: Float[Tensor, "b n c"], there: Bool[Tensor, "b n"] | None = None) -> KeyValue:
        """Keys and values (b, heads, n, width / heads), and a mask (b 1 1 n) where not all of them are `there`."""
        mask = None if there is None else there[:, None, None]
        return self._split(self.to_k(context)), self._split(self.to_v(context)), mask

    def forward(self, x: Float[Tensor, "b l d"], kv: KeyValue) -> Float[Tensor, "b l d"]:
        key, value, mask = kv
        # torch's fused attention spends on a CPU ten times a plain one's time in the backward pass
        plain = x.device.type == "cpu" and torch.is_grad_enabled()
        with sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext():
            y = F.scaled_dot_product_attention(self._split(self.to_q(x)), key, value, attn_mask=mask)
        return self.to_out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One layer; `context_width` None makes it a self-attention layer."""

    def __init__(self, *, width: int, heads: int, context_width: int | None, activation: str) -> None:
        super().__init__()
        self.crosses = context_width is not None
        self.norm1 = nn.LayerNorm(width, eps=1e-5, elementwise_affine=False)
        self.modulate = nn.Linear(width, 2 * width)
        self.attention = Attention(width=width, heads=heads, context_width=context_width or width)
        self.norm2 = nn.LayerNorm(width, eps=1e-5, elementwise_affine=False)
        self.feed_forward = FeedForward(width, activation_fn=activation)

    def forward(self, x: Tensor, time: Float[Tensor, "b d"], kv: KeyValue | None, valid: Tensor | None) -> Tensor:
        scale, shift = self.modulate(F.silu(time))[:, None].chunk(2, dim=-1)
        return self.modulated(x, scale, shift, kv, valid)

    def modulated(self, x: Tensor, scale: Tensor, shift: Tensor, kv: KeyValue | None, valid: Tensor | None) -> Tensor:
        """The layer with its AdaLN numbers given."""
        y = self.norm1(x) * (1 + scale) + shift
        x = x + self.attention(y, kv if self.crosses else self.attention.key_value(y, valid))
        return x + self.feed_forward(self.norm2(x))


class DiT(nn.Module):
    """Sequence (b l width), flow time (b,), cross-attention context -> (b l out_width)."""

    def __init__(self, *, layers: int, heads: int, head_width: int, context_width: int, out_width: int,
                 activation: str = "gelu-approximate") -> None:  # fmt: skip
        super().__init__()
        self.width = width = heads * head_width
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=1)
        self.time_embedding = TimestepEmbedding(256, width)
        self.blocks = nn.ModuleList(
            Block(width=width, heads=heads, context_width=None if k % 2 else context_width, activation=activation)
            for k in range(layers)
        )
        self.norm_out = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulate_out = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, out_width)

    def context(
        self, tokens: Float[Tensor, "b n c"], there: Bool[Tensor, "b n"] | None = None
    ) -> list[KeyValue | None]:
        """Keys and values of each layer for an observation; None where the layer attends to the sequence itself.
        Nothing attends to tokens that are not `there`; None: all are."""
        return [block.attention.key_value(tokens, there) if block.crosses else None for block in self.blocks]

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        time: Float[Tensor, " b"],
        context: list[KeyValue | None],
        *,
        valid: Bool[Tensor, "b l"] | None = None,
        tap: int | None = None,
    ) -> tuple[Float[Tensor, "b l o"], Float[Tensor, "b l d"] | None]:
        """The output and the activations after layer `tap` (counted from 1). Nothing attends to entries not `valid`."""
        time = self.time_embedding(self.time_proj(time.float() * 1000).to(x.dtype))
        tapped = None
        for number, (block, kv) in enumerate(zip(self.blocks, context, strict=True), start=1):
            x = block(x, time, kv, valid)
            if number == tap:
                tapped = x
        scale, shift = self.modulate_out(F.silu(time))[:, None].chunk(2, dim=-1)
        return self.out(self.norm_out(x) * (1 + scale) + shift), tapped


def repeat_context(context: list[KeyValue | None], times: int) -> list[KeyValue | None]:
    """Each row `times` in a row: several noise draws then share one encoded observation."""
    if times == 1:
        return context
    repeated = [[None if x is None else x.repeat_interleave(times, 0) for x in kv or ()] for kv in context]
    return [(key[0], key[1], key[2]) if key else None for key in repeated]


def count(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


def on_meta(**config: int) -> DiT:
    """A DiT without memory, for counting."""
    with torch.device("meta"):
        return DiT(**config)
