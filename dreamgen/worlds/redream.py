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
    world: VideoWorld, frames: UInt8[Tensor, "b t h w 3"], instructions: Sequence[str], *, level: float, seed: int
) -> UInt8[Tensor, "b t h w 3"]:
    """Clips of one window through `world` as it dreams under `instructions`, from the first of its sampling steps whose
    sigma is at most `level` (of diffusion, whose place in the table of alphas); where there is none they pass the
    autoencoder alone.
    """
    latents = world.encode(frames)
    x, given = world.split(latents)
    scheduler, times = world.layout.schedule(world.steps, x.shape[1:], world.device)
    process, count = world.layout.process(x.shape[1:]), len(scheduler.timesteps)
    sigmas = scheduler.sigmas[:count] if isinstance(process, Flow) else scheduler.timesteps / process.unit
    first = int((sigmas > level).sum())
    if first < count:
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.device)
        start = process.noised(x, noise, sigmas[first].to(x.device, x.dtype).expand(len(x)))
        text, plain = world.embed(instructions), world.negative(len(x))
        latents = world.descend(start, given, text, plain, scheduler, times, first)
    return world.decode(latents)
