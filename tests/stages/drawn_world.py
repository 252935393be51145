"""A world model that draws its clips from their seeds: cheap, and in halves as the real ones are."""

import time
from collections.abc import Sequence

import numpy as np
import torch

from dreamgen.core.clip import Clip, Prompt
from dreamgen.core.clock import Clock

FRAMES, HEIGHT, WIDTH = 5, 16, 24


def prompts(count: int, *, height: int = HEIGHT, width: int = WIDTH) -> list[Prompt]:
    """Prompts that differ in their seeds; two share a first frame, three share an instruction."""
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (count, height, width, 3), np.uint8)
    return [Prompt(id=f"p{i}", image=images[i // 2], instruction=f"do {i % 3}", seed=100 + 7 * i, pair=f"f{i // 2}")
            for i in range(count)]  # fmt: skip


class DrawnWorld:
    """delay: seconds that one batch takes. batches: the ids of each call, in order."""

    clock = Clock(robot_hz="20", video_hz="10", frames=FRAMES)
    clip_tokens = 30

    def __init__(self, delay: float = 0.0) -> None:
        self.delay, self.batches, self.decoded = delay, [], []

    def denoise(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        self.batches.append([prompt.id for prompt in prompts])
        time.sleep(self.delay)
        rows = [np.random.default_rng(p.seed).integers(0, 256, (FRAMES, HEIGHT, WIDTH, 3), np.uint8) for p in prompts]
        return torch.from_numpy(np.stack(rows))

    def dream(self, prompts: Sequence[Prompt]) -> list[Clip]:
        return self.clips(prompts, self.denoise(prompts))

    def clips(self, prompts: Sequence[Prompt], frames: torch.Tensor) -> list[Clip]:
        self.decoded.append(len(frames))
        return [Clip(id=p.id, video=v, video_hz="10", instruction=p.instruction, seed=p.seed, pair=p.pair)
                for p, v in zip(prompts, frames.numpy(), strict=True)]  # fmt: skip


class WholeWorld:
    """The same without halves."""

    clock = DrawnWorld.clock

    def dream(self, prompts: Sequence[Prompt]) -> list[Clip]:
        return DrawnWorld().dream(prompts)
