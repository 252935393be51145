"""Statistics of LeRobot datasets: min, max, mean, std, count and true quantiles, per entry.

Pictures are bytes, so a histogram of 256 bins per channel holds all of it and adds up over episodes: the quantiles of
a whole dataset are exact, and nothing is kept. Numbers are taken whole, one column at a time.
"""

import numpy as np
from jaxtyping import Int64, UInt8

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}


def of_numbers(values: np.ndarray) -> dict[str, list]:
    """Statistics of (n k) numbers, each a list of k; count is a list of one."""
    values = values.astype(np.float64)
    found = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    levels = np.quantile(values, list(QUANTILES.values()), axis=0)
    found |= dict(zip(QUANTILES, levels, strict=True))
    return {name: value.tolist() for name, value in found.items()} | {"count": [len(values)]}


def histogram(frames: UInt8[np.ndarray, "t h w 3"]) -> Int64[np.ndarray, "3 256"]:
    """How often each byte occurs in each channel."""
    return np.stack([np.bincount(frames[..., c].ravel(), minlength=256) for c in range(3)])


def of_pictures(counts: Int64[np.ndarray, "3 256"], frames: int) -> dict[str, list]:
    """Statistics in [0, 1] of all pixels in a histogram, each of shape (3, 1, 1); count is the number of frames."""
    levels, total = np.arange(256) / 255, counts.sum(1)
    mean = counts @ levels / total
    found = {
        "min": levels[(counts > 0).argmax(1)],
        "max": levels[255 - (counts[:, ::-1] > 0).argmax(1)],
        "mean": mean,
        "std": np.sqrt(np.maximum(counts @ levels**2 / total - mean**2, 0)),
    }
    ends = counts.cumsum(1)
    for name, q in QUANTILES.items():
        # as numpy: linear between the two ranks around q (n - 1)
        rank = q * (total - 1)
        low, high = np.floor(rank), np.ceil(rank)
        a, b = (levels[(ends <= r[:, None]).sum(1)] for r in (low, high))
        found[name] = a + (b - a) * (rank - low)
    return {name: value.reshape(3, 1, 1).tolist() for name, value in found.items()} | {"count": [frames]}
