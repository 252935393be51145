"""Work that processes share out: results in order, and a process that dies is an error, not a wait without end."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import util
from typing import Any

from dreamgen.core.orphans import die_with_parent


def shared_out(
    task: Callable, items: Sequence, workers: int, *, prepare: Callable | None = None, given: tuple = ()
) -> Iterator[Any]:
    """`map(task, items)` over at most `workers` new processes; what `task` raises is raised here.

    prepare: called with `given`, sent once, in each process before its first item. It must only keep what it is given:
    what it raises would end the process without a word.

    Raises ValueError if a process ends before its work is done.
    """
    pool = ProcessPoolExecutor(min(workers, len(items)), multiprocessing.get_context("spawn"), _begin,
                               (os.getpid(), prepare, given))  # fmt: skip
    try:
        yield from pool.map(task, items)
    except BrokenProcessPool as error:
        raise ValueError("a worker process was killed, perhaps for memory; give the same command with fewer `workers`"
                         ) from error  # fmt: skip
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(parent: int, prepare: Callable | None, given: tuple) -> None:
    die_with_parent(parent)
    # every result is sent by then; at the interpreter's end drawing contexts could no longer be freed, and say so
    util.Finalize(None, os._exit, args=(0,), exitpriority=0)
    if prepare is not None:
        prepare(*given)
