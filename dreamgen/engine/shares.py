"""Parts of one global batch: which rows a process works on, and the noise that belongs to those rows.

A step's batch and its noise are functions of the step alone. A process that works on rows [a, b) of B draws the noise
of all B rows and keeps its own, so the result does not depend on how the batch was cut. Dropout alone
is each part's own: a network that has it (policy=tiny) comes to other weights from another cut.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

ALIKE = {torch.randn_like: torch.randn, torch.rand_like: torch.rand, torch.randint_like: torch.randint}
DRAWN = {torch.bernoulli, torch.poisson, torch._sample_dirichlet, torch._standard_gamma}  # row by row from parameters


@dataclass(frozen=True)
class Rows:
    """A batch of `count` rows that is read when it is known which are wanted: `read(slice)` returns a plain batch."""

    count: int
    read: Callable[[slice], Any]


def bounds(count: int, rank: int, parts: int) -> tuple[int, int]:
    """First and one past the last row of part `rank`, as `Tensor.tensor_split` cuts."""
    small, larger = divmod(count, parts)
    start = rank * small + min(rank, larger)
    return start, start + small + (rank < larger)


def within(start: int, stop: int, part: slice) -> slice:
    """`part` of the rows [start, stop), counted from 0."""
    first, last, _ = part.indices(stop - start)
    return slice(start + first, start + last)


def share(batch: Any, rank: int, count: int) -> Any:
    """Part `rank` of `count`: contiguous rows of each tensor; single numbers as they are."""
    if count == 1:
        return batch
    if isinstance(batch, Rows):
        start, stop = bounds(batch.count, rank, count)
        return Rows(stop - start, lambda part: batch.read(within(start, stop, part)))
    if isinstance(batch, Tensor) and batch.ndim:
        return batch.tensor_split(count)[rank]
    if isinstance(batch, dict):
        return {key: share(value, rank, count) for key, value in batch.items()}
    return batch


def read(batch: Any) -> Any:
    """The plain batch of `Rows`; any other batch as it is."""
    return batch.read(slice(None)) if isinstance(batch, Rows) else batch


def rows(batch: Any) -> int:
    """How many rows a batch has: the first dimension of its first tensor; 1 where there is none."""
    if isinstance(batch, Rows):
        return batch.count
    if isinstance(batch, Tensor) and batch.ndim:
        return len(batch)
    if isinstance(batch, dict):
        return next((n for value in batch.values() if (n := rows(value)) != 1), 1)
    return 1


class WholeNoise(TorchFunctionMode):
    """A context in which random tensors over `stop - start` rows are rows [start, stop) of the ones over `whole` rows.

    The generator must stand where it stands for the whole batch. The rows are the first dimension, or a multiple of it
    (b * k rows of b clips); a tensor whose first dimension is neither is drawn as it is.
    """

    def __init__(self, start: int, stop: int, whole: int) -> None:
        super().__init__()
        self.start, self.part, self.whole = start, stop - start, whole

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in ALIKE:
            like = {"dtype": args[0].dtype, "device": args[0].device, **kwargs}
            return self._cut(lambda size: ALIKE[func](*args[1:], size, **like), tuple(args[0].shape))
        if func is torch.randn or func is torch.rand:
            given = kwargs.pop("size", None) or args
            size = given if isinstance(given[0], int) else given[0]
            return self._cut(lambda size: func(size, **kwargs), tuple(size))
        if func is torch.randint:
            *numbers, size = (*args, kwargs.pop("size")) if "size" in kwargs else args
            return self._cut(lambda size: func(*numbers, size, **kwargs), tuple(size))
        if func in DRAWN and args[0].ndim and len(args[0]) == self.part:
            tiled = args[0].repeat(-(-self.whole // self.part) + 1, *[1] * (args[0].ndim - 1))
            tiled = tiled.roll(self.start, 0)[: self.whole]  # its own parameters in its own rows
            return func(tiled, *args[1:], **kwargs)[self.start : self.start + self.part]
        return func(*args, **kwargs)

    def _cut(self, draw: Callable[[tuple[int, ...]], Tensor], size: tuple[int, ...]) -> Tensor:
        if not size or not size[0] or size[0] % self.part:
            return draw(size)
        times = size[0] // self.part
        return draw((self.whole * times, *size[1:])).narrow(0, self.start * times, self.part * times).contiguous()


@dataclass(frozen=True)
class Part:
    """Rows [start, stop) of the `whole` rows that draw their noise together; weight: their share of the mean, times the
    number of replicas, over which a mean is taken at last."""

    batch: Any
    start: int
    stop: int
    whole: int
    weight: float

    def noise(self) -> AbstractContextManager:
        """The context in which a loss draws the noise of these rows."""
        alone = self.stop - self.start == self.whole
        return contextlib.nullcontext() if alone else WholeNoise(self.start, self.stop, self.whole)

    def to(self, device: torch.device) -> Any:
        return moved(self.batch, device)


def require_rows(whole: int, count: int, accumulate: int) -> None:
    """Raise ValueError where a batch of `whole` rows has fewer than `count` processes in `accumulate` parts each."""
    if whole < (pieces := count * accumulate):
        raise ValueError(f"a batch of {whole} rows cannot be cut into {pieces} parts ({count} processes, accumulate "
                         f"{accumulate}); take a larger batch, fewer processes or a smaller accumulate")  # fmt: skip


def parts_of(batch: Any, replica: int, replicas: int, rank: int, count: int, accumulate: int,
             device: torch.device) -> list[Part]:  # fmt: skip
    """What one process of `count` works on at a step, in `accumulate` parts; replicas draw noise of their own.

    Raises ValueError where the batch has fewer rows than there are parts.
    """
    every = sum(rows(share(batch, k, replicas)) for k in range(replicas))
    batch = share(batch, replica, replicas)
    whole, pieces = rows(batch), count * accumulate
    require_rows(whole, count, accumulate)
    made = []
    for piece in range(rank * accumulate, (rank + 1) * accumulate):
        start, stop = bounds(whole, piece, pieces)
        weight = (stop - start) * replicas / every
        made.append(Part(pinned(read(share(batch, piece, pieces)), device), start, stop, whole, weight))
    return made


def pinned(batch: Any, device: torch.device) -> Any:
    """The batch in memory from which a GPU copies while it works."""
    if isinstance(batch, Tensor) and device.type == "cuda":
        return batch.pin_memory() if batch.device.type == "cpu" else batch
    if isinstance(batch, dict):
        return {key: pinned(value, device) for key, value in batch.items()}
    return batch


def moved(batch: Any, device: torch.device) -> Any:
    """The batch on `device`."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: moved(value, device) for key, value in batch.items()}
    return batch
