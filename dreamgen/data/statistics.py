"""Statistics of LeRobot datasets: min, max, mean, std, count and true quantiles, per entry.

Pictures are bytes, so a histogram of 256 bins per channel holds all of it and adds up over episodes: the quantiles of
a whole dataset are exact, and nothing is kept. Numbers that fit into memory are taken whole. Others are read in
chunks, several times: moments are merged (Chan, Golub and LeVeque 1979, eq. 2.1), and the ranks beside a quantile are
found 16 bits at a time, in the order of the numbers' bits (a radix selection), so that they too are those of numpy.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
WHOLE = 2**22  # numbers of one column that are taken whole
DIGIT = 16
PIXELS = 2**15  # that are counted at once: they stay in the cache


def of_numbers(values: np.ndarray) -> dict[str, list]:
    """Statistics of (n k) numbers, each a list of k; count is a list of one."""
    values = values.astype(np.float64)
    found = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    levels = np.quantile(values, list(QUANTILES.values()), axis=0)
    found |= dict(zip(QUANTILES, levels, strict=True))
    return {name: value.tolist() for name, value in found.items()} | {"count": [len(values)]}


def histogram(frames: UInt8[np.ndarray, "t h w 3"]) -> Int64[np.ndarray, "3 256"]:
    """How often each byte occurs in each channel."""
    found, pixels = np.zeros((3, 256), np.int64), frames.reshape(-1, 3)
    for at in range(0, len(pixels), PIXELS):
        for c in range(3):
            found[c] += np.bincount(pixels[at : at + PIXELS, c], minlength=256)
    return found


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


def joined(parts: Sequence[Mapping[str, list]]) -> dict[str, list]:
    """Statistics of data of which those of its parts are known, of any shape; quantiles are the mean of the parts',
    by their counts, as lerobot joins them."""
    counts = np.array([part["count"][0] for part in parts], np.float64)
    share = counts / counts.sum()
    known = {name: np.array([part[name] for part in parts], np.float64) for name in parts[0]
             if name != "count" and all(name in part for part in parts)}  # fmt: skip
    found = {name: np.tensordot(share, values, 1) for name, values in known.items()}
    for name, end in (("min", np.min), ("max", np.max)):
        found |= {name: end(known[name], axis=0)} if name in known else {}
    if "mean" in known and "std" in known:
        squares = known["std"] ** 2 + (known["mean"] - found["mean"]) ** 2
        found["std"] = np.sqrt(np.tensordot(share, squares, 1))
    return {name: value.tolist() for name, value in found.items()} | {"count": [int(counts.sum())]}


def of_chunks(read: Callable[[], Iterable[np.ndarray]]) -> dict[str, list]:
    """`of_numbers` of all chunks (n_i k) that each call of `read` gives anew; one chunk is in memory at a time.

    Numbers are float32 or float64, or whole numbers and booleans (exact up to 2**53).
    """
    count, mean, squares = 0, np.zeros(1), np.zeros(1)
    low, high = np.array(np.inf), np.array(-np.inf)
    for chunk in read():
        values = chunk.astype(np.float64)
        n, own = len(values), values.mean(0)
        off, total = own - mean, count + n
        squares = squares + ((values - own) ** 2).sum(0) + off**2 * (count * n / total)
        mean, count = mean + off * (n / total), total
        low, high = np.minimum(low, values.min(0)), np.maximum(high, values.max(0))
    found = {"min": low, "max": high, "mean": mean, "std": np.sqrt(squares / count)}
    ranks = [q * (count - 1) for q in QUANTILES.values()]
    wanted = sorted({int(edge(rank)) for rank in ranks for edge in (np.floor, np.ceil)})
    at = dict(zip(wanted, _selected(read, wanted), strict=True))
    for name, rank in zip(QUANTILES, ranks, strict=True):
        a, b, t = at[int(np.floor(rank))], at[int(np.ceil(rank))], rank - np.floor(rank)
        found[name] = a + (b - a) * t if t < 0.5 else b - (b - a) * (1 - t)  # as numpy rounds
    return {name: value.tolist() for name, value in found.items()} | {"count": [count]}


def _sortable(chunk: np.ndarray) -> np.ndarray:
    """float32 numbers as uint32, others as uint64, so that greater stays greater."""
    wide = chunk if chunk.dtype == np.float32 else chunk.astype(np.float64)
    unsigned = np.uint32 if wide.dtype == np.float32 else np.uint64
    bits, sign = wide.view(unsigned), unsigned(1 << (8 * wide.itemsize - 1))
    return np.where(bits & sign, ~bits, bits | sign)


def _selected(read: Callable[[], Iterable[np.ndarray]], ranks: list[int]) -> np.ndarray:
    """The numbers of the ranks in each entry (ranks k), as float64."""
    kind, width = next((chunk.dtype, chunk.shape[1]) for chunk in read())
    size = 32 if kind == np.float32 else 64
    left = np.repeat(np.array(ranks)[:, None], width, axis=1)  # ranks among the numbers that begin as `head`
    head = np.zeros((len(ranks), width), np.uint64)
    for shift in range(size - DIGIT, -1, -DIGIT):
        counts = [{} for _ in range(width)]
        for chunk in read():
            bits = _sortable(chunk).astype(np.uint64)
            for entry in range(width):
                column = bits[:, entry]
                above = column >> np.uint64(shift + DIGIT) if shift + DIGIT < 64 else np.zeros_like(column)
                digits = (column >> np.uint64(shift)).astype(np.int64) & (2**DIGIT - 1)
                for start in np.unique(head[:, entry]).tolist():
                    found = np.bincount(digits[above == start], minlength=2**DIGIT)
                    counts[entry][start] = counts[entry].get(start, 0) + found
        for entry in range(width):
            for k in range(len(ranks)):
                ends = counts[entry][int(head[k, entry])].cumsum()
                digit = int(np.searchsorted(ends, left[k, entry], side="right"))
                left[k, entry] -= ends[digit - 1] if digit else 0
                head[k, entry] = (int(head[k, entry]) << DIGIT) | digit
    sign = np.uint64(1 << (size - 1))
    bits = np.where(head & sign, head ^ sign, ~head & np.uint64(2**size - 1))
    return bits.astype(np.uint32).view(np.float32).astype(np.float64) if size == 32 else bits.view(np.float64)


def of_stored(paths: Iterable[Path], name: str, width: int) -> dict[str, list]:
    """Statistics of a column of parquet files, of which each row holds `width` numbers, in lists or not."""
    import pyarrow.parquet as pq

    files = list(paths)

    def chunks() -> Iterator[np.ndarray]:
        held, size = [], 0
        for path in files:
            for batch in pq.ParquetFile(path).iter_batches(columns=[name]):
                column = batch.column(0)
                while hasattr(column, "value_lengths"):
                    column = column.flatten()
                held.append(column.to_numpy(zero_copy_only=False).reshape(-1, width))
                size += held[-1].size
                if size >= WHOLE:
                    yield np.concatenate(held)
                    held, size = [], 0
        if held:
            yield np.concatenate(held)

    total = sum(pq.read_metadata(path).num_rows for path in files)
    return of_numbers(np.concatenate(list(chunks()))) if total * width <= WHOLE else of_chunks(chunks)
