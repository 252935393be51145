"""The files of a dataset against its index: schema, counts, timestamps, frames against rows."""

from collections.abc import Container, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dreamgen.core.embodiment import Embodiment
from dreamgen.data.columns import OWN, TRUTH, read_column
from dreamgen.data.findings import Findings
from dreamgen.data.instructions import find_instruction
from dreamgen.data.layout import Entry, Layout, cameras, check_owner
from dreamgen.data.rows import whole
from dreamgen.video.whole import require_whole

TOLERANCE = 1e-4  # seconds, as lerobot's
ANEW = "`dreamgen export` writes it anew"
UNUSED = "no step reads it; mend it, or drop it"
ARROW = {"float": "float32", "double": "float64", "halffloat": "float16"}


class Tables:
    """Checks the rows of every episode, or of `episodes`, and hands on the numbers of good ones. actions: False for
    video alone, whose actions no step reads.

    rows: of the episodes that were looked at (`entries`), as listed where a table cannot be read. seen: column to its
    good rows, and how they are stored.
    """

    def __init__(self, layout: Layout, robot: Embodiment, found: Findings, episodes: Container[int] | None = None,
                 *, actions: bool = True):  # fmt: skip
        self.layout, self.found, self.rows = layout, found, 0
        self.entries = [entry for entry in layout.entries if episodes is None or entry.index in episodes]
        self._taken = {entry.index for entry in self.entries}
        pairs = ((robot.state_key, robot.state), (robot.action_key, robot.action if actions else ()))
        self._used = {key for key, parts in pairs if parts} | {view.key for view in robot.views} | set(OWN)
        self._kept: tuple[Path, pa.Table] | None = None
        self.seen: dict[str, tuple[int, set[str]]] = {}

    def good(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Check all episodes, in order: the index and the columns of numbers (s k) of each that can be learned from."""
        numbers = [entry.index for entry in self.layout.entries]
        if not numbers:
            self.found.add("error", "counts", "the episode list names no episode", "copy or export the dataset again")
        if numbers != list(range(len(numbers))):
            self.found.add("error", "counts", f"the episode list does not count from 0 to {len(numbers) - 1}", ANEW)
        before = 0
        for entry in self.layout.entries:
            rows = entry.length
            if entry.index in self._taken:
                table = self._table(entry)
                rows = rows if table is None else table.num_rows
                columns = None if table is None else self._check(entry, table, before)
                self.rows += rows
                if columns is not None:
                    yield entry.index, columns
            before += rows

    def whole(self) -> dict[str, int]:
        """The columns of which every row of the dataset's files was looked at and is good, with their widths."""
        if len(self.entries) < len(self.layout.entries):
            return {}
        try:
            files = dict.fromkeys(entry.data for entry in self.layout.entries)
            stored = sum(pq.read_metadata(path).num_rows for path in files)
        except (pa.ArrowException, OSError):
            return {}
        features = self.layout.info["features"]
        return {name: int(np.prod(features[name].get("shape") or [1])) for name, (rows, kinds) in self.seen.items()
                if rows == stored and len(kinds) == 1}  # fmt: skip

    def level(self, name: str) -> str:
        """A feature that no step reads is no reason to stop."""
        return "error" if name in self._used or name.startswith(TRUTH) else "warning"

    def _table(self, entry: Entry) -> pa.Table | None:
        if self._kept is None or self._kept[0] != entry.data:
            try:
                self._kept = (entry.data, whole(pq.read_table(entry.data)))
            except (pa.ArrowException, OSError) as error:
                what = f"{entry.data.name} is missing" if not entry.data.is_file() else (
                    f"{entry.data.name} cannot be read ({str(error).splitlines()[0]})")  # fmt: skip
                self.found.add("error", "schema", what, "copy or record the episode again", entry.index)
                return None
        return self._kept[1] if entry.first is None else self._kept[1].slice(entry.first, entry.length)

    def _check(self, entry: Entry, table: pa.Table, before: int) -> dict[str, np.ndarray] | None:
        """The columns of numbers (s k) of one episode; None if it is bad. before: rows of the episodes before it."""
        index, rows = entry.index, table.num_rows
        if rows != entry.length:
            self.found.add("error", "counts", f"the episode list says {entry.length} rows, the table has {rows}", ANEW,
                           index)  # fmt: skip
        if rows == 0:
            self.found.add("error", "counts", "it has no rows", "leave the episode out", index)
            return None
        try:
            check_owner(entry, table)
        except ValueError:
            self.found.add("error", "counts", f"its rows of {entry.data.name} are those of another episode", "the "
                           "episode list and the file disagree; copy both again", index)  # fmt: skip
            return None
        good = self._schema(table, index)
        self._bookkeeping(index, table, before)
        self._tasks(entry, table)
        columns = {name: values for name in good if self._numbers(name, values := read_column(table, name), index)}
        for name in columns:
            seen, kinds = self.seen.get(name, (0, set()))
            self.seen[name] = seen + rows, kinds | {str(table[name].type)}
        return None if any(name in good and name not in columns for name in self._used) else columns

    def _numbers(self, name: str, values: np.ndarray, index: int) -> bool:
        """Whether a column holds finite numbers; if not, say so."""
        level = self.level(name)
        mend = "mend the episode, or leave it out with skip_bad=true" if level == "error" else UNUSED
        if values.dtype.kind not in "fiub":
            self.found.add(level, "numbers", f"'{name}' holds what is no number", mend, index)
            return False
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            row, at = np.argwhere(~np.isfinite(values))[0].tolist()
            self.found.add(level, "numbers", f"'{name}' holds {values[row, at]} at row {row}, entry {at}", mend, index)
            return False
        return True

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
            level = self.level(name)
            if name not in table.column_names:
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
                mend = "record it again" if level == "error" else UNUSED
                self.found.add(level, "schema", f"'{name}' cannot be read: {error}", mend, index)
                continue
            if width != int(np.prod(shape)):
                self.found.add(level, "schema", f"'{name}' is {width} wide, info.json says {shape}",
                               "correct the shape, or record it again", index)  # fmt: skip
                continue
            good.append(name)
        return good

    def _bookkeeping(self, index: int, table: pa.Table, before: int) -> None:
        """Timestamps and counters: what the reader counts itself is a warning."""
        count, fps = np.arange(table.num_rows), float(self.layout.info["fps"])
        expected = {"timestamp": count / fps, "frame_index": count, "episode_index": np.full(len(count), index),
                    "index": before + count}  # fmt: skip
        for name, right in expected.items():
            if name not in table.column_names:
                self.found.add("warning", "time" if name == "timestamp" else "schema", f"there is no {name}", ANEW,
                               index)  # fmt: skip
                continue
            kind = table[name].type
            if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
                self.found.add("error", "schema", f"'{name}' is stored as {kind}, expected a number a row", ANEW, index)
                continue
            late = table[name].to_numpy().astype(np.float64) - right
            if name == "timestamp" and not np.abs(late).max() <= TOLERANCE:
                same = np.abs(late - late[0]).max() <= TOLERANCE
                what = (f"timestamps start at {late[0]:.4g} s" if same else
                        f"timestamps are off row / fps by up to {np.abs(late).max():.4g} s")  # fmt: skip
                self.found.add("warning", "time", f"{what}; the tolerance is {TOLERANCE} s", ANEW, index)
            elif name != "timestamp" and late.any():
                self.found.add("warning", "counts", f"{name} does not count as it should", ANEW, index)

    def _tasks(self, entry: Entry, table: pa.Table) -> None:
        """The instruction, and every text that a row names."""
        index, tasks, add, empty = entry.index, self.layout.tasks, self.found.add, "warning"
        try:
            find_instruction(entry, table, tasks, lambda text: add("note", "tasks", text, "see that the instruction is "
                                                                   "the right one", index))  # fmt: skip
        except ValueError as error:
            add("error", "tasks", str(error), "write the instruction into the tasks", index)
            empty = "error"
        for name in table.column_names:
            if not (name == "task_index" or name.startswith("annotation.")) or not pa.types.is_integer(
                table[name].type
            ):
                continue
            for number in table[name].unique().to_pylist():
                text = tasks.get(number)
                if number not in tasks:  # lerobot looks up task_index alone
                    level = "error" if name == "task_index" else "warning"
                    add(level, "tasks", f"'{name}' is {number}, which no task has", "add it to the tasks", index)
                elif not isinstance(text, str) or not text.strip():
                    add(empty, "tasks", f"task {number} is {text!r}", "write the instruction", index)


def check_videos(layout: Layout, robot: Embodiment, found: Findings) -> None:
    """Every listed video: there, whole, as long as its rows, of the size, rate and codec that info.json says, and each
    frame of one episode alone. What is wrong with a camera that is no view of `robot` is a warning."""
    seen: dict[Path, int | str] = {}
    views = {view.key for view in robot.views}
    for key in cameras(layout.info):
        listed = [entry for entry in layout.entries if key in entry.videos]
        if not any(entry.videos[key][0].is_file() for entry in listed):
            if key in views:
                found.add("error", "video", f"camera '{key}', by which '{robot.name}' sees, has no video on disk",
                          "copy the videos, or choose an embodiment without this view")  # fmt: skip
            else:
                found.add("warning", "video", f"camera '{key}' is listed and no video of it is on disk",
                          f"take it out of info.json; {ANEW} without it")  # fmt: skip
            continue
        level = "error" if key in views else "warning"
        spans: dict[Path, list[tuple[int, int, int]]] = {}
        for entry in layout.entries:
            if key not in entry.videos:
                found.add(level, "video", f"it lists no video of '{key}'", "record it again", entry.index)
                continue
            path, first, frames = entry.videos[key]
            if frames is not None:
                spans.setdefault(path, []).append((first, first + frames, entry.index))
            if path not in seen:
                seen[path] = _check_video(layout, found, key, path, entry.index)
            held = seen[path]
            if isinstance(held, str):
                found.add(level, "video", held, "copy it again, or leave the episode out", entry.index)
                continue
            frames = held if frames is None else frames
            if first + frames > held:
                found.add(level, "video", f"{path.name} has {held} frames, the episode ends at {first + frames}",
                          "copy the video again, or leave the episode out", entry.index)  # fmt: skip
            elif frames != entry.length:
                found.add(level, "video", f"it has {entry.length} rows and {frames} frames of '{key}'",
                          "cut the longer one, or leave the episode out", entry.index)  # fmt: skip
        for shared in sorted(index for span in spans.values() for index in _overlapping(span)):
            found.add(level, "video", f"its frames of '{key}' are also those of another episode", "the episode list "
                      "is wrong; copy or export the dataset again", shared)  # fmt: skip


def _overlapping(spans: list[tuple[int, int, int]]) -> set[int]:
    """The episodes of all (first, one past the last, episode) that share a frame with another one."""
    found, end, last = set(), 0, -1
    for first, stop, index in sorted(spans):
        if first < min(end, stop):
            found |= {last, index}
        if stop > end:
            end, last = stop, index
    return found


def _check_video(layout: Layout, found: Findings, key: str, path: Path, episode: int) -> int | str:
    """Frames of one file, or what is wrong with it if it cannot be used."""
    import av

    feature, fps = layout.info["features"][key], Fraction(str(layout.info["fps"]))
    said = feature.get("info") or feature.get("video_info") or {}
    try:
        require_whole(path)
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            context, period = stream.codec_context, Fraction(stream.time_base or 1)
            times = sorted(packet.pts for packet in container.demux(stream) if packet.size and packet.pts is not None)
            size, codec, told = [context.height, context.width], context.codec.canonical_name, stream.frames
    except IndexError:
        return f"{path} holds no video"
    except (ValueError, av.FFmpegError) as error:
        return str(error)
    if told != len(times):
        return f"{path} tells of {told} frames and holds {len(times)}"
    shown = (np.array(times, dtype=np.float64) - (times[0] if times else 0)) * float(period)
    if len(shown) > 1 and np.abs(shown - np.arange(len(shown)) / float(fps)).max() > TOLERANCE + float(period):
        rate = (len(shown) - 1) / shown[-1]
        found.add("warning", "time", f"videos of '{key}' run at {rate:.4g} frames a second, the rows at {float(fps):g} "
                  f"Hz; frames are taken by number", ANEW, episode)  # fmt: skip
    shape = list(feature.get("shape", []))
    if shape and sorted(shape) not in (sorted([*size, 3]), sorted([*size, 1])):  # a depth map has one channel
        found.add("warning", "video", f"pictures of '{key}' are {size[0]}x{size[1]}, info.json says {shape}", ANEW,
                  episode)  # fmt: skip
    if said.get("video.codec") not in (None, codec):
        found.add("note", "video", f"'{key}' is {codec}, info.json says {said['video.codec']}", ANEW, episode)
    return len(times)
