"""Recorded clips as a world model would draw them, for a labeler that is to read its dreams."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dreamgen.core.seeding import rng_for
from dreamgen.engine.precision import place, withdraw
from dreamgen.engine.progress import progress
from dreamgen.stages.sharing import Parts, grouped
from dreamgen.worlds.redream import redream

DRAWN = "drawn_clips"  # the folder of clips as a world model draws them, while their stage runs
TOKENS = 2**16  # of a batch: a single clip is doubled by its world model, so that none depends on its batch
Asked = Callable[[int], np.ndarray]
Drawn = Callable[[Asked, Sequence[str], Sequence[str]], list[np.ndarray]]


def drawn_by(world_model: Any, out: Path, *, redream_up_to: float = 0.0, seed: int = 0,
             batch_size: int | None = None, apart: str = "") -> Drawn:  # fmt: skip
    """A function of clips, uint8 (t H W 3), which it asks for by number, of their rates (Hz) and their instructions, to
    the videos as the world model draws them: through its autoencoder, so its dreams look at best.

    redream_up_to: each is noised to a level drawn below this and denoised again under its instruction
    (`dreamgen.worlds.redream`): so its dreams do look. Clips of another rate than the world model's pass the
    autoencoder alone: it would draw another speed. A clip depends on its number and the seed, not on its batch (in bf16
    but for rounding); a batch is of one level as nearly as can be. It is kept in `out/drawn_clips` once done, where a
    stage that was killed takes it up; apart: the folder there of clips that are kept beside others. batch_size: by
    default 16 small clips, and of large ones no more than two windows of 81 frames at 480x832. The world model is on
    the accelerator only while it draws: what is trained next may be as large.
    """
    size = batch_size or max(1, min(16, TOKENS // getattr(world_model, "clip_tokens", 1)))

    def drawn(asked: Asked, rates: Sequence[str], instructions: Sequence[str]) -> list[np.ndarray]:
        count = len(rates)
        draws = [rng_for(seed, "redream", n) for n in range(count)]
        levels = [redream_up_to * draw.random() for draw in draws]
        if redream_up_to:
            speed = Fraction(world_model.clock.video_hz)
            levels = [level if Fraction(hz) == speed else 0.0 for level, hz in zip(levels, rates, strict=True)]
        seeds = [int(draw.integers(2**62)) for draw in draws]
        batches = grouped(sorted(range(count), key=lambda n: (levels[n], n)), size)
        parts = Parts(Path(out) / DRAWN / apart)
        stored = parts.stored()
        left = [number for number in range(len(batches)) if number not in stored]
        texts = [instructions[n] for number in left for n in batches[number] if levels[n] > 0]
        if texts and hasattr(world_model, "read"):  # before the transformer takes the text encoder's place
            world_model.read(list(dict.fromkeys(texts)))
        if left:
            place(world_model)
        for number in progress(left, len(left), "draw clips as the world model would", out, unit="batch"):
            mine = batches[number]
            video = torch.from_numpy(np.stack([asked(n) for n in mine]))
            if redream_up_to:
                own = [levels[n] for n in mine], [seeds[n] for n in mine]
                video = redream(world_model, video, [instructions[n] for n in mine], levels=own[0], seeds=own[1])
            else:
                video = world_model.decode(world_model.encode(video))
            parts.write(number, {str(n): one for n, one in zip(mine, video.cpu().numpy(), strict=True)})
        if left:
            withdraw(world_model)
        found = {int(n): one for number in range(len(batches)) for n, one in parts.read(number).items()}
        return [found[n] for n in range(count)]

    return drawn


def frames_through(world_model: Any, least: int) -> int:
    """The least number of frames, `least` or more, that its autoencoder takes: 1 + a multiple of its grain."""
    return 1 - (1 - least) // _grain(world_model) * _grain(world_model)


def frames_within(world_model: Any, most: int) -> int:
    """The greatest number of frames, `most` or fewer, that its autoencoder takes."""
    return most - (most - 1) % _grain(world_model)


def _grain(world_model: Any) -> int:
    return getattr(getattr(world_model, "layout", None), "grain", 1)
