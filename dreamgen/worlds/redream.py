"""Recordings as a world model would have dreamt them: the same motion, drawn with its faults.

Latents are noised up to a level and denoised again (SDEdit, Meng et al. 2022, arXiv:2108.01073). A labeler that has
seen such clips, whose actions are known, knows how dreams look.
"""

import torch
from jaxtyping import UInt8
from torch import Tensor

from dreamgen.engine.precision import autocast
from dreamgen.worlds.flow import Flow, integrate, noised
from dreamgen.worlds.layout import twin
from dreamgen.worlds.world import VideoWorld


@torch.no_grad()
def redream(
    world: VideoWorld, frames: UInt8[Tensor, "b t h w 3"], *, level: float, seed: int
) -> UInt8[Tensor, "b t h w 3"]:
    """Clips of one window through `world`, without a prompt, from the first of its sampling steps whose sigma is at
    most `level`; where there is none they pass the autoencoder alone. Raises ValueError for a model of diffusion.
    """
    if not isinstance(world.layout.process(world.latent_shape), Flow):
        raise ValueError(f"{world.path} is no model of flow matching; its clips cannot be noised to a level and dreamt "
                         "again. Set redream_up_to=0.")  # fmt: skip
    latents = world.encode(frames)
    x, given = world.split(latents)
    scheduler, times = world.layout.schedule(world.steps, x.shape[1:], world.device)
    first = int((scheduler.sigmas[: len(scheduler.timesteps)] > level).sum())
    if first < len(scheduler.timesteps):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.device)
        start = noised(x, noise, scheduler.sigmas[first].to(x.device).expand(len(x)))
        scheduler.set_begin_index(first)
        scheduler.timesteps, times = scheduler.timesteps[first:], list(times)[first:]

        def predict(x: Tensor, given: Tensor, time: Tensor, text: Tensor) -> Tensor:
            with autocast(world.precision, world.device):
                return world.predict(*map(twin, (x, given, time, text)))[: len(x)].float()

        model = world.sampler.guided(predict, given, world.embed([""] * len(x)), None, 1.0)
        latents = world.finish(integrate(model, start, scheduler, times), given)
    return world.decode(latents)
