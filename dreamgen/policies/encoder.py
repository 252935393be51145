"""Pictures and words to tokens: the interface of the vision-language encoders and the tiny one, trained from scratch.

A small picture leaves little room: a block at 64 px is four pixels wide and must be grasped to within one. So the tiny
encoder keeps positions explicit. A convolution net, steered by the instruction (FiLM), draws one heat map per keypoint
on a fine grid; a keypoint's token holds where its map peaks (soft argmax) and what is there; coarse patch tokens
carry the rest of the scene. Colour keypoints do the same on the bare pixels with sharp maps: where a direction in
colour space peaks there is an object from the first step on, and what is left to learn is which one an instruction
means. Words are embedded as the sum of two hashed rows, so no vocabulary has to be kept.
"""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F


class Encoder(Protocol):
    """What a policy needs of a vision-language encoder; a module, frozen or not, tiny or pretrained.

    width: of each token. config: constructor arguments as plain JSON, for the checkpoint.
    """

    width: int
    config: dict

    def words(self, instructions: Sequence[str]) -> Int64[Tensor, "b l"]:
        """Instructions as numbers, padded with 0; each row depends on its own instruction alone."""
        ...

    def __call__(
        self, pictures: UInt8[Tensor, "b v h w 3"], words: Int64[Tensor, "b l"]
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b m c"]]:
        """Visual tokens, in a fixed order, and language tokens."""
        ...


class WordHash(nn.Module):
    """Instructions to one vector: hashed words with their positions, an MLP a word, the mean over words."""

    def __init__(self, *, width: int, buckets: int, length: int) -> None:
        super().__init__()
        self.buckets, self.length = buckets, length
        self.table = nn.Embedding(buckets + 1, width, padding_idx=0)
        self.position = nn.Parameter(0.1 * torch.randn(length, width))
        self.word = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))

    def words(self, instructions: Sequence[str]) -> Int64[Tensor, "b l"]:
        """Two bucket numbers a word, (b, 2 * length), 0 where the instruction has ended."""
        rows = torch.zeros(len(instructions), self.length, 2, dtype=torch.int64)
        for row, text in zip(rows, instructions, strict=True):
            for k, word in enumerate(text.lower().split()[: self.length]):
                value = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
                row[k, 0], row[k, 1] = 1 + value % self.buckets, 1 + (value // self.buckets) % self.buckets
        return rows.flatten(1)

    def forward(self, words: Int64[Tensor, "b l"]) -> Float[Tensor, "b c"]:
        pairs = words.unflatten(1, (self.length, 2))
        known = (pairs[..., :1] > 0).float()
        y = self.word(self.table(pairs).sum(2) + self.position) * known
        return self.out(y.sum(1) / known.sum(1).clamp(min=1))


class Stage(nn.Module):
    """Convolution, norm over channels, FiLM by the instruction, SiLU; with a residual where shapes agree.

    Maps stay channels-last throughout, (b h w c) to the eye, which is what a CPU's and a GPU's matrix units want.
    """

    def __init__(self, inner: int, outer: int, *, text: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inner, outer, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = nn.LayerNorm(outer, elementwise_affine=False)
        self.film = nn.Linear(text, 2 * outer)
        nn.init.normal_(self.film.weight, std=0.02)
        nn.init.zeros_(self.film.bias)
        self.residual = inner == outer and stride == 1

    def forward(self, x: Float[Tensor, "b h w c"], text: Float[Tensor, "b d"]) -> Float[Tensor, "b f g e"]:
        scale, shift = self.film(text)[:, None, None].chunk(2, dim=-1)
        y = self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        y = F.silu(torch.addcmul(shift, y, 1 + scale).to(x.dtype))
        return x + y if self.residual else y


def grid(height: int, width: int, like: Tensor) -> Float[Tensor, "n 2"]:
    """Row and column of each cell's centre in [-1, 1], row by row."""
    rows = (torch.arange(height, device=like.device, dtype=torch.float32) + 0.5) * 2 / height - 1
    cols = (torch.arange(width, device=like.device, dtype=torch.float32) + 0.5) * 2 / width - 1
    return torch.stack(torch.meshgrid(rows, cols, indexing="ij"), -1).flatten(0, 1)


SHARP = 12.0  # how far a colour keypoint's map prefers its colour over grey at the start


class TinyEncoder(nn.Module):
    """A few hundred thousand weights, no download, exact about positions.

    channels: one convolution stage each; the first `halvings` stages halve the picture, so the heat maps are
    size / 2 ** halvings fine. keypoints, colours: heat maps a view of features and of bare colours. patches: coarse
    tokens a side of each view.
    """

    def __init__(
        self,
        *,
        width: int = 128,
        channels: Sequence[int] = (32, 64, 64, 64),
        halvings: int = 2,
        keypoints: int = 24,
        colours: int = 24,
        patches: int = 4,
        text_width: int = 64,
        buckets: int = 512,
        length: int = 16,
        max_views: int = 8,
    ) -> None:
        super().__init__()
        self.config = dict(width=width, channels=list(channels), halvings=halvings, keypoints=keypoints,
                           colours=colours, patches=patches, text_width=text_width, buckets=buckets, length=length,
                           max_views=max_views)  # fmt: skip
        self.width, self.patches, self.keypoints = width, patches, keypoints
        self.text = WordHash(width=text_width, buckets=buckets, length=length)
        sizes = [3, *channels]
        self.stages = nn.ModuleList(
            Stage(a, b, text=text_width, kernel=5 if k == 0 else 3, stride=2 if k < halvings else 1)
            for k, (a, b) in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
        )
        self.heat = nn.Linear(sizes[-1], keypoints)
        self.sharpness = nn.Parameter(torch.zeros(keypoints))
        self.colour = nn.Linear(3, colours, bias=False)
        nn.init.normal_(self.colour.weight, std=SHARP / 3**0.5)
        self.place = nn.Sequential(nn.Linear(2 + 16 + text_width, width), nn.SiLU(), nn.Linear(width, width))
        self.what = nn.Linear(sizes[-1], width)
        self.patch = nn.Linear(sizes[-1], width)
        self.keypoint_name = nn.Parameter(0.2 * torch.randn(keypoints + colours, width))
        self.patch_name = nn.Parameter(0.02 * torch.randn(patches * patches, width))
        self.view_name = nn.Parameter(0.02 * torch.randn(max_views, width))
        self.language = nn.Linear(text_width, width)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("frequencies", torch.pi * 2.0 ** torch.arange(4), persistent=False)

    def words(self, instructions: Sequence[str]) -> Int64[Tensor, "b l"]:
        return self.text.words(instructions)

    def forward(
        self, pictures: UInt8[Tensor, "b v h w 3"], words: Int64[Tensor, "b l"]
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b m c"]]:
        b, v = pictures.shape[:2]
        text = self.text(words)
        x = pictures.flatten(0, 1).to(self.language.weight.dtype) / 127.5 - 1
        each = text.repeat_interleave(v, 0)
        for stage in self.stages:
            x = stage(x, each)
        h, w, features = *x.shape[1:3], x.flatten(1, 2)
        weight = (self.heat(features).float() * self.sharpness.exp()).transpose(1, 2).softmax(-1)  # (b*v k h*w)
        where = torch.cat([weight @ grid(h, w, x), self._colour_places(pictures.flatten(0, 1))], 1)
        angle = (where[..., None] * self.frequencies).flatten(2)
        meant = each[:, None].expand(-1, where.shape[1], -1)
        point = self.place(torch.cat([where, angle.sin(), angle.cos(), meant], -1)) + self.keypoint_name
        point[:, : self.keypoints] = point[:, : self.keypoints] + self.what(weight.to(features.dtype) @ features)
        coarse = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), self.patches).flatten(2).transpose(1, 2)
        patch = self.patch(coarse) + self.patch_name
        tokens = torch.cat([point, patch], 1).unflatten(0, (b, v)) + self.view_name[:v, None]
        return self.norm(tokens.flatten(1, 2)), self.norm(self.language(text)[:, None])

    def _colour_places(self, pictures: UInt8[Tensor, "n h w 3"]) -> Float[Tensor, "n k 2"]:
        """Where each direction in colour space peaks, on a grid half as fine as the picture."""
        x = F.avg_pool2d(pictures.permute(0, 3, 1, 2).float() / 127.5 - 1, 2)
        with torch.autocast(x.device.type, enabled=False):  # a pixel's place does not survive eight bits
            heat = (self.colour.weight.float() @ x.flatten(2)).softmax(-1)
            return heat @ grid(*x.shape[2:], x)
