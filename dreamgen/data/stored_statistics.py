"""The statistics of each episode as a dataset stores them, looked up one after another.

They take tens of kB an episode: a block of them is in memory, and looked up in their own order they are read once.
"""

from collections.abc import Container, Iterator
from itertools import islice

import pyarrow.parquet as pq

from dreamgen.data.layout import Layout, each_line, episode_tables

BLOCK = 200  # episodes that are held
V21 = "meta/episodes_stats.jsonl"


class StoredStatistics:
    """Statistics {feature: {kind: value}} by episode index. features: of these alone; None for all.

    Raises ValueError for a list of v2.1 that is missing or broken.
    """

    def __init__(self, layout: Layout, features: Container[str] | None = None) -> None:
        self.layout, self.features = layout, features
        self._indices = {index for block in self._blocks(known=True) for index in block}
        self._rewind()

    def get(self, index: int) -> dict[str, dict]:
        """Those of an episode; empty where there are none."""
        if index not in self._indices:
            return {}
        if index not in self._block and not self._forward(index):
            self._rewind()
            self._forward(index)
        return self._block[index]

    def _rewind(self) -> None:
        self._rest, self._block = self._blocks(), dict[int, dict]()

    def _forward(self, index: int) -> bool:
        """Read on until a block holds an episode; False where none of those left does."""
        for block in self._rest:
            self._block = block
            if index in block:
                return True
        return False

    def _blocks(self, *, known: bool = False) -> Iterator[dict[int, dict]]:
        """All that is stored, or with `known` only of which episodes."""
        return self._of_tables(known) if self.layout.version >= "v3." else self._of_lines()

    def _of_lines(self) -> Iterator[dict[int, dict]]:
        rows = each_line(self.layout.root / V21, "episode_index", "stats")
        while block := {int(row["episode_index"]): self._taken(row["stats"]) for row in islice(rows, BLOCK)}:
            yield block

    def _of_tables(self, known: bool) -> Iterator[dict[int, dict]]:
        for path in episode_tables(self.layout.root):
            with pq.ParquetFile(path) as file:
                parts = [(name, *name.removeprefix("stats/").rpartition("/")[::2]) for name in file.schema_arrow.names
                         if name.startswith("stats/") and not known]  # fmt: skip
                parts = [part for part in parts if self.features is None or part[1] in self.features]
                names = ["episode_index", *(name for name, _, _ in parts)]
                for batch in file.iter_batches(batch_size=BLOCK, columns=names):
                    block: dict[int, dict] = {}
                    for row in batch.to_pylist():
                        own = block.setdefault(int(row["episode_index"]), {})
                        for name, feature, kind in parts:
                            if row[name] is not None:
                                own.setdefault(feature, {})[kind] = row[name]
                    yield block

    def _taken(self, stats: dict) -> dict:
        return {name: found for name, found in stats.items() if self.features is None or name in self.features}
