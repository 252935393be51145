"""LTX-Video: latents packed to a sequence, a T5 whose padding is masked, sampling times shifted by length."""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from diffusers import LTXImageToVideoPipeline
from diffusers.pipelines.ltx.pipeline_ltx_image2video import calculate_shift
from jaxtyping import Float
from torch import Tensor, nn

from dreamgen.worlds.flow import Flow
from dreamgen.worlds.layout import Layout
from dreamgen.worlds.prefix import PrefixWorld

UNMASKED = ("flash", "sage", "aiter", "native_flash", "native_xla")  # what names of backends begin with; "_" before


class LtxLayout(Layout):
    pipeline = LTXImageToVideoPipeline
    opens = ("LTXImageToVideoPipeline", "LTXPipeline")

    @property
    def patch(self) -> int:
        return self.pipe.transformer.config.patch_size

    @property
    def scale(self) -> tuple[int, int]:
        return self.pipe.vae_temporal_compression_ratio, self.pipe.vae_spatial_compression_ratio

    @property
    def pixels(self) -> int:
        return self.scale[1] * self.patch

    @property
    def channels(self) -> int:
        return self.pipe.vae.config.latent_channels

    def require_backend(self, name: str) -> None:
        """Its attention to text has a mask."""
        if name.lower().strip("_").startswith(UNMASKED):
            raise ValueError(f"attention_backend is '{name}', which takes no mask such as that of a prompt's end, by "
                             f"which {type(self.pipe.transformer).__name__} attends to texts; expected native, or "
                             "null")  # fmt: skip

    def moments(self) -> tuple[Tensor, Tensor]:
        vae = self.pipe.vae
        return vae.latents_mean.float().cpu(), vae.latents_std.float().cpu() / vae.config.scaling_factor

    def decode(self, z: Float[Tensor, "b c lt lh lw"]) -> Float[Tensor, "b 3 t h w"]:
        """At decoding time 0, the stock pipeline's default, where the VAE takes a time."""
        time = torch.zeros(len(z), device=z.device) if self.pipe.vae.config.timestep_conditioning else None
        return self.pipe.vae.decode(z, time).sample

    def embed(self, texts: Sequence[str], device: torch.device) -> Float[Tensor, "b l d"]:
        """Zero past the end of each prompt, where the transformer's mask leaves no weight: so they carry the mask."""
        self.require_read(texts)
        hidden, mask, *_ = self.pipe.encode_prompt(list(texts), do_classifier_free_guidance=False, device=device,
                                                   max_sequence_length=self.text_length)  # fmt: skip
        return (hidden * mask.unsqueeze(-1)).to(self.pipe.transformer.dtype)

    def forward(self, transformer: nn.Module, x: Float[Tensor, "b c t h w"], times: Tensor, text: Tensor,
                image: Tensor | None = None) -> Float[Tensor, "b k t h w"]:  # fmt: skip
        text = text.to(transformer.dtype)
        b, _, t, h, w = x.shape
        sizes = (self.patch, self.pipe.transformer_temporal_patch_size)
        times = times.view(b, -1).expand(b, t).repeat_interleave(h // self.patch * (w // self.patch), 1)
        found = transformer(
            hidden_states=self.pipe._pack_latents(x, *sizes).to(text.dtype), encoder_hidden_states=text,
            timestep=times, encoder_attention_mask=(text != 0).any(-1), num_frames=t, height=h, width=w,
            rope_interpolation_scale=(self.scale[0] / self.video_hz, self.scale[1], self.scale[1]), return_dict=False,
        )[0]  # fmt: skip
        return self.pipe._unpack_latents(found, t, h, w, *sizes)

    def _mu(self, shape: Sequence[int]) -> float:
        config = self.pipe.scheduler.config
        return calculate_shift(shape[1] * shape[2] * shape[3], config.get("base_image_seq_len", 256),
                               config.get("max_image_seq_len", 4096), config.get("base_shift", 0.5),
                               config.get("max_shift", 1.15))  # fmt: skip

    def process(self, shape: Sequence[int]) -> Flow:
        config = self.pipe.scheduler.config
        own = float(np.exp(self._mu(shape))) if config.use_dynamic_shifting else config.get("shift") or 1.0
        return Flow(self.train_shift or own)

    def schedule(self, steps: int, shape: Sequence[int], device: torch.device) -> tuple[Any, Iterable[Tensor]]:
        scheduler = deepcopy(self.scheduler)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=self._mu(shape), device=device)
        return scheduler, scheduler.timesteps


class LtxWorld(PrefixWorld):
    """LTX-Video as a world model; settings as in `PrefixWorld`."""

    kind = LtxLayout
