"""Wan pipelines: UMT5 text, a causal VAE with moments per channel, tokens of 2x2 latent cells.

Both families meet here: Wan2.2-TI2V gives each token its own time (`expand_timesteps`); Wan2.1-I2V and Wan2.2-I2V-A14B
take a mask and the condition's latents as further channels (arXiv:2503.20314).
"""

from collections.abc import Sequence

import torch
from diffusers import WanImageToVideoPipeline
from diffusers.pipelines.wan.pipeline_wan_i2v import prompt_clean
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from dreamgen.worlds.layout import Layout


class WanLayout(Layout):
    pipeline = WanImageToVideoPipeline
    opens = ("WanImageToVideoPipeline", "WanPipeline")  # the hub's Wan2.2-TI2V names the pipeline without an image
    targets = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")

    @property
    def experts(self) -> dict[str, nn.Module]:
        found = {name: getattr(self.pipe, name, None) for name in ("transformer", "transformer_2")}
        return {name: module for name, module in found.items() if module is not None}

    @property
    def grain(self) -> int:
        """`AutoencoderKLWan` reads four frames at a time, whatever its scale, and silently drops what is left."""
        return max(4, self.scale[0])

    def cleaned(self, text: str) -> str:
        """As stock Wan: mended characters, no HTML, one space where there were several."""
        return prompt_clean(text)

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Token ids and mask (b, text_length) of texts, cleaned as in stock Wan. Raises as `require_read`."""
        self.require_read(texts)
        found = self.pipe.tokenizer([self.cleaned(text) for text in texts], padding="max_length", return_tensors="pt",
                                    max_length=self.text_length, return_attention_mask=True)  # fmt: skip
        return {"ids": found.input_ids, "mask": found.attention_mask}

    def embed_tokens(self, ids: Tensor, mask: Tensor) -> Float[Tensor, "b l d"]:
        """Text embeddings in the transformer's dtype, zero past the end of each prompt, as in the stock pipeline."""
        hidden = self.pipe.text_encoder(ids, mask).last_hidden_state.to(self.pipe.transformer.dtype)
        return hidden * mask.unsqueeze(-1).to(hidden.dtype)

    def embed(self, texts: Sequence[str], device: torch.device) -> Float[Tensor, "b l d"]:
        found = self.tokens(texts)
        return self.embed_tokens(found["ids"].to(device), found["mask"].to(device))

    def forward(self, transformer: nn.Module, x: Float[Tensor, "b c t h w"], times: Tensor, text: Tensor,
                image: Tensor | None = None) -> Float[Tensor, "b k t h w"]:  # fmt: skip
        text = text.to(transformer.dtype)
        if times.ndim == 2:  # one for each token
            times = times.repeat_interleave(x.shape[3] // self.patch * (x.shape[4] // self.patch), 1)
        given = {} if image is None else {"encoder_hidden_states_image": image.to(text.dtype)}
        return transformer(hidden_states=x.to(text.dtype), timestep=times, encoder_hidden_states=text,
                           return_dict=False, **given)[0]  # fmt: skip

    def condition(self, first: Float[Tensor, "b 3 1 h w"], frames: int) -> Float[Tensor, "b c lt lh lw"]:
        """Latents of the first picture with grey behind it, not normalised."""
        rest = first.new_zeros(*first.shape[:2], frames - 1, *first.shape[3:])
        return self.encode(torch.cat([first, rest], 2))

    def mask(self, shape: Sequence[int], device: torch.device | None) -> Float[Tensor, "1 m lt lh lw"]:
        """Channels that say which frames of each latent frame (c t h w) are given: the first picture alone."""
        mask = torch.zeros(1, self.scale[0], *shape[1:], device=device)
        mask[:, :, 0] = 1
        return mask

    def given(self, frames: int) -> int:
        """Latent frames of the condition, of a clip of `frames` latent frames."""
        return frames

    @property
    def image_shape(self) -> tuple[int, int] | None:
        """Tokens and width of CLIP's view of a picture, where the transformer asks for it (Wan2.1)."""
        if self.pipe.transformer.config.image_dim is None:
            return None
        config = self.pipe.image_encoder.config
        return (config.image_size // config.patch_size) ** 2 + 1, config.hidden_size

    def image_tokens(self, images: UInt8[Tensor, "b 1 h w 3"]) -> Float[Tensor, "b n d"] | None:
        """CLIP's view of the first pictures."""
        if self.image_shape is None:
            return None
        pictures = [Image.fromarray(image) for image in images[:, 0].numpy(force=True)]
        return self.pipe.encode_image(pictures, images.device)
