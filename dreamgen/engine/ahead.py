"""Batches that are made in a thread while earlier ones are used."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

DEPTH = 2  # batches in reserve: one slow read does not stop the next step


class Ahead:
    """`make(step)` by step, up to `stop`. waited: seconds that callers have spent waiting for a batch."""

    def __init__(self, make: Callable[[int], Any], stop: int, depth: int = DEPTH) -> None:
        self.make, self.stop, self.depth, self.waited = make, stop, depth, 0.0
        self.pool: ThreadPoolExecutor | None = None  # made on first use: a fork inherits no threads
        self.pending: deque[tuple[int, Future]] = deque()

    def __call__(self, step: int) -> Any:
        begun = time.perf_counter()
        self.pool = self.pool or ThreadPoolExecutor(1)
        while self.pending and self.pending[0][0] != step:
            self.pending.popleft()[1].cancel()
        future = self.pending.popleft()[1] if self.pending else None
        batch = self.make(step) if future is None else future.result()
        last = self.pending[-1][0] if self.pending else step
        for later in range(last + 1, min(step + self.depth, self.stop - 1) + 1):
            self.pending.append((later, self.pool.submit(self.make, later)))
        self.waited += time.perf_counter() - begun
        return batch
