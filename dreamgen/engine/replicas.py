"""Several processes that share one model's weights and split each batch.

On a CPU a small model wastes a second thread on its many small operations, while a second process with half of the
batch does half of the work. The replicas are forks: they read the same weights and the same data in shared memory,
write their gradients into a shared buffer, and never outlive their parent.
"""

import ctypes
import gc
import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch
from torch import nn

Half = Callable[[int, int], dict[str, float]]


def portable(error: Exception) -> Exception:
    """An error as another process can read it. What a user can mend stays what it is, a ValueError or an OSError; of
    any other, where it happened is printed here."""
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, error.strerror, error.filename)
    for kind in (OSError, ValueError):
        if isinstance(error, kind):
            return kind(str(error))
    traceback.print_exception(error)
    return RuntimeError(f"a process that helped has failed (see above) with {type(error).__name__}: {error}")


def begin(target: Callable[[Connection, int], None], rank: int) -> tuple[BaseProcess, Connection]:
    """A fork that runs `target(pipe, rank)`, and this end of the pipe.

    It leaves what its parent has made alone: to free an object whose threads stayed behind, such as a decoder's, would
    wait for them for ever.
    """
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    fork = context.Process(target=target, args=(theirs, rank), daemon=True)
    gc.collect()
    gc.freeze()
    try:
        fork.start()
    finally:
        gc.unfreeze()
    theirs.close()
    return fork, mine


def last_word(pipe: Connection) -> Exception | None:
    """What a fork says before it ends: an error, or nothing."""
    try:
        return pipe.recv()
    except EOFError:
        return None


def possible(count: int, device: torch.device) -> int:
    """`count` where forks can share a model: on the CPU of a Linux machine; elsewhere 1."""
    return count if sys.platform == "linux" and device.type == "cpu" else 1


def in_forks(work: Callable[[int], None], count: int) -> None:
    """`work(rank)` in this process, rank 0, and in `count - 1` forks; what they make lies on the disk.

    Raises what a fork raised (see `portable`), and RuntimeError if one was killed.
    """

    def helped(pipe: Connection, rank: int) -> None:
        try:
            work(rank)
        except Exception as error:
            pipe.send(portable(error))

    threads = torch.get_num_threads()
    if count > 1:
        torch.set_num_threads(1)
    forks, said = [], []
    try:
        forks += [begin(helped, rank) for rank in range(1, count)]
        work(0)
    finally:
        for fork, pipe in forks:
            said.append(last_word(pipe))
            fork.join()
        torch.set_num_threads(threads)
    for error in said:
        if error is not None:
            raise error
    if any(fork.exitcode for fork, _ in forks):
        raise RuntimeError("a process that helped was killed; run the job again, it continues")


class Replicas:
    """`count - 1` forks beside this process. `work(step, rank)` leaves gradients on the model and returns metrics.

    Use as a context; `run(step)` works on all parts of one step and leaves the mean gradient on the model, and none on
    a parameter that none of them used.
    """

    def __init__(self, model: nn.Module, work: Half, count: int) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.work, self.count = work, count
        if count > 1:
            model.share_memory()
        size = sum(p.numel() for p in self.parameters)
        self.gradients = torch.zeros(max(count - 1, 1), size if count > 1 else 1).share_memory_()
        self.used = torch.zeros(max(count - 1, 1), len(self.parameters), dtype=torch.bool).share_memory_()
        self.pipes: list[Connection] = []
        self.forks: list[BaseProcess] = []

    def __enter__(self) -> "Replicas":
        self.threads = torch.get_num_threads()
        if self.count > 1:
            torch.set_num_threads(1)  # a core each; also, a fork must not meet the threads of its parent
        for rank in range(1, self.count):
            fork, pipe = begin(self._serve, rank)
            self.forks.append(fork)
            self.pipes.append(pipe)
        return self

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self.threads)
        for pipe in self.pipes:
            pipe.close()
        for fork in self.forks:
            fork.terminate()
            fork.join()

    def run(self, step: int) -> dict[str, float]:
        """Mean metrics of the step; mean gradients on the parameters. Raises what a fork raised (see `portable`),
        RuntimeError if one died."""
        for pipe in self.pipes:
            pipe.send(step)
        found = [self.work(step, 0)]
        try:
            found += [pipe.recv() for pipe in self.pipes]
        except EOFError:
            raise RuntimeError("a replica died; the last checkpoint is whole, run the job again") from None
        for said in found:
            if isinstance(said, Exception):
                raise said
        if self.count > 1 and any(p.grad is not None for p in self.parameters):
            used = self.used.any(0) | self._used()
            mine = torch.cat([p.grad.flatten() for p in self._whole()])
            total = mine.add_(self.gradients.sum(0)).div_(self.count)
            for p, part in zip(self.parameters, total.split([p.numel() for p in self.parameters]), strict=True):
                p.grad.copy_(part.view_as(p))
            for p, moves in zip(self.parameters, used.tolist(), strict=True):
                p.grad = p.grad if moves else None
        return {key: sum(metrics[key] for metrics in found) / len(found) for key in found[0]}

    def _used(self) -> torch.Tensor:
        """Which of the parameters have a gradient."""
        return torch.tensor([p.grad is not None for p in self.parameters])

    def _whole(self) -> list[nn.Parameter]:
        """The parameters, each with a gradient: 0 where a step did not use it."""
        for p in self.parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return self.parameters

    def _serve(self, pipe: Connection, rank: int) -> None:
        """A fork's life: work on its part of each step that it is told, until the parent is gone."""
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        torch.set_num_threads(1)
        while True:
            try:
                step = pipe.recv()
            except EOFError:
                return
            for p in self.parameters:
                p.grad = None
            try:
                said = self.work(step, rank)
                self.used[rank - 1] = self._used()
                torch.cat([p.grad.flatten() for p in self._whole()], out=self.gradients[rank - 1])
            except Exception as error:
                pipe.send(portable(error))
                return
            pipe.send(said)
