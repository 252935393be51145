"""A Q-Former: M learned queries read the tokens of an observation, so that M vectors say what matters of it for acting.

Its output joins the context of the action head and is thus trained with the action loss; FLARE's targets are the same
queries on the future observation, by a copy that follows (Zheng et al. 2025, FLARE, section 3.2).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


class QFormer(nn.Module):
    """Tokens (b n c) to M tokens (b M c): each layer attends among the queries, then to the tokens that are there."""

    def __init__(self, *, width: int, queries: int, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        heads = next(n for n in range(min(heads, width), 0, -1) if width % n == 0)
        self.queries = nn.Parameter(0.02 * torch.randn(queries, width))
        layer = nn.TransformerDecoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerDecoder(layer, layers, nn.LayerNorm(width))

    def forward(
        self, tokens: Float[Tensor, "b n c"], there: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b m c"]:
        asked = self.queries.to(tokens.dtype).expand(len(tokens), -1, -1)
        return self.layers(asked, tokens, memory_key_padding_mask=None if there is None else ~there)
