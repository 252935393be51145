"""What a world model does to pictures, in cheap: blur, noise, slight changes of colour and brightness.

Geometry is left alone: the labeler reads positions. Stronger likeness comes from passing training frames through the
world model's own autoencoder (`degrade` in `idm.batches`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def blur(video: Tensor) -> Tensor:
    """Binomial blur of five pixels, rows then columns; edges are repeated."""
    for axis in (-1, -2):
        size = video.shape[axis]
        first, last = video.narrow(axis, 0, 1), video.narrow(axis, size - 1, 1)
        wide = torch.cat([first, first, video, last, last], axis)
        video = sum(share / 16 * wide.narrow(axis, i, size) for i, share in enumerate((1, 4, 6, 4, 1)))
    return video


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Strengths, each drawn anew per clip: blur and noise hit a clip with probability `share`.

    blur: highest weight of the blurred picture; noise: highest standard deviation, colour: highest deviation
    of gain and offset per channel, all in units of the range [-1, 1].
    """

    share: float = 0.5
    blur: float = 0.7
    noise: float = 0.06
    colour: float = 0.06

    def __call__(self, video: Tensor) -> Tensor:
        """video (b c 3 h w) in [-1, 1] -> the same shape, changed alike in all frames of a clip (noise apart)."""
        b = len(video)

        def draw(*shape: int) -> Tensor:
            return torch.rand(b, *shape, device=video.device)

        gain = 1 + self.colour * (2 * draw(1, 3, 1, 1) - 1)
        video = video * gain + self.colour * (2 * draw(1, 3, 1, 1) - 1)
        blurred, noisy = draw() < self.share, draw() < self.share
        if self.blur and bool(blurred.any()):
            sharp = video[blurred]
            video[blurred] = torch.lerp(sharp, blur(sharp), self.blur * draw(1, 1, 1, 1)[blurred])
        if self.noise and bool(noisy.any()):
            grain = torch.randn_like(video[noisy])
            video[noisy] += grain * (self.noise * draw(1, 1, 1, 1)[noisy])
        return video.clamp(-1, 1)
