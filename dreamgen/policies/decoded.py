"""Pictures of a dataset that is larger than memory: each run, from one key frame to the next, is decoded once.

One picture costs the decoding of all that lie between it and the key frame before it, and so does its neighbour. So a
run is decoded when the first of its pictures is asked for, and kept in a file that has no name and is gone with the
process: memory holds the pictures of one run, whatever the size of the dataset. A process and its forks share it.
"""

import errno
import logging
import mmap
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dreamgen.data.lerobot import Dataset
from dreamgen.video.opened import key_frames

ROWS = 128  # of a run that are decoded at a time
log = logging.getLogger(__name__)


class Decoded:
    """All views (v h w 3) at rows of episodes. rows: of each episode those that may be asked for, ascending.

    folder: where the file lies, as large as all these pictures; None for no file. Where it has no room, or the disk is
    full later on, pictures are decoded whenever they are asked for, and it is said.
    """

    def __init__(self, dataset: Dataset, rows: Mapping[int, np.ndarray], folder: Path | None) -> None:
        self.dataset, self.rows = dataset, rows
        self.names, view = [view.name for view in dataset.robot.views], dataset.robot.views[0]
        self.shape = (len(self.names), view.height, view.width, 3)
        ends = np.cumsum([len(found) for found in rows.values()])
        self._first = dict(zip(rows, (ends - [len(found) for found in rows.values()]).tolist(), strict=True))
        self._file: Any = None
        size = int(ends[-1]) * int(np.prod(self.shape))
        if folder is not None and dataset.robot.views[0].key in dataset.entry(next(iter(rows))).videos:
            self._open(folder, int(ends[-1]), size)

    def _open(self, folder: Path, count: int, size: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if size > free:
            log.info("pictures of %s are decoded whenever they are drawn: kept, they take %.3g GB in %s, and %.3g GB "
                     "are free", self.dataset.root, size / 1e9, folder, free / 1e9)  # fmt: skip
            return
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed with the process
        self._kept = mmap.mmap(-1, count)  # which pictures the file holds, known to forks too

    def __call__(self, episode: int, row: int) -> np.ndarray:
        """(v h w 3) at a row of an episode."""
        if self._file is None:
            return self._decode(episode, np.array([row]))[0]
        at = int(np.searchsorted(self.rows[episode], row))
        if not self._kept[self._first[episode] + at] and not self._keep(episode, at):
            return self._decode(episode, np.array([row]))[0]
        size = int(np.prod(self.shape))
        data = os.pread(self._file.fileno(), size, size * (self._first[episode] + at))
        return np.frombuffer(data, np.uint8).reshape(self.shape)

    def _keep(self, episode: int, at: int) -> bool:
        """Decode the run of the picture number `at` of an episode into the file; False if the disk is full."""
        rows, first, size = self.rows[episode], self._first[episode], int(np.prod(self.shape))
        path, begin, _ = self.dataset.entry(episode).videos[self.dataset.robot.views[0].key]
        keys = _keys(path) - begin
        k = int(np.searchsorted(keys, rows[at], side="right"))
        edges = np.searchsorted(rows, [keys[k - 1] if k else 0, keys[k] if k < len(keys) else rows[-1] + 1])
        for start in range(int(edges[0]), int(edges[1]), ROWS):
            stop = min(start + ROWS, int(edges[1]))
            pictures = self._decode(episode, rows[start:stop])
            try:
                written = os.pwrite(self._file.fileno(), pictures.tobytes(), size * (first + start))
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                written = 0
            if written < pictures.nbytes:
                log.warning("the disk is full; pictures of %s are decoded whenever they are drawn", self.dataset.root)
                self._file = None
                return False
            self._kept[first + start : first + stop] = b"\1" * (stop - start)
        return True

    def _decode(self, episode: int, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        views = self.dataset.views(episode, rows)
        return np.stack([views[name] for name in self.names], 1)


@cache
def _keys(path: Path) -> np.ndarray:
    return key_frames(path)
