"""Pictures of a dataset, decoded when they are first asked for, and kept: in memory, or in a file what is too large.

One picture costs the decoding of all that lie between it and the key frame before it, and so does its neighbour. So an
episode that goes to memory is decoded as a whole; of one that goes to the file, the run from one key frame to the next,
and memory holds the pictures of one run, whatever the size of the dataset. The file has no name and is gone with the
process. A process and its forks share what is kept.
"""

import errno
import logging
import mmap
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dreamgen.data.lerobot import Dataset
from dreamgen.video.opened import key_frames

ROWS = 128  # of a run that are decoded at a time
THREADS = 8  # that decode at a time
log = logging.getLogger(__name__)


class Decoded:
    """All views (v h w 3) at rows of episodes. rows: of each episode those that may be asked for, ascending.

    memory_gb: of these pictures that may be in memory; held_gb: that they take there. folder: where the file of what is
    more lies, as large as all these pictures; None for no file. reserve_gb: of what is free there that belongs to
    others; kept_gb: that the file may take. Where there is no room, or the disk is full later on, pictures are decoded
    whenever they are asked for, and it is said.
    """

    def __init__(self, dataset: Dataset, rows: Mapping[int, np.ndarray], *, memory_gb: float, folder: Path | None,
                 reserve_gb: float = 0.0) -> None:  # fmt: skip
        self.dataset, self.rows = dataset, rows
        self.names, view = [view.name for view in dataset.robot.views], dataset.robot.views[0]
        self.shape = (len(self.names), view.height, view.width, 3)
        ends = np.cumsum([len(found) for found in rows.values()])
        self._first = dict(zip(rows, (ends - [len(found) for found in rows.values()]).tolist(), strict=True))
        count, self._size = int(ends[-1]), int(np.prod(self.shape))
        self._kept = mmap.mmap(-1, count)  # which pictures are kept, known to forks too
        self._memory: np.ndarray | None = None
        self._file: Any = None
        self.held_gb = self.kept_gb = 0.0
        if count * self._size <= memory_gb * 1e9:
            self._memory = np.frombuffer(mmap.mmap(-1, count * self._size), np.uint8).reshape(count, *self.shape)
            self.held_gb = count * self._size / 1e9
        elif folder is not None and dataset.video(next(iter(rows))) is not None:
            self._open(folder, count * self._size / 1e9, reserve_gb)

    def _open(self, folder: Path, size_gb: float, reserve_gb: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free / 1e9
        if size_gb > free - reserve_gb:
            log.info("pictures of %s are decoded whenever they are drawn: kept, they take %.3g GB in %s, and of %.3g "
                     "GB that are free other pictures and the states of the training take %.3g", self.dataset.root,
                     size_gb, folder, free, reserve_gb)  # fmt: skip
            return
        self.kept_gb = size_gb  # the file takes it as it fills: what is free does not tell
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed with the process

    def __call__(self, episode: int, row: int) -> np.ndarray:
        """(v h w 3) at a row of an episode."""
        file = self._file  # which another thread may let go of
        if self._memory is None and file is None:
            return self._decode(episode, np.array([row]))[0]
        at = int(np.searchsorted(self.rows[episode], row))
        number = self._first[episode] + at
        if not self._kept[number] and not self._keep(episode, at):
            return self._decode(episode, np.array([row]))[0]
        if self._memory is not None:
            return self._memory[number]
        data = os.pread(file.fileno(), self._size, self._size * number)
        return np.frombuffer(data, np.uint8).reshape(self.shape)

    def at(self, places: Sequence[tuple[int, int]]) -> np.ndarray:
        """(n v h w 3) at episodes and rows; what is not kept is decoded by several threads, an episode by one."""
        groups: dict[int, list[int]] = {}  # of an episode the rows
        for episode, row in dict.fromkeys(places):
            groups.setdefault(episode, []).append(row)

        def look(episode: int) -> list[np.ndarray]:
            return [self(episode, row) for row in groups[episode]]

        if all(self._keeps(*place) for place in places):
            seen = list(map(look, groups))
        else:
            with ThreadPoolExecutor(THREADS) as pool:
                seen = list(pool.map(look, groups))
        found = {(i, row): picture for i, some in zip(groups, seen, strict=True)
                 for row, picture in zip(groups[i], some, strict=True)}  # fmt: skip
        return np.stack([found[place] for place in places])

    def _keeps(self, episode: int, row: int) -> bool:
        """Whether a picture is there without decoding."""
        there = self._memory is not None or self._file is not None
        return there and bool(self._kept[self._first[episode] + int(np.searchsorted(self.rows[episode], row))])

    def _keep(self, episode: int, at: int) -> bool:
        """Decode the picture number `at` of an episode, with those that come along; False if the disk is full."""
        rows, first = self.rows[episode], self._first[episode]
        for start, stop in self._run(episode, at):
            pictures = self._decode(episode, rows[start:stop])
            if not self._write(first + start, pictures):
                return False
            self._kept[first + start : first + stop] = b"\1" * (stop - start)
        return True

    def _run(self, episode: int, at: int) -> list[tuple[int, int]]:
        """From which to which of the pictures of an episode are decoded at a time for the sake of number `at`."""
        rows = self.rows[episode]
        if self._memory is not None:
            return [(0, len(rows))]
        path, frames = self.dataset.video(episode)
        frames, keys = frames[rows], _keys(path)
        k = int(np.searchsorted(keys, frames[at], side="right"))
        edges = np.searchsorted(frames, [keys[k - 1] if k else 0, keys[k] if k < len(keys) else frames[-1] + 1])
        return [(start, min(start + ROWS, int(edges[1]))) for start in range(*edges.tolist(), ROWS)]

    def _write(self, number: int, pictures: np.ndarray) -> bool:
        """Keep pictures from `number` on; False where the disk is full."""
        if self._memory is not None:
            self._memory[number : number + len(pictures)] = pictures
            return True
        if (file := self._file) is None:
            return False
        try:
            written = os.pwrite(file.fileno(), pictures.tobytes(), self._size * number)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            written = 0
        if written < pictures.nbytes:
            log.warning("the disk is full; pictures of %s are decoded whenever they are drawn", self.dataset.root)
            self._file = None
        return written == pictures.nbytes

    def _decode(self, episode: int, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        views = self.dataset.views(episode, rows)
        return np.stack([views[name] for name in self.names], 1)


@cache
def _keys(path: Path) -> np.ndarray:
    return key_frames(path)
