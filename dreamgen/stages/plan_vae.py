"""What a video autoencoder holds at most while it encodes or decodes clips, counted on the meta device.

Causal autoencoders work chunk by chunk: what one chunk holds at full resolution is most of it, and what is there of the
result grows with each. So a few latent frames are counted, and of long clips the line through the last two is followed.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from dreamgen.engine.peak import Peak
from dreamgen.worlds.autoencoder import clips_at_once

COUNTED = 5  # latent frames after which each chunk holds what the one before held, in all published autoencoders


def vae_memory(config: Mapping[str, Any], latents: Sequence[int], clip: Sequence[int]) -> dict[str, Any]:
    """Bytes in fp32, as autoencoders are held here: `weights`, and beside them what `encode` and `decode` hold at most
    of as many `clips` as are given at once, neither tiled nor sliced.

    latents: (c t h w); clip: frames, height, width. What the kernels of a device hold in themselves is not in it:
    on a CPU it was up to a quarter more, of four or eight channels up to two thirds. In bf16 it is less.
    """
    found = _one(json.dumps(dict(config), sort_keys=True), tuple(latents), tuple(clip))
    clips = clips_at_once(*clip)
    return {"clips": clips, "weights": found[0], "encode": clips * found[1], "decode": clips * found[2]}


@lru_cache
def _one(config: str, latents: tuple[int, ...], clip: tuple[int, ...]) -> tuple[float, float, float]:
    """Weights, and the peaks of one clip."""
    import diffusers

    given = json.loads(config)
    with torch.device("meta"):
        vae = getattr(diffusers, given["_class_name"]).from_config(given).eval()
    (channels, long, *cells), (frames, *size) = latents, clip
    time = (frames - 1) // (long - 1) if long > 1 else 1

    def encode(count: int) -> float:
        return _most(lambda x: vae.encode(x).latent_dist.mode(), (1, 3, (count - 1) * time + 1, *size))

    def decode(count: int) -> float:
        return _most(lambda z: vae.decode(z).sample, (1, channels, count, *cells))

    weights = float(sum(p.numel() * p.element_size() for p in vae.parameters()))
    return weights, _extended(encode, long), _extended(decode, long)


def _most(work: Callable[[torch.Tensor], object], shape: tuple[int, ...]) -> float:
    given = torch.empty(shape, device="meta")
    with torch.no_grad(), Peak() as peak:
        work(given)
    return float(peak.most + math.prod(shape) * given.element_size())


def _extended(most: Callable[[int], float], long: int) -> float:
    """`most(long)`, of a long clip by the line through two shorter ones whose last chunk is as its own."""
    near = COUNTED + (long - COUNTED) % 2
    if long <= near + 2:
        return most(long)
    first, second = most(near), most(near + 2)
    return second + (second - first) / 2 * (long - near - 2)
