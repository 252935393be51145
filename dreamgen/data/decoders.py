"""The video files of a dataset: a few stay open, and of the others only what is asked for is read."""

import os
import threading
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from dreamgen.video.mp4 import is_even, open_mp4, read_frames, read_once

if TYPE_CHECKING:
    import decord

OPEN_FILES = 16
_ALL: "weakref.WeakSet[Decoders]" = weakref.WeakSet()
_INHERITED: list[OrderedDict] = []  # decoders of a parent process, never used again


class Decoders:
    """Frames of video files by number, for any number of threads. A decoder reads its file whole when it is opened, so
    the first files keep theirs; it is neither shared with a forked process nor pickled."""

    def __init__(self) -> None:
        self._even: dict[Path, bool] = {}
        self._forget()
        _ALL.add(self)

    def read(self, path: Path, rows: np.ndarray) -> UInt8[np.ndarray, "t h w 3"]:
        """Frames `rows` of a file, in any order. ValueError names the file if it cannot be read or lacks a row."""
        with self._lock:
            if path not in self._open and len(self._open) == OPEN_FILES and self._may_stay_closed(path):
                return read_once(path, rows)
            return read_frames(self._reader(path), rows, path)

    def _may_stay_closed(self, path: Path) -> bool:
        if path not in self._even:
            self._even[path] = is_even(path)
        return self._even[path]

    def _reader(self, path: Path) -> "decord.VideoReader":
        """An open decoder; the one that was not used for longest makes room."""
        if path in self._open:
            self._open.move_to_end(path)
        else:
            self._open[path] = open_mp4(path)
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)
        return self._open[path]

    def _forget(self) -> None:
        self._open: OrderedDict[Path, decord.VideoReader] = OrderedDict()
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
