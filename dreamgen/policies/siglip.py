"""SigLIP and SigLIP2 (Tschannen et al. 2025): patch tokens of each view, and one token for the instruction."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from dreamgen.engine.precision import autocast
from dreamgen.policies.pretrained import Pretrained

KEPT = 2**16  # instructions whose embedding (3 KB) by a frozen model is remembered, those asked for last


class SiglipEncoder(Pretrained):
    """tokens: a side of each view, averaged from the model's patches. Reads checkpoints of a fixed size (not NaFlex).

    An instruction passes the text model once per batch. Where the model is frozen it does so once for all, alone and in
    fp32: the same bits in training and in acting, whatever was asked for before.
    """

    kinds = ("siglip", "siglip2")

    def __init__(
        self,
        *,
        path: str,
        width: int = 512,
        tokens: int = 8,
        length: int = 64,
        tune: bool = False,
        trained: bool = True,
        max_views: int = 8,
    ) -> None:
        super().__init__(path=path, width=width, length=length, tune=tune, trained=trained)
        self.config |= dict(tokens=tokens, max_views=max_views)
        inner = self.model.config.vision_config
        if not getattr(inner, "image_size", None):
            raise ValueError(f"the encoder {path} reads pictures of any size; choose one of a fixed size, such as "
                             f"google/siglip2-base-patch16-256")  # fmt: skip
        self.tokens, self.side = tokens, int(inner.image_size) // int(inner.patch_size)
        self.visual = nn.Sequential(nn.LayerNorm(inner.hidden_size), nn.Linear(inner.hidden_size, width))
        text = self.model.config.text_config.hidden_size
        self.language = nn.Sequential(nn.LayerNorm(text), nn.Linear(text, width))
        self.place = nn.Parameter(0.02 * torch.randn(max_views, tokens * tokens, width))
        self._known: dict[tuple, Tensor] = {}

    def words(self, instructions: Sequence[str]) -> Int64[Tensor, "b l"]:
        """Token numbers + 1, padded with 0. In small letters, as all text of its training was; SigLIP2's tokenizer,
        Gemma's, keeps capitals."""
        return super().words([text.lower() for text in instructions])

    def features(self, pictures: UInt8[Tensor, "b v h w 3"], words: Int64[Tensor, "b l"]) -> Float[Tensor, "b n d"]:
        """Patch tokens, averaged to `tokens` a side, view after view."""
        x = self.model.vision_model(pixel_values=self.pixels(pictures)).last_hidden_state
        x = F.adaptive_avg_pool2d(x.mT.unflatten(2, (self.side, self.side)), self.tokens).flatten(2).mT
        return x.unflatten(0, pictures.shape[:2]).flatten(1, 2)

    @torch.compiler.disable  # what is remembered is no part of a graph: it would be compiled anew at every instruction
    def _text(self, words: Int64[Tensor, "b l"]) -> Float[Tensor, "b d"]:
        each, row = words.unique(dim=0, return_inverse=True)
        if self.tune:
            return self.model.text_model(input_ids=self.ids(each)).pooler_output[row]
        names = [tuple(line) for line in each.tolist()]
        if fresh := [k for k, name in enumerate(names) if name not in self._known]:
            kind = words.device.type
            with torch.no_grad(), torch.autocast(kind, enabled=False), autocast("fp32", kind):
                found = [self.model.text_model(input_ids=self.ids(each[k : k + 1])).pooler_output[0] for k in fresh]
            self._known |= {names[k]: value.cpu() for k, value in zip(fresh, found, strict=True)}
        self._known |= {name: self._known.pop(name) for name in names}  # the last are those asked for last
        values = torch.stack([self._known[name] for name in names])
        for name in list(self._known)[:-KEPT]:
            del self._known[name]
        return values.to(words.device)[row]

    def project(
        self, features: Float[Tensor, "b n d"], words: Int64[Tensor, "b l"]
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b 1 c"]]:
        """Visual tokens with their places, and one language token."""
        visual = self.visual(features.to(self.place.dtype))
        place = self.place[: visual.shape[1] // self.tokens**2].flatten(0, 1)
        return visual + place, self.language(self._text(words))[:, None]
