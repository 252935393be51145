"""Everything that is checked of a dataset, in order: index, tables, videos, statistics, units, fit to a robot."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dreamgen.core.embodiment import Embodiment
from dreamgen.core.manifest import read_json
from dreamgen.data import statistics
from dreamgen.data.file_checks import Tables, check_videos
from dreamgen.data.findings import Finding, Findings
from dreamgen.data.fit import misfits
from dreamgen.data.layout import CONTRACT, PROVENANCE, Layout, cameras, episode_stats, read_jsonl, read_layout
from dreamgen.data.layout import pictures as stored_pictures
from dreamgen.data.number_checks import check_statistics, check_units
from dreamgen.data.rows import read_pictures
from dreamgen.video.mp4 import open_mp4, read_frames

BLOCK = 64  # frames that are decoded at once


def inspect(root: Path, robot: Embodiment, *, pictures: bool = True) -> tuple[list[Finding], dict]:
    """All that is wrong or suspicious about the dataset at `root`, and counts of what was looked at.

    pictures: decode every frame of the robot's views, and compare their statistics too; without it videos are checked
    by their packets.
    """
    found = Findings()
    try:
        layout = read_layout(root)
    except ValueError as error:
        found.add("error", "schema", str(error), "copy the dataset again, or write its index anew")
        return found.list(), {"episodes": 0, "frames": 0}
    for note in layout.mended:
        found.add("warning", "counts", note, "correct info.json; `jobs.export` writes it anew")
    try:
        for misfit in misfits(root, layout.info, robot):
            found.add("error", "contract", misfit, "choose the embodiment of the recording (embodiment=...)")
        if (root / PROVENANCE).is_file():
            read_jsonl(root / PROVENANCE, "episode_index")
    except ValueError as error:
        found.add("error", "schema", str(error), "mend the file, or delete it")
    if not (root / CONTRACT).is_file():
        found.add("note", "contract", f"there is no {CONTRACT}: parts, units and scales are those of embodiment "
                  f"'{robot.name}', unchecked", "see that it is the robot of the recording")  # fmt: skip
    tables = Tables(layout, found)
    tables.check()
    check_videos(layout, robot, found)
    true = {name: statistics.of_numbers(np.concatenate([*arrays.values()])) for name, arrays in tables.values.items()}
    if pictures:
        true |= _picture_stats(layout, robot, found) | _stored_stats(layout, robot, found)
    for where, said in _stored(layout, found):
        # v2.x files, GR00T's above all, leave pictures out of it
        own = {k: v for k, v in true.items() if k in said or layout.version >= "v3." or np.ndim(v["mean"]) != 3}
        check_statistics(said, own, found, where)
    _episodes(layout, tables, found)
    check_units(robot, tables.values.get(robot.state_key, {}), tables.values.get(robot.action_key, {}), found)
    return found.list(), {"episodes": len(layout.entries), "frames": tables.rows}


def _stored(layout: Layout, found: Findings) -> Iterator[tuple[str, dict]]:
    """The statistics of the whole dataset, as stored."""
    path = layout.root / "meta/stats.json"
    if path.is_file():
        try:
            yield "meta/stats.json", read_json(path)
        except ValueError as error:
            found.add("error", "statistics", str(error), "`jobs.export` computes them anew")
    elif layout.version != "v2.1":  # there each episode has its own
        found.add("warning", "statistics", "meta/stats.json is missing", "`jobs.export` computes it")


def _episodes(layout: Layout, tables: Tables, found: Findings) -> None:
    """The statistics of each episode, which v2.1 and v3.0 have."""
    path = layout.root / "meta/episodes_stats.jsonl"
    if layout.version == "v2.1" and not path.is_file():
        found.add("warning", "statistics", "meta/episodes_stats.jsonl is missing; lerobot reads v2.1 by it",
                  "`jobs.export stage.format=v2.1` writes it")  # fmt: skip
    if layout.version < "v2.1" or layout.version == "v2.1" and not path.is_file():
        return
    try:
        stored = episode_stats(layout.root) if layout.version >= "v3." else {
            row["episode_index"]: row["stats"] for row in read_jsonl(path, "episode_index", "stats")}  # fmt: skip
    except ValueError as error:
        found.add("error", "statistics", str(error), "`jobs.export` computes them anew")
        return
    for index in tables.episodes:
        if said := stored.get(index):
            true = {name: statistics.of_numbers(arrays[index]) for name, arrays in tables.values.items()
                    if index in arrays}  # fmt: skip
            check_statistics(said, true, found, "its own statistics", index)
        else:
            found.add("warning", "statistics", "it has no statistics of its own", "`jobs.export` computes them", index)


def _stored_stats(layout: Layout, robot: Embodiment, found: Findings) -> dict[str, dict]:
    """Statistics of all pictures of the robot's views that lie in the tables, decoded."""
    true: dict[str, dict] = {}
    for key in sorted({view.key for view in robot.views} & set(stored_pictures(layout.info))):
        counts, frames, whole = np.zeros((3, 256), np.int64), 0, True
        for entry in layout.entries:
            try:
                for at in range(0, entry.length, BLOCK):
                    rows = np.arange(at, min(at + BLOCK, entry.length))
                    counts += statistics.histogram(read_pictures(layout.root, entry, key, rows))
                frames += entry.length
            except (ValueError, IndexError) as error:
                whole = False
                if entry.data.is_file():  # a missing file was named before
                    found.add("error", "video", str(error), "record it again, or leave the episode out", entry.index)
        if whole and frames:
            true[key] = statistics.of_pictures(counts, frames)
    return true


def _picture_stats(layout: Layout, robot: Embodiment, found: Findings) -> dict[str, dict]:
    """Statistics of all pictures of the robot's views, decoded."""
    true: dict[str, dict] = {}
    kept: tuple[Path | None, Any] = (None, None)
    for key in sorted({view.key for view in robot.views} & set(cameras(layout.info))):
        counts, frames, whole = np.zeros((3, 256), np.int64), 0, True
        for entry in layout.entries:
            path, first, length = entry.videos.get(key, (None, 0, 0))
            if path is None:
                continue
            try:
                if kept[0] != path:
                    kept = (path, open_mp4(path))
                reader = kept[1]
                stop = first + (len(reader) if length is None else length)
                for at in range(first, stop, BLOCK):
                    counts += statistics.histogram(read_frames(reader, np.arange(at, min(at + BLOCK, stop)), path))
                frames += stop - first
            except ValueError as error:
                whole = False
                if path.is_file():  # a missing file was named before
                    found.add("error", "video", str(error), "copy it again, or leave the episode out", entry.index)
        if whole and frames:
            true[key] = statistics.of_pictures(counts, frames)
    return true
