"""The tables of a dataset: of each episode the columns that are asked for, and the pictures that lie among them."""

import io
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import UInt8

from dreamgen.data.layout import Entry

FOOTERS = 16  # of files that are kept: one of very many row groups takes long to read
EIGHT_BIT = ("1", "L", "LA", "P", "RGB", "RGBA")  # as PIL calls what becomes RGB without loss


class Rows:
    """Rows of episodes from their files. What was read last is kept, so that episodes of one file read it once."""

    def __init__(self) -> None:
        self._schema: tuple[Path, list[str]] | None = None
        self.forget()

    def forget(self) -> None:
        """Let go of what was read last."""
        self._kept: tuple[Path, list[str], pa.Table] | None = None

    def columns(self, path: Path) -> list[str]:
        """The names of a table's columns. ValueError if the file is missing or broken."""
        kept = self._schema
        if kept is None or kept[0] != path:
            kept = self._schema = (path, _read(pq.read_schema, path).names)
        return kept[1]

    def read(self, entry: Entry, wanted: Callable[[str], bool]) -> pa.Table:
        """The wanted columns of an episode. ValueError if its file is missing or broken."""
        names, kept = [name for name in self.columns(entry.data) if wanted(name)], self._kept
        if kept is None or kept[:2] != (entry.data, names):
            kept = self._kept = (entry.data, names, whole(_read(pq.read_table, entry.data, columns=names)))
        return kept[2] if entry.first is None else kept[2].slice(entry.first, entry.length)

    def __reduce__(self) -> tuple:
        return Rows, ()


def whole(table: pa.Table) -> pa.Table:
    """The table in one piece: a slice of one that was read from many row groups would pass through all of them."""
    return table.combine_chunks()


def read_pictures(root: Path, entry: Entry, key: str, rows: Sequence[int] | np.ndarray) -> UInt8[np.ndarray, "t h w 3"]:
    """Pictures of a camera whose feature is `image`, at `rows` of an episode: files in the table, or named by it and
    lying below `root`. Only the row groups that hold them are read.

    Raises ValueError: no such column, no picture in a row, one that cannot be decoded or is not of 8 bits (depth).
    """
    rows = np.asarray(rows, dtype=np.int64)
    if not rows.size:
        return read_pictures(root, entry, key, [0])[:0]
    at = rows + (entry.first or 0)
    footer, names, edges = _footer(entry.data, *_written(entry.data))
    if key not in names:
        raise ValueError(f"{entry.data.name} has no column '{key}', whose pictures are asked for")
    if at.max() >= edges[-1]:
        raise ValueError(f"{entry.data.name} has {edges[-1]} rows; the picture of row {at.max()} is asked for")
    group = np.searchsorted(edges, at, side="right") - 1
    taken, among = np.unique(group, return_inverse=True)
    with _read(pq.ParquetFile, entry.data, metadata=footer) as file:
        cells = file.read_row_groups(taken.tolist(), columns=[key])[key]
    before = np.diff(edges)[taken].cumsum() - np.diff(edges)[taken]  # rows of the groups that are read before each
    cells = cells.take(pa.array(before[among] + at - edges[group])).to_pylist()
    found = []
    for row, cell in zip(rows.tolist(), cells, strict=True):
        try:
            found.append(_decoded(cell, root))
        except (ValueError, OSError) as error:
            raise ValueError(f"the picture of '{key}' at row {row} cannot be used: {error}") from error
    if len(shapes := {picture.shape[:2] for picture in found}) > 1:
        raise ValueError(f"pictures of '{key}' have the sizes {sorted(shapes)}; expected one")
    return np.stack(found)


def _written(path: Path) -> tuple[int, int]:
    """Size and time of writing of a file, 0 where it is missing."""
    stat = path.stat() if path.is_file() else None
    return (stat.st_size, stat.st_mtime_ns) if stat else (0, 0)


@lru_cache(maxsize=FOOTERS)
def _footer(path: Path, size: int, written: int) -> tuple[pq.FileMetaData, list[str], np.ndarray]:
    """A table's footer, the names of its columns, and the row at which each row group begins (the last: rows)."""
    footer = _read(pq.read_metadata, path)
    sizes = [footer.row_group(k).num_rows for k in range(footer.num_row_groups)]
    return footer, footer.schema.to_arrow_schema().names, np.cumsum([0, *sizes])


def _decoded(cell: Any, root: Path) -> np.ndarray:
    """The picture (h w 3) of a cell {bytes, path}."""
    from PIL import Image

    if not isinstance(cell, dict) or (cell.get("bytes") is None and not cell.get("path")):
        raise ValueError(f"its row holds {type(cell).__name__ if not isinstance(cell, dict) else cell}; expected the "
                         "bytes of a png or jpg file, or its path")  # fmt: skip
    data = cell["bytes"] if cell.get("bytes") is not None else (root / cell["path"]).read_bytes()
    picture = Image.open(io.BytesIO(data))
    if picture.mode not in EIGHT_BIT:
        raise ValueError(f"it is of mode {picture.mode}; expected 8 bits a channel, a depth camera is no view")
    return np.array(picture.convert("RGB"))


def _read(read: Callable, path: Path, **options: Any) -> Any:
    """What pyarrow reads of a file. ValueError names the file if it is missing or broken."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        return read(path, **options)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read ({str(error).splitlines()[0]})") from error
