"""World models conditioned by a clean first latent frame: the family of Wan2.2-TI2V, LTX-Video and Cosmos-Predict.

The causal VAE makes latent frame 0 depend on picture 0 alone, so the condition is `latents[:, :, :1]`: it stays clean,
its tokens have the time of a clean frame, and the loss is taken on the other frames (Wan2.2 `expand_timesteps`,
arXiv:2503.20314; LTX-Video, arXiv:2501.00103; Cosmos, arXiv:2501.03575).
"""

from collections.abc import Sequence

import torch
from diffusers import WanImageToVideoPipeline
from jaxtyping import Float, UInt8
from torch import Tensor

from dreamgen.worlds.layout import TINY, locate
from dreamgen.worlds.stored import FILE
from dreamgen.worlds.wan import WanLayout
from dreamgen.worlds.world import VideoWorld

__all__ = ["FILE", "TINY", "PrefixWorld", "locate", "open_pipeline"]


class PrefixWorld(VideoWorld):
    """Wan2.2-TI2V, or the tiny base of its layout; other pipelines of this family are subclasses with their layout."""

    kind = WanLayout
    start = 1

    def _check(self) -> None:
        if self.kind is WanLayout and not self.pipe.config.expand_timesteps:
            raise ValueError(f"{self.path} is a {type(self.pipe).__name__} without a clean-prefix condition "
                             "(expand_timesteps); expected the layout of Wan2.2-TI2V. For Wan2.1-I2V and Wan2.2-I2V-"
                             "A14B choose world_model=wan21_i2v_14b or wan22_i2v_a14b.")  # fmt: skip
        super()._check()

    def condition(self, images: UInt8[Tensor, "b 1 h w 3"]) -> Float[Tensor, "b c 1 lh lw"]:
        return self.encode(images)

    def predict(self, x: Tensor, given: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """The velocity of all latent frames; `given` (b c 1 lh lw) replaces frame 0; timestep (b,), the model's."""
        x = torch.cat([given, x[:, :, 1:]], 2)
        times = timestep.view(-1, 1).repeat(1, x.shape[2])
        times[:, 0] = self.layout.clean
        return self.layout.forward(self.transformer, x, times, text)

    def finish(self, x: Tensor, given: Tensor) -> Tensor:
        return torch.cat([given, x[:, :, 1:]], 2)

    def split(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        return latents, latents[:, :, :1]

    def tokens(self, instructions: Sequence[str]) -> dict[str, Tensor]:
        """Token ids and mask (b, text_length) of the prompts around `instructions`."""
        return self.layout.tokens([self.prompt(text) if text else text for text in instructions])

    def embed_tokens(self, ids: Tensor, mask: Tensor) -> Float[Tensor, "b l d"]:
        """Text embeddings in the transformer's dtype, zero past the end of each prompt, as in the stock pipeline."""
        return self.layout.embed_tokens(ids, mask)


def open_pipeline(path: str) -> WanImageToVideoPipeline:
    """The Wan pipeline in a folder, on the hub, or "tiny". Raises ValueError where there is none."""
    return WanLayout.open(path)
