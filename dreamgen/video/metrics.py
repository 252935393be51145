"""How alike two videos are."""

import numpy as np
from jaxtyping import UInt8


def psnr(a: UInt8[np.ndarray, "t h w 3"], b: UInt8[np.ndarray, "t h w 3"]) -> float:
    """Peak signal-to-noise ratio in dB, mean over frames; equal frames count as 100 dB."""
    _require_alike(a, b)
    error = ((a.astype(np.float64) - b.astype(np.float64)) ** 2).mean(axis=(1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / np.maximum(error, 255**2 * 1e-10))))


def ssim(a: UInt8[np.ndarray, "t h w 3"], b: UInt8[np.ndarray, "t h w 3"]) -> float:
    """Structural similarity (11-pixel Gaussian window), mean over frames; 1 where equal."""
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    _require_alike(a, b)
    x, y = (torch.from_numpy(np.ascontiguousarray(v)).permute(0, 3, 1, 2).float() / 255 for v in (a, b))
    return float(torch.as_tensor(structural_similarity_index_measure(x, y, data_range=1.0)))


def _require_alike(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8 or a.ndim != 4:
        raise ValueError(f"videos are {a.dtype} {a.shape} and {b.dtype} {b.shape}; expected two uint8 "
                         f"(t h w 3) of one size")  # fmt: skip
