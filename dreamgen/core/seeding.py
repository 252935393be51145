"""Randomness is addressed, not consumed: a seed is a pure function of what it is for.

`seed_for(seed, "dream", prompt_id)` is the same for any number of shards, in any order, after any resume.
"""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def seed_for(seed: int, *keys: str | int) -> int:
    """A 63-bit seed for the thing that `keys` name under the run's `seed`.

    Keys are joined with their types, so `("1", 2)` and `(1, "2")` differ.
    """
    text = repr((int(seed), *[(type(key).__name__, str(key)) for key in keys]))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def rng_for(seed: int, *keys: str | int) -> np.random.Generator:
    """A numpy generator seeded with `seed_for(seed, *keys)`."""
    return np.random.default_rng(seed_for(seed, *keys))


def torch_rng_for(seed: int, *keys: str | int, device: str = "cpu") -> "torch.Generator":
    """A torch generator seeded with `seed_for(seed, *keys)`."""
    import torch

    return torch.Generator(device=device).manual_seed(seed_for(seed, *keys))
