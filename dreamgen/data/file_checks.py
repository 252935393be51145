"""The files of a dataset against its index: schema, counts, timestamps, frames against rows."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dreamgen.data.columns import BOOKKEEPING, read_column
from dreamgen.data.findings import Findings
from dreamgen.data.layout import Entry, Layout, cameras
from dreamgen.video.mp4 import require_whole

TOLERANCE = 1e-4  # seconds, as lerobot's
ANEW = "`jobs.export` writes it anew"
ARROW = {"float": "float32", "double": "float64", "halffloat": "float16"}


class Tables:
    """Checks the rows of every episode and keeps the numbers: column name to the arrays (s k) of good episodes."""

    def __init__(self, layout: Layout, found: Findings) -> None:
        self.layout, self.found, self.rows = layout, found, 0
        self.values: dict[str, list[np.ndarray]] = {}
        self.episodes: list[int] = []
        self._kept: tuple[Path, pa.Table] | None = None

    def check(self) -> None:
        """All episodes, in order."""
        numbers = [entry.index for entry in self.layout.entries]
        if numbers != list(range(len(numbers))):
            self.found.add("error", "counts", f"the episode list does not count from 0 to {len(numbers) - 1}", ANEW)
        for entry in self.layout.entries:
            table = self._table(entry)
            if table is not None:
                self._check(entry, table)

    def _table(self, entry: Entry) -> pa.Table | None:
        if self._kept is None or self._kept[0] != entry.data:
            try:
                self._kept = (entry.data, pq.read_table(entry.data))
            except (pa.ArrowException, OSError) as error:
                what = f"{entry.data.name} is missing" if not entry.data.is_file() else (
                    f"{entry.data.name} cannot be read ({str(error).splitlines()[0]})")  # fmt: skip
                self.found.add("error", "schema", what, "copy or record the episode again", entry.index)
                return None
        return self._kept[1] if entry.first is None else self._kept[1].slice(entry.first, entry.length)

    def _check(self, entry: Entry, table: pa.Table) -> None:
        index, rows = entry.index, table.num_rows
        if rows != entry.length:
            self.found.add("error", "counts", f"the episode list says {entry.length} rows, the table has {rows}", ANEW,
                           index)  # fmt: skip
        if rows == 0:
            self.found.add("error", "counts", "it has no rows", "leave the episode out", index)
            return
        good = self._schema(table, index)
        self._bookkeeping(entry, table)
        arrays = {name: read_column(table, name) for name in good}
        for name, values in arrays.items():
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                row, at = np.argwhere(~np.isfinite(values))[0].tolist()
                self.found.add("error", "numbers", f"'{name}' holds {values[row, at]} at row {row}, entry {at}",
                               "mend the episode, or leave it out with skip_bad=true", index)  # fmt: skip
                return
        for name, values in arrays.items():
            self.values.setdefault(name, []).append(values)
        self.episodes.append(index)
        self.rows += rows

    def _schema(self, table: pa.Table, index: int) -> list[str]:
        """Names of the columns of numbers that are as they should be."""
        features, good = self.layout.info["features"], []
        for name in table.column_names:
            if name not in features:
                self.found.add("warning", "schema", f"column '{name}' is no feature of info.json; lerobot will not "
                               f"open it", "list it under features, or drop it", index)  # fmt: skip
        for name, feature in features.items():
            if feature.get("dtype") in ("video", "image", "string", "language"):
                continue
            if name not in table.column_names:
                level = "warning" if name in BOOKKEEPING or name.startswith(("next.", "annotation.")) else "error"
                self.found.add(level, "schema", f"feature '{name}' has no column", ANEW, index)
                continue
            kind, shape = table[name].type, list(feature.get("shape") or [1])
            while hasattr(kind, "value_type"):
                kind = kind.value_type
            if ARROW.get(str(kind), str(kind)) != feature.get("dtype"):
                self.found.add("warning", "schema", f"'{name}' is stored as {kind}, info.json says "
                               f"{feature.get('dtype')}", ANEW, index)  # fmt: skip
            try:
                width = read_column(table, name).shape[1]
            except (ValueError, pa.ArrowException) as error:
                self.found.add("error", "schema", f"'{name}' cannot be read: {error}", "record it again", index)
                continue
            if width != int(np.prod(shape)):
                self.found.add("error", "schema", f"'{name}' is {width} wide, info.json says {shape}",
                               "correct the shape, or record it again", index)  # fmt: skip
                continue
            good.append(name)
        return good

    def _bookkeeping(self, entry: Entry, table: pa.Table) -> None:
        """Timestamps, counters and texts: what the reader counts itself is a warning."""
        index, count, fps = entry.index, np.arange(table.num_rows), float(self.layout.info["fps"])
        names, add = set(table.column_names), self.found.add
        if "timestamp" not in names:
            add("warning", "time", "there is no timestamp", ANEW, index)
        else:
            late = table["timestamp"].to_numpy().astype(np.float64) - count / fps
            if np.abs(late).max() > TOLERANCE:
                same = np.abs(late - late[0]).max() <= TOLERANCE
                what = (f"timestamps start at {late[0]:.4g} s" if same else
                        f"timestamps are off row / fps by up to {np.abs(late).max():.4g} s")  # fmt: skip
                add("warning", "time", f"{what}; the tolerance is {TOLERANCE} s", ANEW, index)
        for name, expected in (("frame_index", count), ("episode_index", np.full(len(count), index)),
                               ("index", self.rows + count)):  # fmt: skip
            if name not in names:
                add("warning", "schema", f"there is no {name}", ANEW, index)
            elif not np.array_equal(table[name].to_numpy(), expected):
                add("warning", "counts", f"{name} does not count as it should", ANEW, index)
        for name in [name for name in names if name == "task_index" or name.startswith("annotation.")]:
            if not pa.types.is_integer(table[name].type):
                continue
            for number in table[name].unique().to_pylist():
                text = self.layout.tasks.get(number)
                if number not in self.layout.tasks:
                    add("error", "tasks", f"'{name}' is {number}, which no task has", "add it to the tasks", index)
                elif not isinstance(text, str) or not text.strip():
                    add("error", "tasks", f"task {number} is {text!r}", "write the instruction", index)


def check_videos(layout: Layout, found: Findings) -> None:
    """Every listed video: there, whole, as long as its rows, of the size, rate and codec that info.json says."""
    seen: dict[Path, int | None] = {}
    for key in cameras(layout.info):
        listed = [entry for entry in layout.entries if key in entry.videos]
        if not any(entry.videos[key][0].is_file() for entry in listed):
            found.add("warning", "video", f"camera '{key}' is listed and no video of it is on disk",
                      f"take it out of info.json; {ANEW} without it")  # fmt: skip
            continue
        for entry in layout.entries:
            if key not in entry.videos:
                found.add("error", "video", f"it lists no video of '{key}'", "record it again", entry.index)
                continue
            path, first, frames = entry.videos[key]
            if path not in seen:
                seen[path] = _check_video(layout, found, key, path, entry.index)
            held = seen[path]
            if held is None:
                continue
            frames = held if frames is None else frames
            if first + frames > held:
                found.add("error", "video", f"{path.name} has {held} frames, the episode ends at {first + frames}",
                          "copy the video again, or leave the episode out", entry.index)  # fmt: skip
            elif frames != entry.length:
                found.add("error", "video", f"it has {entry.length} rows and {frames} frames of '{key}'",
                          "cut the longer one, or leave the episode out", entry.index)  # fmt: skip


def _check_video(layout: Layout, found: Findings, key: str, path: Path, episode: int) -> int | None:
    """Frames of one file; None if it cannot be opened."""
    import av

    feature, fps = layout.info["features"][key], Fraction(str(layout.info["fps"]))
    said = feature.get("info") or feature.get("video_info") or {}
    try:
        require_whole(path)
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            context, period = stream.codec_context, Fraction(stream.time_base or 1)
            times = sorted(packet.pts for packet in container.demux(stream) if packet.size and packet.pts is not None)
            size, codec = [context.height, context.width], context.codec.canonical_name
    except (ValueError, IndexError, av.FFmpegError) as error:
        found.add("error", "video", str(error), "copy it again, or leave the episode out", episode)
        return None
    shown = (np.array(times, dtype=np.float64) - (times[0] if times else 0)) * float(period)
    if len(shown) > 1 and np.abs(shown - np.arange(len(shown)) / float(fps)).max() > TOLERANCE + float(period):
        rate = (len(shown) - 1) / shown[-1]
        found.add("warning", "time", f"videos of '{key}' run at {rate:.4g} frames a second, the rows at {float(fps):g} "
                  f"Hz; frames are taken by number", ANEW, episode)  # fmt: skip
    shape = list(feature.get("shape", []))
    if shape and sorted(shape) != sorted([*size, 3]):
        found.add("warning", "video", f"pictures of '{key}' are {size[0]}x{size[1]}, info.json says {shape}", ANEW,
                  episode)  # fmt: skip
    if said.get("video.codec") not in (None, codec):
        found.add("note", "video", f"'{key}' is {codec}, info.json says {said['video.codec']}", ANEW, episode)
    return len(times)
