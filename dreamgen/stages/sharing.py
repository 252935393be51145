"""How the items of a stage are shared out: over processes and machines that may come, go and be killed at any time.

Itemised stages (dream, label, curate) work alike. The items stand in groups, in one order; call `shard` of `num_shards`
works on every num_shards-th group, stores each item once it is whole, and skips what is stored. The call after which
nothing is left ends the stage; the others return {"complete": False}. So a launcher only has to see to it that every
shard is called until it returns, anywhere and as often as it takes, and the result does not depend on who did what.
"""

import contextlib
import errno
import fcntl
import logging
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from dreamgen.core.manifest import ALONE, replacing

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """Share `number` of `count`. Raises ValueError for a share that there is not."""

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.count:
            raise ValueError(f"shard is {self.number} of {self.count}; expected 0 <= shard < num_shards")

    def of(self, groups: Sequence[T]) -> Sequence[T]:
        """The groups of this share."""
        return groups[self.number :: self.count]

    def title(self, stage: str) -> str:
        """What its log is called."""
        return stage if self.count == 1 else f"{stage} {self.number} of {self.count}"


def grouped(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Groups of `size`, the last may be smaller."""
    return [items[i : i + size] for i in range(0, len(items), size)]


@contextlib.contextmanager
def alone(out: Path, shard: Shard) -> Iterator[bool]:
    """One process at a time, on any machine that locks files of `out`; the lock falls with its process. False for all
    but the first shard on a network file system that knows no locks: there it alone may end the stage."""
    with (Path(out) / ALONE).open("w") as file:
        mine = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
                raise
            if not (mine := shard.number == 0):
                log.warning("all is done but to join it, and %s knows no locks: call shard 0 once more", out)
        yield mine
        (Path(out) / ALONE).unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what killed calls left half-written, once nobody writes any more."""
    for path in Path(folder).glob(".*.partial*"):
        path.unlink(missing_ok=True)


class Parts:
    """Arrays by name of each group, one file a group: what a stage keeps until it joins them."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def _path(self, number: int) -> Path:
        return self.root / f"{number:06d}.npz"

    def stored(self) -> set[int]:
        """Numbers of the groups that are there."""
        return {int(path.stem) for path in self.root.glob("[0-9]*.npz")}

    def write(self, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Store a group, in one piece."""
        with replacing(self._path(number)) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)

    def read(self, number: int) -> dict[str, np.ndarray]:
        """The arrays of a group."""
        with np.load(self._path(number), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}

    def mapped(self, number: int) -> dict[str, np.ndarray]:
        """The arrays of a group, read from disk where they are looked at, as long as the file is there."""
        path, found = self._path(number), {}
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            for member in archive.infolist():  # stored as they are, each behind a header of the zip and one of numpy
                file.seek(member.header_offset + 26)
                file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
                assert np.lib.format.read_magic(file) == (1, 0), f"{path} was not written by Parts"
                shape, columns, kind = np.lib.format.read_array_header_1_0(file)
                found[member.filename.removesuffix(".npy")] = np.memmap(
                    path, kind, "r", file.tell(), shape, "F" if columns else "C"
                )
        return found
