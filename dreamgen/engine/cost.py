"""What a video transformer costs, from its sizes: FLOPs, bytes, tokens. Nothing is run.

One forward pass over L video tokens under T text tokens, with width d and a feed-forward of width f, takes
`layers * (12 d^2 L + 4 d^2 T + 4 d f L + 4 L^2 d + 4 L T d)` FLOPs: self-attention's projections, and those of
cross-attention's queries and outputs; its keys and values; feed-forward; both attentions. A joint transformer
(CogVideoX) has its text in the same sequence. A backward pass costs as much for the activations, and as much again for
the weights that are trained.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# bytes that a block keeps of each token for its backward pass: times d, times f. Counted on Wan's block in bf16 with
# a time for each token
SAVED = {"lora": (84.0, 4.0), "full": (100.0, 4.0)}


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """Sizes. patch: latent cells in a token, over time and along a side. joint: text and video are one sequence.

    image_tokens: of the first picture, read beside the text.
    """

    layers: int
    width: int
    ffn: int
    patch: tuple[int, int] = (1, 2)
    image_tokens: int = 0
    joint: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Transformer":
        """The sizes in a diffusers configuration with its `_class_name` (Wan, Cosmos, LTX, CogVideoX)."""
        joint = config.get("_class_name", "").startswith("CogVideoX")
        width = config["num_attention_heads"] * config["attention_head_dim"]
        size = config.get("patch_size", 1)
        time, side = (size[0], size[1]) if isinstance(size, Sequence) else (config.get("patch_size_t") or 1, size)
        ffn = config.get("ffn_dim") or int(config.get("mlp_ratio", 4) * width)
        return cls(layers=config["num_layers"], width=width, ffn=ffn, patch=(time, side), joint=joint,
                   image_tokens=257 if config.get("image_dim") else 0)  # fmt: skip

    def tokens(self, latents: Sequence[int]) -> int:
        """Video tokens of latents (t, h, w)."""
        time, side = self.patch
        return -(-latents[0] // time) * (latents[1] // side) * (latents[2] // side)

    def forward(self, video: int, text: int) -> float:
        """FLOPs of one forward pass over one clip of `video` tokens."""
        d, f, seen = self.width, self.ffn, text + self.image_tokens
        if self.joint:  # four projections, one attention
            both = video + seen
            return self.layers * (8.0 * d * d * both + 4.0 * d * f * both + 4.0 * both * both * d)
        own = 12.0 * d * d * video + 4.0 * d * f * video + 4.0 * video * video * d
        return self.layers * (own + 4.0 * d * d * seen + 4.0 * video * seen * d)

    def step(self, video: int, text: int, *, lora: bool, checkpointing: bool = False) -> float:
        """FLOPs of one training step on one clip; with checkpointing, the second forward pass counts too."""
        return self.forward(video, text) * ((2 if lora else 3) + checkpointing)

    def activations(self, video: int, text: int, *, lora: bool, checkpointing: bool) -> float:
        """Bytes that a training step keeps of one clip: all blocks, or their inputs and one block (checkpointing).

        Attention as a fused kernel keeps no map of L x L.
        """
        sequence = video + (text if self.joint else 0)
        wide, deep = SAVED["lora" if lora else "full"]
        block = sequence * (wide * self.width + deep * self.ffn)
        return block + self.layers * sequence * self.width * 4.0 if checkpointing else block * self.layers


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device: weights, gradients, optimiser and average, activations."""

    weights: float
    gradients: float
    optimiser: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimiser + self.activations


def training_memory(
    model: Transformer, *, parameters: int, trained: int, clips: int, video: int, text: int, lora: bool,
    checkpointing: bool, ema: bool, weight_bytes: int = 4, shards: int = 1,
) -> Memory:  # fmt: skip
    """What a step takes on one of `shards` devices that share weights and state (1: each has all).

    clips: in one part of a step on one device. Trained weights, their gradients, AdamW's two moments and the average
    are fp32; frozen weights take `weight_bytes`. Products read bf16 copies of the trained weights: of all of them at
    once, but for a model that is cut and computed again block by block (checkpointing).
    """
    copies = 0.0 if shards > 1 and checkpointing else 2.0 * trained
    frozen = max(parameters - trained, 0) * weight_bytes
    kept = model.activations(video, text, lora=lora, checkpointing=checkpointing)
    return Memory(weights=(frozen + 4.0 * trained) / shards + copies, gradients=4.0 * trained / shards,
                  optimiser=(8.0 + 4.0 * ema) * trained / shards, activations=clips * kept)  # fmt: skip


def lora_parameters(model: Transformer, rank: int) -> int:
    """Weights of an adapter on attention (twice, where text is read apart) and feed-forward."""
    d, f = model.width, model.ffn
    return model.layers * rank * ((4 if model.joint else 8) * 2 * d + 2 * (d + f))
