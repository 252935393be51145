"""The rest of each piece of work, done in a thread while the next piece begins."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

DEPTH = 1  # pieces that wait: each holds memory


class Behind:
    """`work(*piece)` in one thread, in order, at most `DEPTH` + 1 pieces behind the caller. Use as a context.

    An error of the thread is raised by the next call, or at the end of the context, and nothing later is begun.
    """

    def __init__(self, work: Callable[..., Any]) -> None:
        self.work, self.failed = work, False
        # sums depend on the number of threads, and a new thread does not inherit it
        self.pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))
        self.pending: deque[Future] = deque()

    def __call__(self, *piece: Any) -> None:
        """Hand over a piece; waits while too many are under way."""
        while self.pending and (len(self.pending) > DEPTH or self.pending[0].done()):
            self.pending.popleft().result()
        self.pending.append(self.pool.submit(self._run, *piece))

    def _run(self, *piece: Any) -> None:
        if self.failed:  # what was handed over before the error was known
            return
        try:
            self.work(*piece)
        except BaseException:
            self.failed = True
            raise

    def __enter__(self) -> "Behind":
        return self

    def __exit__(self, kind: type | None, error: object, trace: object) -> None:
        try:
            while self.pending and kind is None:
                self.pending.popleft().result()
        finally:
            self.pool.shutdown(cancel_futures=True)
