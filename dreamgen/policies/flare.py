"""FLARE: M learnable future tokens whose activations are aligned with the embedding of the observation at t + H.

`loss = flow + weight * (1 - cosine(MLP(tokens after layer k), target))`. The target is the pooled visual embedding of
the future pictures by the policy's own encoder: a copy that follows it ("ema", decay 0.995) or its first state
("frozen"). Rows without actions train by this term alone.
"""

import copy

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

TARGETS = ("ema", "frozen")


def as_buffers(module: nn.Module) -> nn.Module:
    """Turn all parameters of `module` into buffers: saved with the model, never trained."""
    for child in module.modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            delattr(child, name)
            child.register_buffer(name, parameter.detach().clone())
    return module


class Flare(nn.Module):
    """The future tokens, their projection, and the encoder that gives the targets."""

    def __init__(self, *, encoder: nn.Module, tokens: int, width: int, target: str, decay: float) -> None:
        super().__init__()
        if target not in TARGETS:
            raise ValueError(f"flare target is '{target}'; expected one of {', '.join(TARGETS)}")
        self.count, self.decay = tokens, decay if target == "ema" else 1.0
        self.tokens = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.project = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, encoder.width))
        self.target = as_buffers(copy.deepcopy(encoder))

    @torch.no_grad()
    def follow(self, encoder: nn.Module) -> None:
        """One step of the moving average: target <- decay * target + (1 - decay) * encoder."""
        if self.decay == 1:
            return
        live = dict(encoder.named_parameters())
        for name, value in self.target.named_buffers():
            if name in live:
                value.lerp_(live[name].detach(), 1 - self.decay)

    @torch.no_grad()
    def embed(self, pictures: UInt8[Tensor, "b v h w 3"], words: Int64[Tensor, "b l"]) -> Float[Tensor, "b m c"]:
        """Visual tokens of the future, pooled to M."""
        visual, _ = self.target(pictures, words)
        return F.adaptive_avg_pool1d(visual.float().transpose(1, 2), self.count).transpose(1, 2)

    def loss(self, tapped: Float[Tensor, "b m d"], target: Float[Tensor, "b m c"], known: Bool[Tensor, " b"]) -> Tensor:
        """Mean of 1 - cosine over tokens and the rows whose future is `known`."""
        distance = 1 - F.cosine_similarity(self.project(tapped).float(), target, dim=-1).mean(1)
        return (distance * known).sum() / known.sum().clamp(min=1)
