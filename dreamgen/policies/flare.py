"""FLARE: M learnable future tokens whose activations are aligned with the embedding of the observation at t + H.

`loss = flow + weight * (1 - cosine(MLP(tokens after layer k), target))` (Zheng et al. 2025, arXiv:2505.15659). What the
policy's own encoder makes of the pictures is told by its visual tokens, pooled to M, by a copy that follows it ("ema",
decay 0.995) or by its first state ("frozen"), or by the M queries of the policy's Q-Former, by a copy of both that
follows ("qformer"). The copy moves once after each step of the optimiser, and neither drops out nor adds noise. Rows
without actions train by this term alone.

The target is how the embedding of the future differs from that of the present ("change"), or the embedding of the
future itself, as published ("future"): most of that is the same at every moment, so that its cosine distance falls to
some thousandths without anything being learned of what the robot does.
"""

import copy
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from dreamgen.policies.qformer import QFormer
from dreamgen.policies.sight import by_count, joined, look

TARGETS = ("ema", "frozen", "qformer")
ALIGNED = ("change", "future")


def as_buffers(module: nn.Module) -> nn.Module:
    """Turn all parameters of `module` into buffers: saved with the model, never trained."""
    for child in module.modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            delattr(child, name)
            child.register_buffer(name, parameter.detach().clone())
    return module


def follower(encoder: nn.Module) -> nn.Module:
    """A copy of an encoder that no optimiser moves. The model inside a pretrained one that is not tuned, which never
    differs from its copy, is not copied: it lies in memory, in checkpoints and in training states once."""
    frozen = None if getattr(encoder, "tune", True) else getattr(encoder, "model", None)
    copied = copy.deepcopy(encoder, {} if frozen is None else {id(frozen): frozen})
    if frozen is not None:
        del copied.model
        object.__setattr__(copied, "model", frozen)  # no module of the copy's own
    return as_buffers(copied)


class Flare(nn.Module):
    """The future tokens, their projection, and the encoder that gives the targets."""

    def __init__(self, *, encoder: nn.Module, tokens: int, width: int, target: str, decay: float, align_to: str,
                 queries: nn.Module | None = None) -> None:  # fmt: skip
        super().__init__()
        for key, value, known in (("target", target, TARGETS), ("align_to", align_to, ALIGNED)):
            if value not in known:
                raise ValueError(f"{key} of FLARE is '{value}'; expected one of {', '.join(known)}")
        self.change = align_to == "change"
        self.count, self.decay = tokens, 1.0 if target == "frozen" else decay
        self.tokens = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.project = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, encoder.width))
        self.target = follower(encoder)
        self.target_queries = None if queries is None else as_buffers(copy.deepcopy(queries))
        self.train()

    def train(self, mode: bool = True) -> "Flare":
        """As of any module; what gives the targets stays as it is for acting: they are no noise to be learned."""
        super().train(mode)
        for copied in (self.target, self.target_queries):
            if copied is not None:
                copied.eval()
        return self

    @torch.no_grad()
    def follow(self, encoder: nn.Module, queries: nn.Module | None = None) -> None:
        """One step of the moving average: target <- decay * target + (1 - decay) * encoder, queries alike."""
        if self.decay == 1:
            return
        for copied, source in ((self.target, encoder), (self.target_queries, queries)):
            live = {} if copied is None else {n: p for n, p in source.named_parameters() if p.requires_grad}
            for name, value in copied.named_buffers() if live else ():
                if name in live:
                    value.lerp_(live[name].detach(), 1 - self.decay)

    @torch.no_grad()
    def embed(
        self, pictures: Tensor, words: Int64[Tensor, "b l"], seen: Int64[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b m c"]:
        """M tokens of an observation; pictures (b v h w 3) uint8, or their features by a frozen encoder; seen: how many
        views, or features, each row has, where some have fewer than others."""
        if seen is not None:
            return joined([(rows, self.embed(some, words[rows])) for rows, some in by_count(pictures, seen)])[0]
        visual, language = look(self.target, pictures, words)
        if self.target_queries is not None:
            return self.target_queries(torch.cat([visual, language], 1)).float()
        return F.adaptive_avg_pool1d(visual.float().transpose(1, 2), self.count).transpose(1, 2)

    def aim(self, batch: dict[str, Tensor]) -> Float[Tensor, "b m c"]:
        """The targets of a batch (see `FlowPolicy`)."""
        words, seen = batch["words"], batch.get("seen")
        future = self.embed(batch["future"], words, seen)
        return future - self.embed(batch["pictures"], words, seen) if self.change else future

    def loss(
        self,
        foreseen: Float[Tensor, "b m c"],
        target: Float[Tensor, "b m c"],
        known: Bool[Tensor, " b"],
        row_known: Float[Tensor, ""],
    ) -> Tensor:
        """Mean of 1 - cosine over tokens and the rows whose future is `known`; row_known: the share of such rows in the
        whole batch that these may be a part of (see `mean_error`)."""
        distance = 1 - F.cosine_similarity(foreseen.float(), target, dim=-1).mean(1)
        return (distance * known).sum() / (len(known) * row_known).clamp(min=1e-6)


def queries_and_flare(
    encoder: nn.Module, width: int, queries: int, weight: float, *, tokens: int, **targets: Any
) -> tuple[QFormer | None, Flare | None]:
    """The Q-Former and FLARE of a policy `width` wide on `encoder`, None where it has none. weight: lambda. queries: of
    a Q-Former that reads for the actions, whose outputs are the targets of "qformer". targets: as of `Flare`. Raises
    ValueError for other than `tokens` queries there."""
    aligned = tokens if weight and targets["target"] == "qformer" else 0
    if aligned and queries not in (0, aligned):
        raise ValueError(f"queries is {queries}, future_tokens {tokens}; FLARE's targets are the Q-Former's outputs: "
                         f"give as many, or leave queries at 0")  # fmt: skip
    asked = QFormer(width=encoder.width, queries=queries or aligned) if queries or aligned else None
    if not weight:
        return asked, None
    followed = asked if aligned else None
    return asked, Flare(encoder=encoder, tokens=tokens, width=width, queries=followed, **targets)
