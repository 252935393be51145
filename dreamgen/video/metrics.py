"""How alike two videos are."""

from collections.abc import Callable
from functools import cache

import numpy as np
from jaxtyping import UInt8


def psnr_by_frame(a: UInt8[np.ndarray, "t h w 3"], b: UInt8[np.ndarray, "t h w 3"]) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each frame (t,); equal frames count as 100 dB."""
    _require_alike(a, b)
    error = ((a.astype(np.float64) - b.astype(np.float64)) ** 2).mean(axis=(1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 255**2 * 1e-10))


def psnr(a: UInt8[np.ndarray, "t h w 3"], b: UInt8[np.ndarray, "t h w 3"]) -> float:
    """Peak signal-to-noise ratio in dB, mean over frames; equal frames count as 100 dB."""
    return float(np.mean(psnr_by_frame(a, b)))


def ssim_by_frame(a: UInt8[np.ndarray, "t h w 3"], b: UInt8[np.ndarray, "t h w 3"]) -> np.ndarray:
    """Structural similarity (11-pixel Gaussian window) of each frame (t,); 1 where equal."""
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    _require_alike(a, b)
    with torch.autocast("cpu", enabled=False):  # a variance is a difference of squares: bfloat16 makes it negative
        found = structural_similarity_index_measure(_tensor(a), _tensor(b), data_range=1.0, reduction="none")
    return np.asarray(found, dtype=np.float64).reshape(len(a))


def ssim(a: UInt8[np.ndarray, "t h w 3"], b: UInt8[np.ndarray, "t h w 3"]) -> float:
    """Structural similarity (11-pixel Gaussian window), mean over frames; 1 where equal."""
    return float(np.mean(ssim_by_frame(a, b)))


@cache
def lpips_or_reason() -> tuple[Callable | None, str]:
    """LPIPS of each frame (Zhang et al. 2018, arXiv:1801.03924; AlexNet), or None and why it cannot be had here.

    torchmetrics takes the network from torchvision and its weights from the hub; both may be missing.
    """
    try:
        from torchmetrics.functional.image.lpips import _LPIPS

        net = _LPIPS(pretrained=True, net="alex", spatial=False).eval()
    except (ImportError, ModuleNotFoundError, NameError, OSError) as error:
        return None, f"no weights of LPIPS on this machine ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
    return net, ""


def lpips_by_frame(a: UInt8[np.ndarray, "t h w 3"], b: UInt8[np.ndarray, "t h w 3"]) -> np.ndarray:
    """Perceptual distance of each frame (t,); 0 where equal. Raises ValueError where `lpips_or_reason` has none."""
    import torch

    _require_alike(a, b)
    net, reason = lpips_or_reason()
    if net is None:
        raise ValueError(reason)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return net(_tensor(a) * 2 - 1, _tensor(b) * 2 - 1).flatten().double().numpy()


def by_frame(a: UInt8[np.ndarray, "t h w 3"], b: UInt8[np.ndarray, "t h w 3"]) -> dict[str, np.ndarray]:
    """`psnr`, `ssim` and, where it can be had, `lpips` of each frame (t,)."""
    found = {"psnr": psnr_by_frame(a, b), "ssim": ssim_by_frame(a, b)}
    return found | ({"lpips": lpips_by_frame(a, b)} if lpips_or_reason()[0] is not None else {})


def _tensor(video: np.ndarray):  # noqa: ANN202
    import torch

    return torch.from_numpy(np.ascontiguousarray(video)).permute(0, 3, 1, 2).float() / 255


def _require_alike(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8 or a.ndim != 4:
        raise ValueError(f"videos are {a.dtype} {a.shape} and {b.dtype} {b.shape}; expected two uint8 "
                         f"(t h w 3) of one size")  # fmt: skip
