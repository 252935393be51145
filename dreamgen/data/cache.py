"""What frozen encoders say of the clips and texts of a dataset, computed once, in shards on disk.

A shard is written in one piece and read as a memory map, so a killed build goes on where it stopped, and several
processes build at once. The folder's name holds the hash of all that the content depends on: another dataset, encoder
or transform never meets an old cache.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from dreamgen.core.manifest import differences, digest, read_json, replacing, write_json

KEY = "key.json"
OPEN = 256  # files that a cache holds open; a process may have a thousand


def require_known(root: Path, keys: Sequence[dict[str, Any]]) -> None:
    """ValueError if the folder `root` holds caches, but none of the content that one of `keys` names."""
    found = {path.parent.name: read_json(path) for path in sorted(Path(root).glob(f"*/{KEY}"))}
    if not found or any(digest(key) in found for key in keys):
        return
    wanted = json.loads(json.dumps(keys[0]))  # tuples are lists in a file
    nearest = min((differences(old, wanted) for old in found.values()), key=len)
    raise ValueError(f"the cache in {root} is of other content ({nearest}). Name another folder as `cache`, or leave "
                     "it out to encode anew.")  # fmt: skip


class Cache:
    """`count` arrays of one shape under `root/<hash of key>`, in shards of `size`.

    key: plain JSON that names the content. Index like an array of items; `take` gathers a batch.
    """

    def __init__(self, root: Path, key: object, *, count: int, size: int = 64) -> None:
        self.root, self.key, self.count, self.size = Path(root) / digest(key), key, count, size
        self._shard = lru_cache(maxsize=OPEN)(self._open)

    def _path(self, shard: int) -> Path:
        return self.root / f"{shard:06d}.npy"

    def missing(self, part: int = 0, parts: int = 1) -> list[range]:
        """The items of each shard that is still to be computed, by process `part` of `parts`."""
        starts = range(part * self.size, self.count, parts * self.size)
        return [range(s, min(s + self.size, self.count)) for s in starts if not self._path(s // self.size).is_file()]

    def build(self, compute: Callable[[range], np.ndarray], part: int = 0, parts: int = 1) -> Iterator[int]:
        """Compute what is missing, shard by shard; yields how many items each one added.

        part: which of `parts` processes this is; each computes its own shards, and none waits for the others.
        """
        if not (self.root / KEY).is_file():
            write_json(self.root / KEY, self.key)
        for items in self.missing(part, parts):
            values = compute(items)
            if len(values) != len(items):
                raise ValueError(f"computed {len(values)} items for {len(items)} asked")
            with replacing(self._path(items.start // self.size)) as temporary, temporary.open("wb") as file:
                np.save(file, values)
            yield len(items)

    def __len__(self) -> int:
        return self.count

    def _open(self, shard: int) -> np.ndarray:
        values = np.load(self._path(shard), mmap_mode="r", allow_pickle=False)
        if len(values) != (expected := min(self.size, self.count - shard * self.size)):
            raise ValueError(f"{self._path(shard)} holds {len(values)} items, expected {expected}: it was written in "
                             "shards of another size. Delete the folder to encode anew.")  # fmt: skip
        return values

    def __getitem__(self, index: int) -> np.ndarray:
        shard, row = divmod(index, self.size)
        return self._shard(shard)[row]

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Items at `indices`, stacked (n ...)."""
        return np.stack([self[int(index)] for index in indices])


def trimmed(rows: Float[Tensor, "l d"]) -> Float[Tensor, "n d"]:
    """An embedding without the rows of zeros behind the end of its text."""
    return rows[: int(rows.abs().sum(-1).gt(0).cumsum(-1).argmax(-1)) + 1].clone()  # past the last that is not zero


class Embeddings:
    """Embeddings (l d) of `texts`, a file each under `root/<hash of key>`, which are read from there as they are taken.

    Those that are missing are made by `read`, which gives them one after another, and written at once: a few are in
    memory, however many there are. key: plain JSON that names the encoder and its settings. name: what the encoder
    makes of a text before it reads it; texts that are one by it share a file.
    """

    def __init__(self, root: Path, key: object, texts: Sequence[str], read: Callable[[Sequence[str]], Iterator[Tensor]],
                 name: Callable[[str], str] = str) -> None:  # fmt: skip
        self.files = [Path(root) / digest(key) / f"{digest(name(text))}.safetensors" for text in texts]
        missing = {file: text for file, text in zip(self.files, texts, strict=True) if not file.is_file()}
        for file, rows in zip(missing, read(list(missing.values())) if missing else (), strict=True):
            with replacing(file) as temporary:
                save_file({"rows": trimmed(rows), "length": torch.tensor(len(rows))}, temporary)
        self._row = lru_cache(maxsize=OPEN // 8)(self._read)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def length(self) -> int:
        """Tokens of each."""
        return len(self._row(0))

    def _read(self, index: int) -> Tensor:
        kept = load_file(self.files[index])
        return torch.nn.functional.pad(kept["rows"], (0, 0, 0, int(kept["length"]) - len(kept["rows"])))

    def take(self, indices: Sequence[int] | np.ndarray) -> Float[Tensor, "b l d"]:
        """Those of the texts at `indices`."""
        return torch.stack([self._row(int(index)) for index in indices])
