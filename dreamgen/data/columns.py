"""The columns of a LeRobot table: what they are, how they are stored, and when an episode's numbers are bad."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dreamgen.core.clip import Episode
from dreamgen.core.embodiment import Embodiment, Part

BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")
REMEDY = "mend the episode, or set skip_bad=true to leave it out"
OWN = ("label_spread", "state_known", "frame_fresh")  # what dreamgen's stages write a row
TRUTH = "object."  # and, before a thing's name, the truth of a simulator
DTYPES = {"float16": "float32", "int32": "int64", "int16": "int64", "int8": "int64", "uint8": "int64"}
TYPES = {"float32": pa.float32(), "float64": pa.float64(), "int64": pa.int64(), "bool": pa.bool_(),
         "string": pa.string()}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Column:
    """A feature of k numbers, or of one text; k = 1 is stored as a scalar."""

    dtype: str
    width: int
    names: list[str] | None = None

    @property
    def type(self) -> pa.DataType:
        return TYPES[self.dtype] if self.width == 1 else pa.list_(TYPES[self.dtype], self.width)

    def feature(self) -> dict:
        return {"dtype": self.dtype, "shape": [self.width], "names": self.names}

    def hugging_face(self) -> dict:
        value = {"dtype": self.dtype, "_type": "Value"}
        return value if self.width == 1 else {"feature": value, "length": self.width, "_type": "Sequence"}

    def array(self, values: np.ndarray) -> pa.Array:
        if self.dtype == "string":
            return pa.array([str(text) for text in values.reshape(-1)], pa.string())
        flat = pa.array(np.ascontiguousarray(values, dtype=self.dtype).reshape(-1), TYPES[self.dtype])
        return flat if self.width == 1 else pa.FixedSizeListArray.from_arrays(flat, self.width)


def stored_column(feature: dict) -> Column | None:
    """How a feature of `info.json` is written: k numbers or one text. None for pictures, several axes and all else."""
    dtype, shape = str(feature.get("dtype")), feature.get("shape", [1])
    dtype = DTYPES.get(dtype, dtype)
    if dtype not in TYPES or len(shape) != 1:
        return None
    return Column(dtype=dtype, width=int(shape[0]), names=feature.get("names"))


def bookkeeping() -> dict[str, Column]:
    """The columns that every table begins with."""
    return {name: Column(dtype="float32" if name == "timestamp" else "int64", width=1) for name in BOOKKEEPING}


def entry_names(names: object) -> list[str]:
    """The names of a feature's entries, however deep they lie: a list, {"motors": [...]} or {name: entry}."""
    if isinstance(names, dict):
        whole = all(isinstance(value, int) for value in names.values())
        return (
            sorted(names, key=names.get) if whole else [one for value in names.values() for one in entry_names(value)]
        )
    if isinstance(names, list):
        return [one for value in names for one in entry_names(value)]
    return [names] if isinstance(names, str) else []


def robot_columns(robot: Embodiment) -> dict[str, Column]:
    """The columns that every dataset of a robot has, in their order."""
    columns = bookkeeping()
    for key, parts in ((robot.state_key, robot.state), (robot.action_key, robot.action)):
        if parts:
            names = [p.name if p.width == 1 else f"{p.name}_{i}" for p in parts for i in range(p.width)]
            columns[key] = Column(dtype="float32", width=parts[-1].stop, names=names)
    return columns


def extra_columns(episode: Episode, robot: Embodiment) -> dict[str, Column]:
    """The columns of `Episode.extra`. ValueError if one is no (s k) of numbers or has the name of a standard one."""
    taken, rows, columns = {*robot_columns(robot), *(view.key for view in robot.views)}, len(episode.action), {}
    for name, values in episode.extra.items():
        if name in taken:
            raise ValueError(f"extra column '{name}' has the name of a standard one; choose another")
        if values.ndim != 2 or len(values) != rows or not values.shape[1]:
            raise ValueError(f"extra column '{name}' is {values.shape}; expected ({rows}, k)")
        kind = {"f": "float32", "i": "int64", "u": "int64", "b": "bool"}.get(values.dtype.kind)
        kind = "float64" if values.dtype == np.float64 else kind  # others' clocks, which float32 cannot tell
        if kind is None:
            raise ValueError(f"extra column '{name}' is {values.dtype}; expected numbers or booleans")
        columns[name] = Column(dtype=kind, width=values.shape[1])
    return columns


def check_episode(episode: Episode, robot: Embodiment) -> None:
    """Raise ValueError for an episode that must not be written or learned from; says what is wrong and where."""
    rows = len(episode.action)
    if rows == 0:
        raise ValueError("it has zero length")
    check_instruction(episode.instruction)
    check_numbers("state", episode.state, robot.state, rows)
    check_numbers("action", episode.action, robot.action, rows)
    for view in robot.views:
        if view.name not in episode.video:
            raise ValueError(f"view '{view.name}' is missing; it has {sorted(episode.video)}")
        frames, size = episode.video[view.name], (view.height, view.width, 3)
        if frames.ndim != 4 or frames.shape[1:] != size or frames.dtype != np.uint8:
            raise ValueError(f"view '{view.name}' is {frames.dtype} {frames.shape}; expected uint8 (rows, "
                             f"{view.height}, {view.width}, 3)")  # fmt: skip
        if len(frames) != rows:
            raise ValueError(f"it has {rows} rows and {len(frames)} frames of view '{view.name}'; they must agree")


def check_instruction(text: object) -> str:
    """`text` without space around it. ValueError unless it is text that is not empty."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"its instruction is {text!r}; expected text that is not empty")
    return text.strip()


def check_numbers(name: str, values: np.ndarray, parts: Sequence[Part], rows: int) -> None:
    """Raise ValueError unless `values` are (rows, width of the parts) and finite."""
    width = parts[-1].stop if parts else 0
    if values.shape != (rows, width):
        words = ", ".join(f"{part.name} {part.width}" for part in parts) or "no parts"
        raise ValueError(f"'{name}' is {values.shape}; expected ({rows}, {width}): {words}")
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, entry = (int(v) for v in bad[0])
        part = next(part.name for part in parts if part.start <= entry < part.stop)
        raise ValueError(f"'{name}' holds {values[row, entry]} at row {row}, entry {entry} (part '{part}')")


def is_even(table: pa.Table, key: str, width: int) -> bool:
    """Whether all rows of a column are `width` wide and hold a value in each entry; of floats, one that is missing is
    NaN."""
    column = pa.concat_arrays(table[key].chunks)
    if hasattr(column, "value_lengths"):
        if column.null_count or pc.unique(column.value_lengths()).to_pylist() != [width]:
            return False
        column = column.flatten()
    return column.null_count == 0 or pa.types.is_floating(column.type)


def read_column(table: pa.Table, key: str, feature: dict | None = None) -> np.ndarray:
    """A column as (s k), all that a row holds in one line however deep its lists lie. feature: what `info.json` tells
    of it; fractions come in its precision, which some tables of others lack.

    ValueError if it is missing or its rows differ in width.
    """
    if key not in table.column_names:
        raise ValueError(f"it has no column '{key}'")
    column = pa.concat_arrays(table[key].chunks)
    while hasattr(column, "value_lengths"):
        widths = set(column.value_lengths().to_pylist())
        if len(widths) != 1 or None in widths:
            raise ValueError(f"'{key}' has rows of different widths: {sorted(map(str, widths))}")
        column = column.flatten()
    values = column.to_numpy(zero_copy_only=False).reshape(table.num_rows, -1)
    told = stored_column(feature) if feature and values.dtype.kind == "f" else None
    return values.astype(told.dtype, copy=False) if told and told.dtype.startswith("float") else values
