"""What a frozen encoder says of each window of a dataset, computed once, in shards on disk.

A shard is written in one piece and read as a memory map, so a killed build goes on where it stopped. The folder's name
holds the hash of all that the content depends on: another dataset, encoder or transform never meets an old cache.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dreamgen.core.manifest import digest, replacing


class Cache:
    """`count` arrays of one shape under `root/<hash of key>`, in shards of `size`.

    key: plain JSON that names the content. Index like an array of items; `take` gathers a batch.
    """

    def __init__(self, root: Path, key: object, *, count: int, size: int = 64) -> None:
        self.root, self.count, self.size = Path(root) / digest(key), count, size
        self._shards: dict[int, np.ndarray] = {}

    def _path(self, shard: int) -> Path:
        return self.root / f"{shard:06d}.npy"

    def missing(self) -> list[range]:
        """The items of each shard that is still to be computed."""
        starts = range(0, self.count, self.size)
        return [range(s, min(s + self.size, self.count)) for s in starts if not self._path(s // self.size).is_file()]

    def build(self, compute: Callable[[range], np.ndarray]) -> Iterator[int]:
        """Compute what is missing, shard by shard; yields how many items each one added."""
        for items in self.missing():
            values = compute(items)
            if len(values) != len(items):
                raise ValueError(f"computed {len(values)} items for {len(items)} asked")
            with replacing(self._path(items.start // self.size)) as temporary, temporary.open("wb") as file:
                np.save(file, values)
            yield len(items)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        shard, row = divmod(index, self.size)
        if shard not in self._shards:
            self._shards[shard] = np.load(self._path(shard), mmap_mode="r", allow_pickle=False)
        return self._shards[shard][row]

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Items at `indices`, stacked (n ...)."""
        return np.stack([self[int(index)] for index in indices])
