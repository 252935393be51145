"""What frozen encoders say of the clips and texts of a dataset, computed once, in shards on disk.

A shard is written in one piece and read as a memory map, so a killed build goes on where it stopped, and several
processes build at once. The folder's name holds the hash of all that the content depends on: another dataset, encoder
or transform never meets an old cache.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from dreamgen.core.manifest import differences, digest, read_json, replacing, write_json

KEY = "key.json"


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
        self._shards: dict[int, np.ndarray] = {}

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

    def __getitem__(self, index: int) -> np.ndarray:
        shard, row = divmod(index, self.size)
        if shard not in self._shards:
            self._shards[shard] = np.load(self._path(shard), mmap_mode="r", allow_pickle=False)
        return self._shards[shard][row]

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Items at `indices`, stacked (n ...)."""
        return np.stack([self[int(index)] for index in indices])


def embeddings(root: Path, key: object, texts: Sequence[str],
               embed: Callable[[Sequence[str]], torch.Tensor]) -> torch.Tensor:  # fmt: skip
    """Embeddings (n l d) of distinct `texts`, from the cache at `root` or made by `embed` and kept there.

    Rows of zeros behind a text's end are not stored. key: plain JSON that names the encoder and its settings.
    """
    path = Path(root) / digest({"key": key, "texts": list(texts)}) / "texts.safetensors"
    if path.is_file():
        kept = load_file(path)
        length = int(kept.pop("length"))
        return torch.stack([torch.nn.functional.pad(kept[str(i)], (0, 0, 0, length - len(kept[str(i)])))
                            for i in range(len(texts))])  # fmt: skip
    found = embed(texts).cpu()
    used = found.abs().sum(-1).gt(0).cumsum(-1).argmax(-1) + 1  # past the last row that is not zero
    rows = {str(i): row[:n].contiguous() for i, (row, n) in enumerate(zip(found, used.tolist(), strict=True))}
    with replacing(path) as temporary:
        save_file({**rows, "length": torch.tensor(found.shape[1])}, temporary)
    return found
