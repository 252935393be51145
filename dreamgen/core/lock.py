"""One process at a time in a folder: two runs of one stage would remove each other's states and mix their logs."""

import errno
import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".running"


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold `folder` in the block, or as long as this process lives, however it ends; its children do not hold it.
    ValueError where another process does. Some network file systems know no locks: there nothing is held."""
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise ValueError(f"{folder} is being written by another run ({file.read() or 'just begun'}); wait for "
                                 "it or stop it, or choose another `out`") from None  # fmt: skip
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield
