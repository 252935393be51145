"""Frames to tokens: every frame is encoded once, with the differences to its neighbours as extra channels.

Small motion decides over a grasp, so nothing is pooled away before it is located: keypoints (spatial softmax over the
feature map of stride 4) give positions finer than a pixel, differences between neighbouring frames give motion at full
resolution. A pretrained encoder (SigLIP2, DINO) is in `idm.tower`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def with_motion(video: Tensor) -> Tensor:
    """Frames with their differences to the previous and the next frame.

    video (b c 3 h w) in [-1, 1] -> (b c 9 h w); the difference beyond an end is zero.
    """
    step = video[:, 1:] - video[:, :-1]
    still = torch.zeros_like(video[:, :1])
    return torch.cat([video, torch.cat([still, step], 1), torch.cat([step, still], 1)], dim=2)


SHARPNESS = 5.0
CHANNELS = (32, 64, 128, 128)


class Residual(nn.Module):
    """Two 3x3 convolutions with group norm around a shortcut; the first may halve the resolution."""

    def __init__(self, width_in: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1)
        self.norm2 = nn.GroupNorm(8, width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1)
        self.skip = nn.Conv2d(width_in, width, stride, stride) if stride > 1 or width_in != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


def keypoints(maps: Tensor) -> Tensor:
    """Expected position (x, y) in [-1, 1] of each map (n k h w) under its softmax, and its log-mass -> (n 3k) fp32.

    At the start of training maps are nearly flat and all positions nearly 0; sharper maps learn sooner.
    """
    maps = SHARPNESS * maps.float()
    n, k, h, w = maps.shape
    weight = maps.flatten(2).softmax(-1).view(n, k, h, w)
    xs = torch.linspace(-1, 1, w, device=maps.device)
    ys = torch.linspace(-1, 1, h, device=maps.device)
    x, y = (weight.sum(2) * xs).sum(-1), (weight.sum(3) * ys).sum(-1)
    return torch.cat([x, y, maps.flatten(2).logsumexp(-1) / SHARPNESS], dim=1)


class ConvVision(nn.Module):
    """Convolutional encoder from scratch.

    size: (height, width) of the canvas. channels: widths at strides 2, 4, 8, ...; the last gives the token grid.
    points: keypoints, located at stride 4. width: token width. layers, heads: self-attention within a frame.

    forward: (n 9 h w) in [-1, 1] -> tokens (n p + 1 width), the first a summary of where things are.
    """

    def __init__(self, *, size: tuple[int, int] | list[int], width: int = 128,
                 channels: Sequence[int] | None = CHANNELS, points: int = 32, layers: int = 0, heads: int = 4,
                 blocks: int = 1) -> None:  # fmt: skip
        super().__init__()
        channels = list(channels or CHANNELS)
        if len(channels) < 2 or any(edge % 2 ** len(channels) for edge in size) or any(c % 8 for c in channels):
            raise ValueError(f"a ConvVision with channels {channels} needs at least two stages, channels divisible by "
                             f"8 and a canvas divisible by {2 ** len(channels)}, got {tuple(size)}; choose other views "
                             f"sizes or channels")  # fmt: skip
        self.size, self.width = tuple(size), width
        self.stem = nn.Conv2d(9, channels[0], 5, 2, 2)
        self.stages = nn.ModuleList()
        for before, after in zip(channels[:-1], channels[1:], strict=True):
            self.stages.append(nn.Sequential(Residual(before, after, 2),
                                             *(Residual(after, after) for _ in range(blocks - 1))))  # fmt: skip
        self.points = nn.Sequential(nn.GroupNorm(8, channels[1]), nn.SiLU(), nn.Conv2d(channels[1], points, 1))
        self.grid = nn.Conv2d(channels[-1], width, 1)
        cells = (size[0] >> len(channels)) * (size[1] >> len(channels))
        self.summary = nn.Sequential(nn.Linear(3 * points + cells * width, 2 * width), nn.SiLU(),
                                     nn.Linear(2 * width, width))  # fmt: skip
        self.place = nn.Parameter(torch.randn(1, cells + 1, width) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )

    def forward(self, frames: Tensor) -> Tensor:
        x = self.stem(frames.contiguous(memory_format=torch.channels_last))
        located = None
        for stage in self.stages:
            x = stage(x)
            located = keypoints(self.points(x)) if located is None else located
        grid = self.grid(F.silu(x)).flatten(2).mT
        with torch.autocast(frames.device.type, enabled=False):
            summary = self.summary(torch.cat([located, grid.float().flatten(1)], dim=1))
        tokens = torch.cat([summary[:, None], grid.float()], dim=1) + self.place
        for layer in self.layers:
            tokens = layer(tokens)
        # the summary passes unattended, in full precision
        return torch.cat([summary[:, None], tokens[:, 1:].float()], dim=1)
