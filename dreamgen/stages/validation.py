"""What a world model is measured by while it is fine-tuned: loss at fixed noise, and dreams beside what happened."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dreamgen.core.clip import Prompt
from dreamgen.core.manifest import write_json
from dreamgen.core.seeding import seed_for
from dreamgen.data.buckets import Shape
from dreamgen.data.cache import Embeddings
from dreamgen.stages.latents import Latents
from dreamgen.video.metrics import by_frame, lpips_or_reason
from dreamgen.video.mp4 import write_mp4
from dreamgen.worlds.sampler import enough
from dreamgen.worlds.world import VideoWorld

ROWS = 32  # clips under noise that the loss is measured on


class Validation:
    """Figures of a world model on the first clip of each held-out episode.

    `loss`: at fixed noise and times, which are spread over those that are trained at. With samples: `psnr`, `ssim` and,
    where its weights can be had, `lpips`, means over the dreamed frames; each frame's own are in
    `out/samples/step_*.json`, with the videos, real above dreamed.

    clips: so many at a time of each shape, as a part of a training step has; the means do not depend on it.
    """

    def __init__(self, world: VideoWorld, latents: Latents, text: Embeddings, which: np.ndarray,
                 held: set[tuple[int, int]], out: Path, *, samples: int, clips: Mapping[Shape, int], seed: int,
                 write: bool) -> None:  # fmt: skip
        self.out, self.write, pool, first = out, write, latents.pool, {}
        for k in range(len(pool)):
            first.setdefault(pool.episode(k), k)
        chosen = [first[episode] for episode in sorted(held) if episode in first]
        shapes = [latents.shapes[k] for k in chosen]
        chosen = [k for k, shape in zip(chosen, shapes, strict=True) if shape == max(set(shapes), key=shapes.count)]
        self.prompts: list[Prompt] = []
        self.real: list[np.ndarray] = []
        self.batch: dict[str, Tensor] = {}
        if not chosen:
            return
        self.size = clips.get(latents.shapes[chosen[0]], 1)
        rows = np.array(chosen * -(-ROWS // len(chosen)))[:ROWS]
        generator = torch.Generator().manual_seed(seed_for(seed, "validation"))
        taken, (low, high) = latents.take(rows), world.times
        self.batch = {
            "latents": taken,
            "noise": torch.randn(taken.shape, generator=generator),
            "sigma": low + (high - low) * torch.linspace(0.05, 0.95, len(rows)),
            "text": text.take(which[rows]),
        }
        window = (world.clock.frames, *world.robot.canvas)  # what the model dreams
        for k in [k for k in chosen if latents.shapes[k] == window][:samples]:
            video = pool.frames(k)
            self.real.append(video)
            self.prompts.append(Prompt(id=f"sample_{k}", image=video[0], instruction=pool.instruction(k),
                                       seed=seed_for(seed, "sample", k)))  # fmt: skip
        if self.prompts:
            world.read([prompt.instruction for prompt in self.prompts])

    def __call__(self, world: VideoWorld, step: int) -> dict[str, float]:
        total, size, rows = 0.0, self.size, len(self.batch["sigma"])
        fewer = "a larger stage.accumulate, a smaller stage.batch_size or stage.token_budget"
        with enough(f"validating {size} clips at a time at step {step}", fewer):
            for start in range(0, rows, size):
                part = {key: value[start : start + size].to(world.device) for key, value in self.batch.items()}
                total += float(world.loss(part)[0]) * len(part["sigma"])
        figures = {"loss": total / rows}
        if self.prompts:
            frames = self._compare(self._dreamed(world, step), world.clock.video_hz, step)
            figures |= {key: float(np.mean(values)) for key, values in frames.items()}
        return figures

    def _dreamed(self, world: VideoWorld, step: int) -> list[np.ndarray]:
        less = "stage.samples=0, which leaves them out, or world_model.guidance_mode=two_pass"
        with enough(f"dreaming samples at step {step}, {self.size} at a time", less):
            parts = [self.prompts[k : k + self.size] for k in range(0, len(self.prompts), self.size)]
            return [clip.video for part in parts for clip in world.dream(part)]

    def _compare(self, dreamed: Sequence[np.ndarray], hz: str, step: int) -> dict[str, list[float]]:
        pairs = list(zip(self.real, [video[: len(self.real[0])] for video in dreamed], strict=True))
        found = [by_frame(real[1:], video[1:]) for real, video in pairs]  # the first frame is given
        frames = {key: np.mean([row[key] for row in found], 0).round(4).tolist() for key in found[0]}
        if self.write:
            stem = self.out / "samples" / f"step_{step:06d}"
            sheet = np.concatenate([np.concatenate([real, video], 1) for real, video in pairs], 2)
            write_mp4(stem.with_suffix(".mp4"), sheet, hz)
            _, reason = lpips_or_reason()
            left_out = {"left_out": {"lpips": reason}} if reason else {}
            write_json(stem.with_suffix(".json"), {"frame": list(range(1, len(self.real[0]))), **frames, **left_out})
        return frames
