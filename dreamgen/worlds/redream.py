"""Recordings as a world model would have dreamt them: the same motion, drawn with its faults.

Latents are noised up to a level and denoised again (SDEdit, Meng et al. 2022, arXiv:2108.01073). A labeler that has
seen such clips, whose actions are known, knows how dreams look.
"""

from collections.abc import Sequence

import torch
from jaxtyping import UInt8
from torch import Tensor

from dreamgen.worlds.flow import Flow
from dreamgen.worlds.world import VideoWorld


@torch.no_grad()
def redream(
    world: VideoWorld,
    frames: UInt8[Tensor, "b t h w 3"],
    instructions: Sequence[str],
    *,
    levels: Sequence[float],
    seeds: Sequence[int],
) -> UInt8[Tensor, "b t h w 3"]:
    """Clips of one window through `world` as it dreams under `instructions`, each from the first of its sampling steps
    whose sigma is at most its level (of diffusion, whose place in the table of alphas); where there is none it passes
    the autoencoder alone. seeds: of each clip's noise. A clip depends on its own row alone.
    """
    latents = world.encode(frames)
    x, given = world.split(latents)
    scheduler, _ = world.layout.schedule(world.steps, x.shape[1:], world.device)
    process, count = world.layout.process(x.shape[1:]), len(scheduler.timesteps)
    sigmas = scheduler.sigmas[:count] if isinstance(process, Flow) else scheduler.timesteps / process.unit
    firsts = [int((sigmas > level).sum()) for level in levels]
    for first in sorted(set(firsts) - {count}):
        rows = [k for k, own in enumerate(firsts) if own == first]
        noise = torch.stack([torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(seeds[k])) for k in rows])
        start = process.noised(x[rows], noise.to(x.device), sigmas[first].to(x.device, x.dtype).expand(len(rows)))
        text, plain = world.embed([instructions[k] for k in rows]), world.negative(len(rows))
        scheduler, times = world.layout.schedule(world.steps, x.shape[1:], world.device)  # none that took steps already
        found = world.descend(start, given[rows], text, plain, scheduler, times, first)
        latents[rows, : found.shape[1]] = found  # what a model is given beside them is no part of the clip
    return world.decode(latents)
