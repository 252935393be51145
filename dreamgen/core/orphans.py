"""Processes that end with the one that started them."""

import ctypes
import os
import signal
import sys

PARENT_DEATH = 1  # PR_SET_PDEATHSIG of Linux's prctl


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel to end this process when its parent ends, however that happens; nothing where it cannot be asked.

    parent: its process id; if it is another one by now, the parent has ended already.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PARENT_DEATH, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)
