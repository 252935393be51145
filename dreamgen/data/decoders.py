"""The video files of a dataset, of which a few stay open."""

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from dreamgen.video.mp4 import open_mp4, read_frames
from dreamgen.video.opened import OpenVideo, is_even

OPEN_FILES = 16
Reader = Callable[[np.ndarray], np.ndarray]  # of an open file
_ALL: "weakref.WeakSet[Decoders]" = weakref.WeakSet()
_INHERITED: list[OrderedDict] = []  # decoders of a parent process, never used again


class Decoders:
    """Frames of video files by number, for any number of threads, of which each file serves one at a time. An even file
    is read by PyAV, a part at a time and by the thread that asks; any other by decord, which reads the file whole and
    counts its frames as they are stored. A decoder is neither shared with a forked process nor pickled."""

    def __init__(self) -> None:
        self._even: dict[Path, bool] = {}
        self._forget()
        _ALL.add(self)

    def read(self, path: Path, rows: np.ndarray) -> UInt8[np.ndarray, "t h w 3"]:
        """Frames `rows` of a file, in any order. ValueError names the file if it cannot be read or lacks a row."""
        with self._lock:
            turn, reader = self._open.setdefault(path, (threading.Lock(), []))
            self._open.move_to_end(path)
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)  # the one that was not used for longest
        with turn:
            if not reader:
                reader.append(self._opened(path))
            return reader[0](rows)

    def _opened(self, path: Path) -> Reader:
        if path not in self._even:
            self._even[path] = is_even(path)
        return OpenVideo(path).read if self._even[path] else partial(read_frames, open_mp4(path), path=path)

    def _forget(self) -> None:
        self._open: OrderedDict[Path, tuple[threading.Lock, list[Reader]]] = OrderedDict()
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple:
        return Decoders, ()


def _leave() -> None:
    """In a forked process: closing its parent's decoders would wait for threads that did not follow, or end it, also
    where they were garbage that nobody has collected yet."""
    for each in list(_ALL):
        _INHERITED.append(each._open)
        each._forget()


os.register_at_fork(after_in_child=_leave)
