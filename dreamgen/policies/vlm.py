"""A small vision-language model, SmolVLM (Marafioti et al. 2025): the hidden states of its language model.

The sequence is [instruction | views]: attention is causal, so each picture is read knowing what is to be done.
"""

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from dreamgen.policies.pretrained import Pretrained


class SmolVlmEncoder(Pretrained):
    """layers: of the language model, the first so many (GR00T N1 takes 12); null takes all.

    Padding is masked; where an instruction is shorter than `length`, the mean of its own tokens stands in its place.
    """

    kinds = ("smolvlm", "idefics3")

    def __init__(
        self,
        *,
        path: str,
        width: int = 512,
        layers: int | None = None,
        length: int = 32,
        tune: bool = False,
        trained: bool = True,
    ) -> None:
        super().__init__(path=path, width=width, length=length, tune=tune, trained=trained, layers=layers)
        self.config |= dict(layers=layers)
        inner = self.model.config.text_config.hidden_size
        self.out = nn.Sequential(nn.LayerNorm(inner), nn.Linear(inner, width))

    def _said(self, words: Int64[Tensor, "b l"]) -> Bool[Tensor, "b l"]:
        """Which positions hold a token; an empty instruction is one token of padding, for attention needs something."""
        return (words > 0) | (torch.arange(self.length, device=words.device) == 0)

    def features(self, pictures: UInt8[Tensor, "b v h w 3"], words: Int64[Tensor, "b l"]) -> Float[Tensor, "b n d"]:
        """Hidden states of the instruction, then of the views."""
        b, v = pictures.shape[:2]
        found = self.model.vision_model(pixel_values=self.pixels(pictures)).last_hidden_state
        views = self.model.connector(found).unflatten(0, (b, v)).flatten(1, 2)
        text = self.model.get_input_embeddings()(self.ids(words))
        known = torch.cat([self._said(words), words.new_ones(views.shape[:2]).bool()], 1)
        place = (known.cumsum(1) - 1).clamp(min=0)
        return self.model.text_model(inputs_embeds=torch.cat([text, views.to(text.dtype)], 1), position_ids=place,
                                     attention_mask=known.long(), use_cache=False).last_hidden_state  # fmt: skip

    def project(
        self, features: Float[Tensor, "b n d"], words: Int64[Tensor, "b l"]
    ) -> tuple[Float[Tensor, "b m c"], Float[Tensor, "b l c"]]:
        """Visual and language tokens."""
        tokens = self.out(features.to(self.out[1].weight.dtype))
        text, views = tokens[:, : self.length], tokens[:, self.length :]
        known = self._said(words)[..., None]
        mean = (text * known).sum(1, keepdim=True) / known.sum(1, keepdim=True)
        return views, torch.where(known, text, mean)
