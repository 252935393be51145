"""CogVideoX image-to-video: latents as (b t c h w), v-prediction, the condition's latents behind the noisy ones."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXImageToVideoPipeline
from jaxtyping import Float
from torch import Tensor, nn

from dreamgen.core.embodiment import Embodiment
from dreamgen.worlds.concat import ConcatWorld
from dreamgen.worlds.flow import Diffusion
from dreamgen.worlds.layout import Layout


class CogVideoXLayout(Layout):
    pipeline = CogVideoXImageToVideoPipeline
    opens = ("CogVideoXImageToVideoPipeline",)

    @property
    def patch(self) -> int:
        return self.pipe.transformer.config.patch_size

    def require(self, robot: Embodiment, frames: int, path: str) -> None:
        super().require(robot, frames, path)
        if self.train_shift is not None:
            raise ValueError(f"train_shift is {self.train_shift}, but {path} has no flow to shift; leave it null")
        config, side, canvas = self.pipe.transformer.config, self.scale[1], robot.canvas
        if config.patch_size_t is not None or self.pipe.vae.config.invert_scale_latents:
            raise ValueError(f"{path} is a CogVideoX1.5, which groups frames and scales the first picture's latents "
                             "otherwise; expected CogVideoX-5B-I2V")  # fmt: skip
        size = (config.sample_height * side, config.sample_width * side)
        if config.use_learned_positional_embeddings and (canvas, frames) != (size, config.sample_frames):
            raise ValueError(
                f"the canvas is {canvas[0]}x{canvas[1]} with {frames} frames; this transformer has learned"
                f" positions, for {size[0]}x{size[1]} with {config.sample_frames} frames alone"
            )

    def require_backend(self, name: str) -> None:
        """Its attention asks torch alone."""
        if name.lower() != "native":
            raise ValueError(f"attention_backend is '{name}', but {type(self.pipe.transformer).__name__} computes its "
                             "attention by torch, whatever is set; expected native, or null")  # fmt: skip

    @property
    def channels(self) -> int:
        return self.pipe.vae.config.latent_channels

    def moments(self) -> tuple[Tensor, Tensor]:
        zeros = torch.zeros(self.channels)
        return zeros, zeros + 1 / self.pipe.vae.config.scaling_factor

    def forward(self, transformer: nn.Module, x: Float[Tensor, "b c t h w"], times: Tensor, text: Tensor,
                image: Tensor | None = None) -> Float[Tensor, "b k t h w"]:  # fmt: skip
        text = text.to(transformer.dtype)
        config = transformer.config
        rotary = None
        if config.use_rotary_positional_embeddings:
            size = self.scale[1]
            rotary = self.pipe._prepare_rotary_positional_embeddings(x.shape[3] * size, x.shape[4] * size, x.shape[2],
                                                                     x.device)  # fmt: skip
        found = transformer(hidden_states=x.transpose(1, 2).to(text.dtype), encoder_hidden_states=text, timestep=times,
                            image_rotary_emb=rotary, return_dict=False)[0]  # fmt: skip
        return found.transpose(1, 2)

    def condition(self, first: Float[Tensor, "b 3 1 h w"], frames: int) -> Float[Tensor, "b c 1 lh lw"]:
        """Latents of the first picture, not normalised; the frames behind it are zero."""
        return self.encode(first)

    def mask(self, shape: Sequence[int], device: torch.device | None) -> None:
        """It has none."""

    def given(self, frames: int) -> int:
        """Latent frames of the condition: the first alone."""
        return 1

    image_shape = None

    def image_tokens(self, images: Tensor) -> None:
        """It has none."""

    def process(self, shape: Sequence[int]) -> Diffusion:
        return Diffusion(self.pipe.scheduler.alphas_cumprod)

    def schedule(self, steps: int, shape: Sequence[int], device: torch.device) -> tuple[Any, Iterable[Tensor]]:
        """DDIM also where the pipeline names a stochastic solver: a clip is a function of its own noise."""
        scheduler = CogVideoXDDIMScheduler.from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(steps, device=device)
        return scheduler, scheduler.timesteps


class CogVideoXWorld(ConcatWorld):
    """CogVideoX-5B-I2V as a world model; settings as in `ConcatWorld`."""

    kind = CogVideoXLayout
