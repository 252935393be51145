"""Pictures to tokens by the colours that things have: a small frozen front, fitted to the data, and a trained back.

A few colours are chosen from the training pictures so that rare ones, which small objects have, are not left out. For
each colour the pixels that are like it are summed up: their share of the picture, centre and extent. That is exact to
a fraction of a pixel, costs one table look-up a pixel and has nothing to learn.

What follows sees a few places alone: the instruction chooses which colours make up each of `slots` places (attention
whose scores know a colour's name and share, never where it is), and an MLP that the instruction steers (FiLM, Perez et
al. 2018, arXiv:1709.07871) turns these into `summary` tokens. An MLP over all colours instead knows each of a few
hundred episodes by the places of things that do not matter.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from dreamgen.policies.encoder import WordHash, grid

LEVELS = 32  # of each channel in the table of colours: its upper five bits
FEATURES = 5  # centre (2), extent (2), share
BLEND = 12.0  # how far, of 255, a colour reaches
NAME = 16  # width of what colours are chosen by
REACH = 3.0  # measures times this are about as wide as a standard normal
FEW = 0.25  # pixels: what a colour that is hardly there counts for, so that its centre stays put


def choose_colours(*pictures: UInt8[Tensor, "_ _ _ _ 3"], count: int) -> Float[Tensor, "k 3"]:
    """`count` colours in [0, 255] of pictures (n v h w 3): k-means over the occupied cells of colour space, begun far
    apart.

    A cell weighs the cube root of its pixels, not their number: a block counts for something beside a table.
    """
    pixels = torch.cat([some.flatten(0, -2) for some in pictures])
    pixels = pixels[:: max(1, len(pixels) // 4_000_000)].float()
    cell = (pixels / 12).round().long()
    number = (cell[:, 0] * 32 + cell[:, 1]) * 32 + cell[:, 2]
    _, inverse, size = number.unique(return_inverse=True, return_counts=True)
    mean = torch.zeros(len(size), 3).index_add_(0, inverse, pixels) / size[:, None]
    usual = size > 1e-5 * len(pixels)
    mean, weight = mean[usual], size[usual].double() ** (1 / 3)
    chosen = [mean[weight.argmax()]]
    for _ in range(count - 1):
        chosen.append(mean[(torch.cdist(mean, torch.stack(chosen)).min(1).values.double() ** 2 * weight).argmax()])
    colours = torch.stack(chosen)
    for _ in range(20):
        share = F.one_hot(torch.cdist(mean, colours).argmin(1), count).double() * weight[:, None]
        total = share.sum(0)[:, None]
        colours = torch.where(total > 0, (share.T @ mean.double()) / total.clamp(min=1e-9), colours.double()).float()
    return colours


class PaletteEncoder(nn.Module):
    """See the module. `fit` takes colours and statistics from training pictures; they are saved with the weights.

    width: of a token. colours: looked for in each view. slots, summary: numbers of tokens. hidden: width of the MLP.
    views: the most that a robot has; a policy says how many (`look_at`). noise: added to measures in training, in
    standard deviations. dropout: of the MLP's hidden entries.
    """

    tune = False  # the front, see `dreamgen.policies.features`
    by_view = ("name", "std")  # weights that have rows of each view, see `dreamgen.policies.start`

    def __init__(self, *, width: int = 128, colours: int = 32, slots: int = 16, summary: int = 2, hidden: int = 192,
                 views: int = 1, noise: float = 0.02, dropout: float = 0.1, text_width: int = 64, buckets: int = 512,
                 length: int = 16) -> None:  # fmt: skip
        super().__init__()
        self.config = dict(width=width, colours=colours, slots=slots, summary=summary, hidden=hidden, views=views,
                           noise=noise, dropout=dropout, text_width=text_width, buckets=buckets,
                           length=length)  # fmt: skip
        self.width, self.slots, self.summary, self.noise, self.dropout = width, slots, summary, noise, dropout
        self.text = WordHash(width=text_width, buckets=buckets, length=length)
        self.asked = nn.Linear(text_width, slots * NAME)
        self.usual = nn.Parameter(0.5 * torch.randn(slots, NAME))
        self.name = nn.Parameter(torch.randn(views * colours, NAME))  # of each colour in each view
        self.size = nn.Parameter(torch.full((slots, 1), 0.5))
        self.enter = nn.Linear(slots * FEATURES, hidden)
        self.inner = nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, hidden)
        self.film = nn.Linear(text_width, 4 * hidden)
        self.leave = nn.Linear(hidden, summary * width)
        self.summary_name = nn.Parameter(0.2 * torch.randn(summary, width))
        self.token = nn.Linear(FEATURES, width)
        self.slot_name = nn.Parameter(0.2 * torch.randn(slots, width))
        self.language = nn.Linear(text_width, width)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("palette", torch.rand(colours, 3) * 255)
        self.register_buffer("std", torch.ones(views * colours, FEATURES))
        self._table: Tensor | None = None

    def look_at(self, views: int) -> None:
        """Look for every colour in so many views. Where they were others, the colours' names begin anew."""
        if views != self.config["views"]:
            self.config["views"] = views
            self.name = nn.Parameter(torch.randn(views * len(self.palette), NAME))
            self.std = torch.ones(views * len(self.palette), FEATURES)

    def words(self, instructions: Sequence[str]) -> Int64[Tensor, "b l"]:
        return self.text.words(instructions)

    @torch.no_grad()
    def fit(self, *pictures: UInt8[Tensor, "_ _ _ _ 3"]) -> None:
        """Choose the colours and take the features' statistics, of pictures (n v h w 3) with different numbers of views
        where several are given. Raises ValueError where the most are another number than this encoder's."""
        most = max(some.shape[1] for some in pictures)
        if most * len(self.palette) != len(self.std):
            raise ValueError(f"pictures have {most} views; this encoder was made for {self.config['views']}: give it "
                             f"views={most}")  # fmt: skip
        self.palette.copy_(choose_colours(*(some.cpu() for some in pictures), count=len(self.palette)))
        self._table = None
        found = [torch.cat([self.measure(part) for part in some.split(64)]) for some in pictures]
        start = 0
        for stop in sorted({some.shape[1] for some in found}):  # of each view by the robots that have it
            have = torch.cat([some[:, start:stop] for some in found if some.shape[1] >= stop])
            self.std[start:stop] = have.std(0) + 0.02
            start = stop

    def lookup(self) -> Float[Tensor, "cells k"]:
        """How much each cell of colour space belongs to each colour; rows sum to 1 near a colour, to 0 far off.
        Computed when it is first asked for on a device; what is compiled must find it there."""
        if self._table is None or self._table.device != self.palette.device:
            level = (torch.arange(LEVELS, device=self.palette.device) + 0.5) * 256 / LEVELS
            cells = torch.stack(torch.meshgrid(level, level, level, indexing="ij"), -1).view(-1, 3)
            near = (-(torch.cdist(cells, self.palette.float()) / BLEND).square() / 2).exp()
            share = near / (near.sum(1, keepdim=True) + 1e-3)
            self._table = torch.where(share < 1e-5, 0, share)  # sums of denormal numbers take ten times as long
        return self._table

    @torch.no_grad()
    def measure(self, pictures: UInt8[Tensor, "b v h w 3"]) -> Float[Tensor, "b k 5"]:
        """Centre and extent (rows, columns, in half pictures) and log share of each colour in each view given."""
        b, v, h, w, _ = pictures.shape
        with torch.autocast(pictures.device.type, enabled=False):
            x = pictures.flatten(0, 1).flatten(1, 2) >> 3
            cell = (x[..., 0].int() * LEVELS + x[..., 1]) * LEVELS + x[..., 2]  # (b*v h*w)
            places = grid(h, w, self.std)
            moments = torch.cat([torch.ones_like(places[:, :1]), places, places.square()], 1)
            sums = moments.T @ F.embedding(cell, self.lookup())  # (b*v 5 k)
            total, centre, square = sums.transpose(1, 2).split([1, 2, 2], -1)
            centre, square = centre / (total + FEW), square / (total + FEW)
            extent = (square - centre.square()).clamp(min=0).sqrt()
            share = (total * (4096 / (h * w)) / 40).log1p()
        return torch.cat([centre, extent, share], -1).unflatten(0, (b, v)).flatten(1, 2)

    def identity(self) -> list:
        """What the features depend on beside the pictures, as plain JSON."""
        return [self.config, self.palette.tolist()]

    def features(self, pictures: UInt8[Tensor, "b v h w 3"], words: Int64[Tensor, "b l"]) -> Float[Tensor, "b k 5"]:
        """The measures of the fitted front, which no training changes."""
        return self.measure(pictures)

    def forward(
        self, pictures: UInt8[Tensor, "b v h w 3"], words: Int64[Tensor, "b l"]
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b m c"]]:
        return self.project(self.measure(pictures), words)

    def project(
        self, found: Float[Tensor, "b k 5"], words: Int64[Tensor, "b l"]
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b m c"]]:
        """Visual and language tokens of measures."""
        text = self.text(words)
        places = REACH * self.places(found, text)
        scale1, shift1, scale2, shift2 = self.film(text).chunk(4, -1)
        y = F.gelu(self.enter(places.flatten(1)) * (1 + scale1) + shift1)
        y = y + F.gelu(self.inner(F.dropout(y, self.dropout, self.training)) * (1 + scale2) + shift2)
        y = y + F.gelu(self.last(F.dropout(y, self.dropout, self.training)))
        summary = self.leave(y).unflatten(1, (self.summary, self.width)) + self.summary_name
        slots = self.token(places) + self.slot_name
        return self.norm(torch.cat([summary, slots], 1)), self.norm(self.language(text)[:, None])

    def places(self, found: Float[Tensor, "b k 5"], text: Float[Tensor, "b w"]) -> Float[Tensor, "b s 5"]:
        """Measures of the colours that the instruction asks for, mixed into slots."""
        asked = self.asked(text).unflatten(1, (self.slots, NAME)) + self.usual
        share = (found[..., 4].expm1() + 1e-3).log()[:, None]
        count = found.shape[1]  # of the views that a robot has
        chosen = (asked @ self.name[:count].T / NAME**0.5 * 2 + self.size * share).softmax(-1)
        if self.training and self.noise:
            found = found + self.noise * self.std[:count] * torch.randn_like(found)
        return chosen.to(found.dtype) @ found
