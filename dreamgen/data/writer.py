"""LeRobot v3.0 in bulk: each episode is encoded once, in parallel; files are joined by stream copy.

`meta/info.json` is written last: a folder without it is unfinished and is written anew. The bytes do not depend on
the number of workers. Beside the standard files lie `meta/dreamgen.json` (the robot's contract) and
`meta/provenance.jsonl` (`Episode.meta`, one line per episode); lerobot ignores both.
"""

import contextlib
import errno
import itertools
import json
import logging
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dreamgen.core.clip import Episode
from dreamgen.core.embodiment import Embodiment
from dreamgen.core.manifest import write_json
from dreamgen.data import statistics
from dreamgen.data.columns import REMEDY, Column, check_episode, extra_columns, robot_columns
from dreamgen.data.layout import CONTRACT, INFO, PROVENANCE
from dreamgen.video.mp4 import Joined, encode

log = logging.getLogger(__name__)
DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"


@dataclass(frozen=True, kw_only=True, eq=False)
class _Encoded:
    """An episode on its way: its videos as mp4 bytes and their histograms, by feature key."""

    episode: Episode
    videos: dict[str, bytes]
    histograms: dict[str, np.ndarray]


def write_dataset(
    out: Path,
    episodes: Iterable[Episode],
    robot: Embodiment,
    *,
    workers: int = 1,
    codec: str = "h264",
    crf: int | None = None,
    gop: int = 10,
    pix_fmt: str | None = None,
    skip_bad: bool = False,
    data_mb: float = 100,
    video_mb: float = 200,
    chunks_size: int = 1000,
) -> dict:
    """Write `episodes`, each with all views of the robot, to a new dataset at `out`; they are taken one by one.

    Returns {"episodes": n, "frames": rows, "skipped": {position among the given: reason}}.

    Raises ValueError if `out` holds a finished dataset, if there is no good episode, and, without `skip_bad`, for the
    first bad episode: frames and rows that disagree, no rows, wrong widths or sizes, NaN, an empty instruction.
    Raises OSError if the disk is full. After any error the dataset is unfinished, and is written anew by the next call.
    """
    out = Path(out)
    if (out / INFO).exists():
        raise ValueError(f"{out} already holds a dataset; choose another `out`, or delete it")
    for room in ("data", "videos", "meta"):
        shutil.rmtree(out / room, ignore_errors=True)
    if workers < 1:
        raise ValueError(f"workers is {workers}; expected 1 or more")
    files = _Files(out, robot, codec=codec, limits=(data_mb, video_mb), chunks_size=chunks_size)
    skipped: dict[int, str] = {}

    def good() -> Iterator[Episode]:
        for position, episode in enumerate(episodes):
            try:
                files.check(episode)
            except ValueError as error:
                if not skip_bad:
                    raise ValueError(f"episode {position} for {out}: {error}; {REMEDY}") from error
                log.warning("episode %d for %s is left out: %s", position, out, error)
                skipped[position] = str(error)
                continue
            yield episode

    def encoded(episode: Episode) -> _Encoded:
        views = {view.key: episode.video[view.name] for view in robot.views}
        videos = {
            key: encode(frames, robot.rate, codec=codec, crf=crf, gop=gop, pix_fmt=pix_fmt)
            for key, frames in views.items()
        }
        return _Encoded(
            episode=episode,
            videos=videos,
            histograms={key: statistics.histogram(frames) for key, frames in views.items()},
        )

    try:
        with contextlib.closing(files):
            for item in _in_order(encoded, good(), workers):
                files.add(item)
        if not files.episodes:
            reasons = "; ".join(f"episode {i}: {why}" for i, why in list(skipped.items())[:3])
            raise ValueError(f"no episode to write to {out} ({reasons or 'none was given'})")
        files.finish()
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        words = "the disk is full and the dataset unfinished; make room and run it again"
        raise OSError(errno.ENOSPC, words, str(out)) from error
    return {"episodes": len(files.episodes), "frames": files.rows, "skipped": skipped}


def _in_order(work, items: Iterator, workers: int) -> Iterator:  # noqa: ANN001
    """`map` over threads (encoders leave the interpreter's lock), with a bounded number of items under way."""
    if workers == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque(pool.submit(work, item) for item in itertools.islice(items, 2 * workers))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(work, item) for item in itertools.islice(items, 1))


class _Files:
    """The files of a dataset that is being written."""

    def __init__(self, out: Path, robot: Embodiment, *, codec: str, limits: tuple, chunks_size: int) -> None:
        self.out, self.robot, self.codec, self.limits, self.chunks_size = out, robot, codec, limits, chunks_size
        self.columns: dict[str, Column] = {}
        self.extra: dict[str, Column] | None = None
        self.episodes: list[dict] = []
        self.tasks: dict[str, int] = {}
        self.rows = 0
        self.histograms = {view.key: np.zeros((3, 256), np.int64) for view in robot.views}
        self._data_at, self._video_at = -1, dict.fromkeys(self.histograms, -1)
        self._data: pq.ParquetWriter | None = None
        self._videos: dict[str, Joined] = {}

    def check(self, episode: Episode) -> None:
        """ValueError for an episode that must not be written. The first good one settles the extra columns."""
        check_episode(episode, self.robot)
        extra = extra_columns(episode, self.robot)
        if self.extra is None:
            self.extra, self.columns = extra, robot_columns(self.robot) | extra
        elif extra != self.extra:
            raise ValueError(f"its extra columns are {_words(extra)}; the first episode has {_words(self.extra)}")

    def add(self, item: _Encoded) -> None:
        """Append one episode to the data file and to each video file."""
        episode, index = item.episode, len(self.episodes)
        rows, task = len(episode.action), self.tasks.setdefault(episode.instruction.strip(), len(self.tasks))
        count = np.arange(rows)
        values = {
            "timestamp": (count / float(self.robot.rate)).astype(np.float32),
            "frame_index": count,
            "episode_index": np.full(rows, index),
            "index": self.rows + count,
            "task_index": np.full(rows, task),
            self.robot.state_key: episode.state,
            self.robot.action_key: episode.action,
            **episode.extra,
        }
        table = pa.table([column.array(values[name]) for name, column in self.columns.items()], self._schema())
        if self._data is None or self._sink.tell() + table.nbytes > self.limits[0] * 2**20:
            self._data = self._open_data()
        self._data.write_table(table, row_group_size=rows)
        entry = {
            "episode_index": index, "tasks": [episode.instruction.strip()], "length": rows,
            **self._place("data", self._data_at), "dataset_from_index": self.rows, "dataset_to_index": self.rows + rows,
        }  # fmt: skip
        for key, data in item.videos.items():
            entry |= self._join(key, data)
        found = {key: statistics.of_pictures(counts, rows) for key, counts in item.histograms.items()}
        for name in self.columns:
            found[name] = statistics.of_numbers(np.asarray(values[name]).reshape(rows, -1))
        entry |= {f"stats/{name}/{k}": v for name, stats in sorted(found.items()) for k, v in stats.items()}
        entry |= self._place("meta/episodes", 0)
        for key, counts in item.histograms.items():
            self.histograms[key] += counts
        self.rows += rows
        self.episodes.append({"entry": entry, "meta": episode.meta})

    def _join(self, key: str, data: bytes) -> dict:
        video = self._videos.get(key)
        if video is None or video.bytes + len(data) > self.limits[1] * 2**20:
            if video is not None:
                video.close()
            self._video_at[key] += 1
            path = self.out / VIDEO.format(video_key=key, **self._indices(self._video_at[key]))
            video = self._videos[key] = Joined(path)
        first, stop = video.add(data)
        rate = float(self.robot.rate)
        return {
            **self._place(f"videos/{key}", self._video_at[key]),
            f"videos/{key}/from_timestamp": first / rate,
            f"videos/{key}/to_timestamp": stop / rate,
        }

    def _indices(self, number: int) -> dict[str, int]:
        return {"chunk_index": number // self.chunks_size, "file_index": number % self.chunks_size}

    def _place(self, prefix: str, number: int) -> dict[str, int]:
        return {f"{prefix}/{name}": value for name, value in self._indices(number).items()}

    def _schema(self) -> pa.Schema:
        features = {name: column.hugging_face() for name, column in self.columns.items()}
        meta = {"huggingface": json.dumps({"info": {"features": features}})}
        return pa.schema([(name, column.type) for name, column in self.columns.items()], metadata=meta)

    def _open_data(self) -> pq.ParquetWriter:
        self._close_data()
        self._data_at += 1
        path = self.out / DATA.format(**self._indices(self._data_at))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._sink = pa.OSFile(str(path), "wb")
        return pq.ParquetWriter(self._sink, self._schema(), compression="snappy")

    def _close_data(self) -> None:
        if self._data is not None:
            self._data.close()
            self._sink.close()
            self._data = None

    def close(self) -> None:
        self._close_data()
        for video in self._videos.values():
            video.close()

    def finish(self) -> None:
        """Everything under meta/, info.json last."""
        meta, robot = self.out / "meta", self.robot
        path = self.out / EPISODES.format(**self._indices(0))
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([row["entry"] for row in self.episodes]), path, compression="snappy")
        pandas = {"index_columns": ["task"], "column_indexes": [], "columns": [
            {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64",
             "metadata": None},
            {"name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object", "metadata": None},
        ]}  # fmt: skip
        tasks = pa.table({"task_index": pa.array(self.tasks.values(), pa.int64()), "task": list(self.tasks)})
        pq.write_table(tasks.replace_schema_metadata({"pandas": json.dumps(pandas)}), meta / "tasks.parquet")
        stats = {key: statistics.of_pictures(counts, self.rows) for key, counts in self.histograms.items()}
        for name in self.columns:
            stats[name] = statistics.of_numbers(self._column(name))
        write_json(meta / "stats.json", stats)
        lines = [json.dumps({"episode_index": i, **row["meta"]}) for i, row in enumerate(self.episodes)]
        (self.out / PROVENANCE).write_text("\n".join(lines) + "\n")
        write_json(self.out / CONTRACT, {"contract": robot.contract(), "rate": robot.robot_hz})
        write_json(self.out / INFO, self._info())

    def _column(self, name: str) -> np.ndarray:
        """A whole column (n k), from the files."""
        paths = [self.out / DATA.format(**self._indices(number)) for number in range(self._data_at + 1)]
        column = pa.concat_tables(pq.read_table(path, columns=[name]) for path in paths)[name].combine_chunks()
        if self.columns[name].width > 1:
            column = column.flatten()
        return column.to_numpy(zero_copy_only=False).reshape(self.rows, -1)

    def _info(self) -> dict:
        robot, rate = self.robot, self.robot.rate
        fps = int(rate) if rate.denominator == 1 else float(rate)
        pixels = _pixel_format(self.out / VIDEO.format(video_key=robot.views[0].key, **self._indices(0)))
        features = {}
        for view in robot.views:
            info = {"video.height": view.height, "video.width": view.width, "video.codec": self.codec,
                    "video.pix_fmt": pixels, "video.fps": fps, "video.channels": 3, "video.is_depth_map": False,
                    "has_audio": False}  # fmt: skip
            features[view.key] = {"dtype": "video", "shape": [view.height, view.width, 3],
                                  "names": ["height", "width", "channels"], "info": info}  # fmt: skip
        features |= {name: column.feature() for name, column in self.columns.items()}
        return {
            "codebase_version": "v3.0", "robot_type": robot.name, "fps": fps, "total_episodes": len(self.episodes),
            "total_frames": self.rows, "total_tasks": len(self.tasks), "chunks_size": self.chunks_size,
            "data_files_size_in_mb": self.limits[0], "video_files_size_in_mb": self.limits[1],
            "splits": {"train": f"0:{len(self.episodes)}"}, "data_path": DATA, "video_path": VIDEO,
            "features": features,
        }  # fmt: skip


def _words(columns: dict[str, Column]) -> str:
    return ", ".join(f"{name} {column.dtype} ({column.width},)" for name, column in sorted(columns.items())) or "none"


def _pixel_format(path: Path) -> str:
    import av

    with av.open(str(path)) as container:
        return str(container.streams.video[0].codec_context.pix_fmt)
