"""What passes from encoder to decoder: little, so that it holds the change and not the picture.

Continuous (beta-VAE): z ~ N(mu, sigma), `beta * KL(N(mu, sigma) | N(0, 1))`; mu is the label. AdaWorld,
arXiv:2503.18938. Quantised (LAPA, arXiv:2410.11758): a few tokens of one small codebook; codes that nobody uses are
replaced early in training; the embedding before quantisation is the label.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Passed(NamedTuple):
    """z (... latent) goes on to the decoder; label (... latent) is exported, with its spread of the same shape; codes
    (... tokens) are None without a codebook."""

    z: Tensor
    label: Tensor
    spread: Tensor
    loss: Tensor
    codes: Tensor | None


class Continuous(nn.Module):
    """`latent` normal entries; the loss is beta times the KL divergence in nats."""

    def __init__(self, width: int, latent: int, beta: float) -> None:
        super().__init__()
        self.beta, self.proj_out = beta, nn.Linear(width, 2 * latent)

    def forward(self, hidden: Tensor) -> Passed:
        mean, spread = self.proj_out(hidden.float()).chunk(2, dim=-1)
        log = spread.clamp(-8, 4)
        sigma = (log / 2).exp()
        z = mean + sigma * torch.randn_like(mean) if self.training else mean
        kl = 0.5 * (mean**2 + log.exp() - 1 - log).sum(-1).mean()
        return Passed(z, mean, sigma, self.beta * kl, None)


class Quantised(nn.Module):
    """`tokens` vectors of latent / tokens entries, each replaced by the nearest of `codebook` codes.

    Codes that a batch leaves almost unused are replaced during the first `renewed` training steps.
    """

    moves_in_loss = True  # the codebook follows a moving average, see `dreamgen.engine.train`

    def __init__(self, width: int, latent: int, codebook: int, tokens: int, renewed: int) -> None:
        super().__init__()
        try:
            from vector_quantize_pytorch import VectorQuantize
        except ImportError as error:
            raise ValueError("quantised latent actions need vector-quantize-pytorch: pip install -e '.[latent]' in "
                             "dreamgen's folder, or choose labeler=latent_continuous") from error  # fmt: skip
        if latent % tokens:
            raise ValueError(f"{latent} latent entries cannot be shared by {tokens} tokens; choose a multiple")
        self.tokens, self.renewed = tokens, renewed
        self.proj_out = nn.Sequential(nn.Linear(width, latent), nn.Unflatten(-1, (tokens, -1)),
                                      nn.LayerNorm(latent // tokens))  # fmt: skip
        self.codes = VectorQuantize(latent // tokens, codebook, decay=0.9, threshold_ema_dead_code=1,
                                    commitment_weight=0.25)  # fmt: skip
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, hidden: Tensor) -> Passed:
        before = self.proj_out(hidden.float())
        if self.training:
            self.seen += 1
            self.codes._codebook.threshold_ema_dead_code = int(self.seen <= self.renewed)
        with torch.autocast(hidden.device.type, enabled=False):
            after, codes, loss = self.codes(before.flatten(0, -3))
        after, codes = after.view(before.shape), codes.view(before.shape[:-1])
        label = before.flatten(-2)
        return Passed(after.flatten(-2), label, (label - after.flatten(-2)).abs(), loss.sum(), codes)
