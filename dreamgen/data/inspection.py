"""Everything that is checked of a dataset, in order: index, fit to a robot, tables, videos, statistics, units.

The numbers of one episode are in memory at a time, and those of a column's chunk while its statistics are computed.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np

from dreamgen.core.embodiment import Embodiment
from dreamgen.core.manifest import read_json
from dreamgen.data import statistics
from dreamgen.data.file_checks import Tables, check_videos
from dreamgen.data.findings import LEVELS, Finding, Findings
from dreamgen.data.fit import misfits
from dreamgen.data.layout import CONTRACT, PROVENANCE, Entry, Layout, cameras, is_depth, read_jsonl, read_layout
from dreamgen.data.layout import pictures as stored_pictures
from dreamgen.data.lerobot import Dataset
from dreamgen.data.number_checks import check_statistics
from dreamgen.data.rows import read_pictures
from dreamgen.data.stored_statistics import V21, StoredStatistics
from dreamgen.data.unit_checks import Units
from dreamgen.data.writer import in_order
from dreamgen.video.mp4 import open_mp4, read_frames

BLOCK = 64  # frames that are decoded at once
# a histogram of decoded pictures, how many it counts, and of those that cannot be decoded file, episode and error
Seen = tuple[np.ndarray, int, list[tuple[Path, int, str]]]


def inspect(root: Path, robot: Embodiment, *, pictures: bool = True, episodes: Sequence[int] | None = None,
            actions: bool = True, workers: int = 1) -> tuple[list[Finding], dict]:  # fmt: skip
    """All that is wrong or suspicious about the dataset at `root`, and counts of what was looked at.

    pictures: decode every frame of the robot's views, and compare their statistics too; without it videos are checked
    by their packets. episodes: look at these alone, by the dataset's own numbers. actions: False for video alone, which
    needs none, see `Dataset`. workers: threads that decode.

    Raises ValueError for episodes that the dataset does not list.
    """
    found = Findings()
    try:
        layout = read_layout(root)
    except ValueError as error:
        found.add("error", "schema", str(error), "copy the dataset again, or write its index anew")
        return found.list(), {"episodes": 0, "frames": 0}
    if absent := sorted(set(episodes or ()) - {entry.index for entry in layout.entries}):
        raise ValueError(f"{root} has no episode {', '.join(map(str, absent))}; it lists {len(layout.entries)} "
                         f"episodes")  # fmt: skip
    for note in layout.mended:
        found.add("warning", "counts", note, "correct info.json; `dreamgen export` writes it anew")
    try:
        for misfit in misfits(root, layout.info, robot, actions=actions):
            found.add("error", "contract", misfit, "choose the embodiment of the recording (embodiment=...)")
        if (root / PROVENANCE).is_file():
            read_jsonl(root / PROVENANCE, "episode_index")
    except ValueError as error:
        found.add("error", "schema", str(error), "mend the file, or delete it")
    if not (root / CONTRACT).is_file():
        found.add("note", "contract", f"there is no {CONTRACT}: parts, units and scales are those of embodiment "
                  f"'{robot.name}', unchecked", "see that it is the robot of the recording")  # fmt: skip
    tables = Tables(layout, robot, found, None if episodes is None else set(episodes), actions=actions)
    units, own = Units(robot), _own(layout, found)
    for index, columns in tables.good():
        units.add(columns.get(robot.state_key), columns.get(robot.action_key) if actions else None)
        if own is not None:
            _compare(own.get(index), columns, tables, index)
    taken = replace(layout, entries=tables.entries)
    check_videos(taken, robot, found)
    seen = {}
    if pictures:
        seen = _picture_stats(taken, robot, found, workers) | _stored_stats(taken, robot, found, workers)
    _whole(layout, tables, seen if len(taken.entries) == len(layout.entries) else {}, found)
    units.check(found)
    return found.list(), {"episodes": len(taken.entries), "frames": tables.rows}


def excused(found: list[Finding], root: Path, robot: Embodiment,
            episodes: Sequence[int] | None = None, *,
            actions: bool = True) -> tuple[list[Finding], Dataset | None]:  # fmt: skip
    """The findings for who leaves bad episodes out (`skip_bad`): errors of episodes that the reader leaves out are
    warnings. Also the reader, which says why; it holds no more than these episodes and a good one.

    None where there are none, or where the dataset cannot be opened without them.
    """
    bad = {index for finding in found if finding.level == "error" for index in finding.episodes}
    if not bad:
        return found, None
    listed = {entry.index for entry in read_layout(root).entries} if episodes is None else set(episodes)
    try:
        reader = Dataset(root, robot, skip_bad=True, actions=actions, episodes=[*bad, *sorted(listed - bad)[:1]])
    except ValueError:
        return found, None
    told = []
    for finding in found:
        gone = [index for index in finding.episodes if index in reader.skipped and finding.level == "error"]
        left = [index for index in finding.episodes if index not in gone]
        told += [replace(finding, episodes=left)] if left or not gone else []
        told += [replace(finding, level="warning", episodes=gone)] if gone else []
    return sorted(told, key=lambda finding: LEVELS.index(finding.level)), reader


def _stored(layout: Layout, found: Findings) -> Iterator[tuple[str, dict]]:
    """The statistics of the whole dataset, as stored."""
    path = layout.root / "meta/stats.json"
    if path.is_file():
        try:
            yield "meta/stats.json", read_json(path)
        except ValueError as error:
            found.add("error", "statistics", str(error), "`dreamgen export` computes them anew")
    elif layout.version != "v2.1":  # there each episode has its own
        found.add("warning", "statistics", "meta/stats.json is missing", "`dreamgen export` computes it")


def _whole(layout: Layout, tables: Tables, pictures: dict[str, dict], found: Findings) -> None:
    """The statistics of the whole dataset against its files; pictures: those of all its pictures, where known."""
    files = dict.fromkeys(entry.data for entry in layout.entries)
    for where, said in _stored(layout, found):
        widths = tables.whole()
        # v2.x files, GR00T's above all, leave pictures out of it
        own = {key: value for key, value in pictures.items() if key in said or layout.version >= "v3."}
        for name, width in widths.items():
            own[name] = statistics.of_stored(files, name, width) if name in said else {}
        check_statistics(said, own, found, where, tables.level)
        if left := [name for name in tables.seen if name not in widths]:
            found.add("note", "statistics", f"{where} was not compared with the data of {', '.join(map(repr, left))}: "
                      f"not all of their rows were looked at, or are good", "`dreamgen export` with skip_bad=true or "
                      "data.episodes leaves these rows out and computes them anew")  # fmt: skip


def _own(layout: Layout, found: Findings) -> StoredStatistics | None:
    """The statistics of each episode by its index, which v2.1 and v3.0 have; None where there are none."""
    path = layout.root / V21
    if layout.version == "v2.1" and not path.is_file():
        found.add("warning", "statistics", f"{V21} is missing; lerobot reads v2.1 by it",
                  "`dreamgen export stage.format=v2.1` writes it")  # fmt: skip
    if layout.version < "v2.1" or layout.version == "v2.1" and not path.is_file():
        return None
    try:
        return StoredStatistics(layout)
    except ValueError as error:
        found.add("error", "statistics", str(error), "`dreamgen export` computes them anew")
        return None


def _compare(said: dict, columns: dict[str, np.ndarray], tables: Tables, index: int) -> None:
    """The statistics of one episode against its columns (s k)."""
    if not said:
        tables.found.add("warning", "statistics", "it has no statistics of its own", "`dreamgen export` computes them",
                         index)  # fmt: skip
        return
    true = {name: statistics.of_numbers(values) for name, values in columns.items()}
    check_statistics(said, true, tables.found, "its own statistics", tables.level, index)


def _stored_stats(layout: Layout, robot: Embodiment, found: Findings, workers: int) -> dict[str, dict]:
    """Statistics of all pictures of the robot's views that lie in the tables, decoded."""
    true: dict[str, dict] = {}
    for key in sorted({view.key for view in robot.views} & set(stored_pictures(layout.info))):
        parts = in_order(partial(_of_table, layout.root, key), iter(layout.entries), workers)
        true |= _summed(key, parts, found, "record it again, or leave the episode out")
    return true


def _picture_stats(layout: Layout, robot: Embodiment, found: Findings, workers: int) -> dict[str, dict]:
    """Statistics of all pictures of the robot's views, decoded; a file is one thread's."""
    true: dict[str, dict] = {}
    for key in sorted({view.key for view in robot.views} & set(cameras(layout.info))):
        if is_depth(layout.info["features"][key]):
            continue
        listed = [entry for entry in layout.entries if key in entry.videos]
        files = (list(run) for _, run in groupby(listed, key=lambda entry, key=key: entry.videos[key][0]))
        parts = in_order(partial(_of_video, key), files, workers)
        true |= _summed(key, parts, found, "copy it again, or leave the episode out")
    return true


def _summed(key: str, parts: Iterable[Seen], found: Findings, mend: str) -> dict[str, dict]:
    """The statistics of a camera's pictures, none where one cannot be decoded, which is said."""
    counts, frames, whole = np.zeros((3, 256), np.int64), 0, True
    for some, shown, broken in parts:
        counts, frames, whole = counts + some, frames + shown, whole and not broken
        for path, index, error in broken:
            if path.is_file():  # a missing file was named before
                found.add("error", "video", error, mend, index)
    return {key: statistics.of_pictures(counts, frames)} if whole and frames else {}


def _of_table(root: Path, key: str, entry: Entry) -> Seen:
    """The pictures of an episode that lie in its table."""
    counts = np.zeros((3, 256), np.int64)
    try:
        for at in range(0, entry.length, BLOCK):
            rows = np.arange(at, min(at + BLOCK, entry.length))
            counts += statistics.histogram(read_pictures(root, entry, key, rows))
    except (ValueError, IndexError) as error:
        return counts, 0, [(entry.data, entry.index, str(error))]
    return counts, entry.length, []


def _of_video(key: str, entries: Sequence[Entry]) -> Seen:
    """The pictures of episodes that lie in one file."""
    counts, frames, broken, reader = np.zeros((3, 256), np.int64), 0, [], None
    for entry in entries:
        path, first, length = entry.videos[key]
        try:
            reader = open_mp4(path) if reader is None else reader
            stop = first + (len(reader) if length is None else length)
            for at in range(first, stop, BLOCK):
                counts += statistics.histogram(read_frames(reader, np.arange(at, min(at + BLOCK, stop)), path))
            frames += stop - first
        except ValueError as error:
            broken.append((path, entry.index, str(error)))
    return counts, frames, broken
