"""Any dataset that can be read, written anew in another format: v3.0, v2.1, or the GR00T flavour of v2.1.

Videos are copied packet by packet; a part that does not begin with a key frame is encoded again, and pictures that lie
in the tables become videos. Columns, provenance and annotations come along; what the reader mended is written as
mended. Statistics are of the data; those of depth cameras, which only their writer can read, are the dataset's own.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dreamgen.core.clip import Episode
from dreamgen.core.embodiment import Embodiment
from dreamgen.core.manifest import read_json, write_json
from dreamgen.data import groot, statistics
from dreamgen.data.columns import BOOKKEEPING, Column, entry_names, is_even, read_column, robot_columns, stored_column
from dreamgen.data.files_v2 import Files as FilesV2
from dreamgen.data.files_v3 import Files as FilesV3
from dreamgen.data.layout import CONTRACT, Entry, cameras, is_depth, pictures, read_layout
from dreamgen.data.ledger import Item, Ledger
from dreamgen.data.lerobot import Dataset
from dreamgen.data.states import known_states
from dreamgen.data.stored_statistics import V21, StoredStatistics
from dreamgen.data.video_rate import at_video_rate, slowed
from dreamgen.data.writer import in_order, start, store
from dreamgen.video.mp4 import count_frames, encode
from dreamgen.video.remux import cut, decoded

FORMATS = ("v3.0", "v2.1", "groot")
RATES = ("robot", "video")
RATE = re.compile(r"[1-9]\d*(/[1-9]\d*)?")
log = logging.getLogger(__name__)


def export_dataset(data: Dataset, out: Path, *, format: str = "v3.0", rate: str | int = "robot", horizon: int = 16,
                   codec: str = "h264", workers: int = 1) -> dict:  # fmt: skip
    """Write all kept episodes of `data` to a new dataset at `out`.

    format: "v3.0", "v2.1" or "groot". rate: rows as they are ("robot"), or one per new picture of what `label` wrote
    ("video"), or so many a second ("10"), of recordings too, see `dreamgen.data.video_rate`; the contract then is that
    of the slower robot. horizon: rows of a chunk for which GR00T's relative statistics are computed. codec: for what
    must be encoded again.

    Returns {"episodes", "frames", "encoded": videos that were encoded, "left_out": columns and cameras,
    "unknown_states": episodes with states that are not known (`state_known`), which others do not see}.
    Raises ValueError for an unknown format or rate, episodes that have not one video rate, and if `out` holds anything
    of a dataset that no unfinished call wrote.
    """
    if format not in FORMATS:
        raise ValueError(f"format is '{format}'; expected one of {', '.join(FORMATS)}")
    if rate not in RATES and not RATE.fullmatch(str(rate)):
        raise ValueError(f"rate is '{rate}'; expected one of {', '.join(RATES)}, or rows a second, as 10 or 25/2")
    data.require_actions("stage.data")
    asked = None if rate in RATES else str(rate)
    source = _Source(data, format, codec, _video_hz(data) if rate == "video" else asked, asked)
    start(out, workers)
    ledger = Ledger(rate=source.robot.rate, columns=source.columns, said=source.said)
    contract = read_json(data.root / CONTRACT)["contract"] if (data.root / CONTRACT).is_file() else None
    if contract is not None and source.video_hz is not None:
        contract = slowed(Embodiment.from_contract(contract), source.video_hz).contract()
    robot_type = str(data.info.get("robot_type") or data.robot.name)
    if format == "v3.0":
        files: Any = FilesV3(out, ledger, robot_type=robot_type, contract=contract)
    else:
        files = FilesV2(out, ledger, robot_type=robot_type, contract=contract, groot=format == "groot")

    def flavour() -> None:
        if format != "groot":
            return
        meta, episodes = Path(out) / "meta", [source.episode(i)[0] for i in range(len(data))]
        write_json(meta / "modality.json", groot.modality(source.robot, source.cameras, source.annotations))
        write_json(meta / "stats.json", groot.stats(files.numbers()))
        relative = groot.relative_stats(source.robot, [known_states(episode) for episode in episodes],
                                        [episode.action for episode in episodes], horizon)  # fmt: skip
        if relative:
            write_json(meta / "relative_stats.json", relative)

    store(out, files, in_order(source.item, iter(range(len(data))), workers), data.skipped, flavour)
    told = range(len(data)) if "state_known" in source.columns else ()
    unknown = sum(bool((data.episode(i).extra.get("state_known", np.ones(1)) == 0).any()) for i in told)
    if unknown:
        log.warning("states of %d of %d episodes are not known in some rows (column state_known): '%s' holds what "
                    "stands in for them there, and other trainers take it for states. Train them without states, or "
                    "label with a labeler that reads states (labeler.state_weight).",
                    unknown, len(data), data.robot.state_key)  # fmt: skip
    return {"episodes": ledger.episodes, "frames": ledger.rows, "encoded": source.encoded, "left_out": source.left_out,
            "unknown_states": unknown}  # fmt: skip


def _video_hz(data: Dataset) -> str:
    """The one rate of all videos."""
    rates = sorted({str(data.episode(i).meta.get("video_hz")) for i in range(len(data))})
    if len(rates) != 1:
        raise ValueError(f"the videos of {data.root} have the rates {', '.join(rates)}, rate=video needs one; export "
                         f"the episodes of each apart (stage.data.episodes)")  # fmt: skip
    return rates[0]


class _Source:
    """Episodes of a dataset as items; with `video_hz`, at that rate of their new pictures, which they tell
    themselves where none was `asked` for."""

    def __init__(self, data: Dataset, format: str, codec: str, video_hz: str | None, asked: str | None) -> None:
        self.data, self.codec, self.encoded, self.left_out, self.asked = data, codec, 0, [], asked
        self.video_hz = video_hz
        if video_hz is not None:
            self.episode(0)  # says at once what is no labelled video
        self.robot = data.robot if video_hz is None else slowed(data.robot, video_hz)
        entries, features = [data.entry(i) for i in range(len(data))], data.info["features"]
        views = [view.key for view in data.robot.views]
        self.said = {key: _said(features[key]) for key in cameras(data.info)}
        self.cameras = [key for key in cameras(data.info) if key in views or all(_has(e, key) for e in entries)
                        and (not is_depth(features[key]) or self._copied(key))]  # fmt: skip
        self.depths = self._stated([key for key in self.cameras if is_depth(features[key])])
        self.cameras += [key for key in pictures(data.info) if key in views or self._is_seen(key)]
        columns = robot_columns(data.robot)
        for key in {data.robot.state_key, data.robot.action_key} & columns.keys():  # as who reads the data knows them
            if len(names := entry_names(features[key].get("names"))) == columns[key].width:
                columns[key] = replace(columns[key], names=names)
        everywhere = set(data.columns(0)).intersection(*(data.columns(i) for i in range(len(data))))
        present, held = [name for name in data.columns(0) if name in everywhere], data.episode(0).extra
        self.annotations = [name for name in present if name.startswith("annotation.") and self._is_text(name)]
        for name, feature in features.items():
            if name in columns or name in cameras(data.info):
                continue
            stored = stored_column(feature)
            if name in self.annotations:
                columns[name] = Column(dtype="int64", width=1)
            elif name in present and stored and (name in held or self._is_even(name, stored.width)):
                columns[name] = stored
        if format == "groot":
            for name in (groot.DESCRIPTION, groot.VALIDITY):
                columns.setdefault(name, Column(dtype="int64", width=1))
                self.annotations += [name] * (name not in self.annotations)
        self.columns = columns
        self.left_out = [name for name in features if name not in columns and name not in self.cameras]

    def _is_seen(self, key: str) -> bool:
        """Whether the first picture of a camera in the tables is one that a video can hold."""
        try:
            return self.data.frames(0, key, np.arange(1)).size > 0
        except ValueError:
            return False

    def _is_even(self, name: str, width: int) -> bool:
        """Whether a column that all episodes have is `width` wide in all rows."""
        return all(is_even(self.data.table(i, [name]), name, width) for i in range(len(self.data)))

    def _is_text(self, name: str) -> bool:
        """Whether a column holds task indices in every episode."""
        tables = (self.data.table(i, [name]) for i in range(len(self.data)))
        return all(name in t.column_names and pa.types.is_integer(t[name].type)
                   and set(t[name].unique().to_pylist()) <= self.data.tasks.keys() for t in tables)  # fmt: skip

    def episode(self, i: int) -> tuple[Episode, np.ndarray | None]:
        """Episode i as it is written, and which of its rows (k,) these are; None for all."""
        if self.video_hz is None:
            return self.data.episode(i), None
        try:
            return at_video_rate(self.data.episode(i), self.data.robot, self.asked)
        except ValueError as error:
            raise ValueError(f"episode {self.data.index(i)} of {self.data.root}: {error}") from error

    def item(self, i: int) -> Item:
        """Episode i, with its pictures' histograms."""
        data, robot, table = self.data, self.robot, self.data.table(i, {*self.columns, *self.annotations})
        episode, taken = self.episode(i)
        whole, table = table, table if taken is None else table.take(taken)
        rows = len(episode.action)
        known = {robot.action_key: episode.action, **episode.extra}
        known |= {robot.state_key: episode.state} if robot.state else {}
        texts = {"task_index": [episode.instruction] * rows}
        for name in self.annotations:
            if name in table.column_names and name != groot.DESCRIPTION:
                texts[name] = [str(data.tasks[k]) for k in table[name].to_pylist()]
            else:
                texts[name] = [groot.VALID if name == groot.VALIDITY else episode.instruction] * rows
        columns = {}
        for name, column in self.columns.items():
            if name in (*BOOKKEEPING, *texts):
                continue
            if taken is not None and name.startswith("next."):
                columns[name] = _outcome(name, _values(whole, name, column), taken)
                continue
            columns[name] = known[name] if name in known else _values(table, name, column)
        filmed = {key: self._filmed(i, key, rows, taken) for key in self.cameras}
        videos = {key: video for key, (video, _) in filmed.items()}
        counts = {key: found for key, (_, found) in filmed.items() if found is not None}
        stated = {key: found[data.index(i)] for key, found in self.depths.items() if found}
        return Item(rows=rows, columns=columns, texts=texts, videos=videos, histograms=counts, stated=stated,
                    meta=episode.meta)  # fmt: skip

    def _stated(self, depths: Sequence[str]) -> dict[str, dict[int, dict]]:
        """Statistics of depth cameras by episode, as the dataset tells them: what a level means, only who wrote the
        packets knows. Empty for a camera of which an episode tells none, and said."""
        told, indices = None, [self.data.index(i) for i in range(len(self.data))]
        if depths and (self.data.version >= "v3." or (self.data.root / V21).is_file()):
            told = StoredStatistics(read_layout(self.data.root), set(depths))
        found: dict[str, dict[int, dict]] = {key: {} for key in depths}
        for index in indices if told is not None else ():
            own = told.get(index)
            for key in depths:
                if "count" in own.get(key, {}):
                    found[key][index] = own[key]
        for key, episodes in found.items():
            if len(episodes) < len(indices):
                log.warning("%s tells no statistics of the depths of '%s' for %d of %d episodes; none are written of "
                            "it", self.data.root, key, len(indices) - len(episodes), len(indices))  # fmt: skip
                episodes.clear()
        return found

    def _copied(self, key: str) -> bool:
        """Whether the packets of all videos of a camera can be copied: encoded as colours, depths are lost."""
        return self.video_hz is None and all(self._piece(i, key) is not None for i in range(len(self.data)))

    def _piece(self, i: int, key: str) -> bytes | None:
        """The packets of a video, None where it must be encoded again."""
        path, first, frames = self.data.entry(i).videos[key]
        return path.read_bytes() if frames is None else cut(path, first, self.data.length(i))

    def _filmed(self, i: int, key: str, rows: int, taken: np.ndarray | None) -> tuple[bytes, np.ndarray | None]:
        """The video of a camera, and the histogram of its pictures, None of depths. ValueError names one that cannot be
        decoded."""
        import av

        try:
            video = self._video(i, key, rows, taken)
            if key in self.depths:
                return video, None
            return video, sum(statistics.histogram(frame[None]) for frame in decoded(video))
        except (ValueError, av.FFmpegError) as error:
            raise ValueError(f"episode {self.data.index(i)} of {self.data.root}: its video of '{key}' cannot be used: "
                             f"{error}; copy it again, or leave the episode out: stage.data.episodes lists those to "
                             f"take") from error  # fmt: skip

    def _video(self, i: int, key: str, rows: int, taken: np.ndarray | None) -> bytes:
        if taken is None and key in self.data.entry(i).videos and (piece := self._piece(i, key)) is not None:
            return piece
        self.encoded += 1
        self.said.pop(key, None)  # what it says is of other packets
        shown = self.data.frames(i, key, np.arange(rows) if taken is None else taken)
        return encode(shown, self.robot.rate, codec=self.codec)


def _has(entry: Entry, key: str) -> bool:
    """Whether an episode has a video of a camera, as long as the episode."""
    if key not in entry.videos or not entry.videos[key][0].is_file():
        return False
    path, _, frames = entry.videos[key]
    return (count_frames(path) if frames is None else frames) == entry.length


def _said(feature: dict) -> dict:
    """What `info.json` tells of a camera's videos; v2.0 calls it video_info."""
    said = {**(feature.get("video_info") or {}), **(feature.get("info") or {})}
    shape = list(feature.get("shape") or [])
    channels = next((n for n in (shape[-1:], shape[:1]) if n in ([1], [3])), [3])[0]
    return {"video.channels": channels, **said}


def _outcome(name: str, values: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """What came of each of the steps that begin at rows `taken` (k,): rewards of all its rows (s ...) together, of
    other values the last."""
    if name == "next.reward":
        return np.add.reduceat(values, taken)
    return values[np.append(taken[1:], len(values)) - 1]


def _values(table: pa.Table, name: str, column: Column) -> np.ndarray:
    if column.dtype == "string":
        return np.array(table[name].to_pylist(), dtype=object)[:, None]
    return read_column(table, name)
