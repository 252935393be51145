"""Image augmentation: each picture moves by a few pixels and changes its light a little."""

import torch
from jaxtyping import UInt8
from torch import Tensor


def shift(pictures: UInt8[Tensor, "b v h w 3"], pixels: int) -> UInt8[Tensor, "b v h w 3"]:
    """Each row moves by up to `pixels` in both directions, all its views alike; the border is repeated."""
    if pixels == 0:
        return pictures
    b, v, h, w, _ = pictures.shape
    by = torch.randint(-pixels, pixels + 1, (b, 2, 1), device=pictures.device)
    rows = (torch.arange(h, device=pictures.device) + by[:, 0]).clamp(0, h - 1)
    cols = (torch.arange(w, device=pictures.device) + by[:, 1]).clamp(0, w - 1)
    row = torch.arange(b, device=pictures.device)[:, None, None]
    moved = pictures.permute(0, 2, 3, 1, 4)[row, rows[:, :, None], cols[:, None, :]]
    return moved.permute(0, 3, 1, 2, 4)


def jitter(pictures: UInt8[Tensor, "b v h w 3"], amount: float) -> UInt8[Tensor, "b v h w 3"]:
    """Gain of each colour and offset of each row drawn from 1 +- amount and 0 +- amount / 2 of full scale."""
    if amount == 0:
        return pictures
    b = len(pictures)
    gain = 1 + amount * (2 * torch.rand(b, 1, 1, 1, 3, device=pictures.device) - 1)
    offset = 127 * amount * (2 * torch.rand(b, 1, 1, 1, 1, device=pictures.device) - 1)
    return (pictures * gain + offset).clamp(0, 255).to(torch.uint8)
