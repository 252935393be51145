"""The files of a LeRobot v3.0 dataset that is being written: few large tables and videos, and their index.

Beside the standard files lie `meta/dreamgen.json` (the robot's contract) and `meta/provenance.jsonl` (`Episode.meta`,
one line per episode). The episode table has two columns more, `source` and `provenance` (JSON), which lerobot hands
to its `episode_filter`.
"""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dreamgen.core.manifest import settle, write_json
from dreamgen.data import statistics
from dreamgen.data.layout import CONTRACT, INFO, PROVENANCE
from dreamgen.data.ledger import Item, Ledger, provenance
from dreamgen.data.lines import Lines
from dreamgen.video.remux import Joined

DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
HELD = 1000  # rows of the episode table, some 100 kB each, that are held in memory


class Files:
    """Takes items one by one; `finish` writes what lies under meta/, `meta/info.json` last.

    limits: of a data and of a video file, in MB. contract: the robot's, or None where it is not known.
    """

    def __init__(self, out: Path, ledger: Ledger, *, robot_type: str, contract: dict | None, limits: tuple
                 = (100, 200), chunks_size: int = 1000) -> None:  # fmt: skip
        self.out, self.ledger, self.robot_type, self.contract = out, ledger, robot_type, contract
        self.limits, self.chunks_size = limits, chunks_size
        self._held: list[dict] = []
        self._entries: pq.ParquetWriter | None = None
        self._provenance = Lines(out / PROVENANCE)
        self._data_at, self._video_at = -1, {}
        self._data: pq.ParquetWriter | None = None
        self._videos: dict[str, Joined] = {}

    def add(self, item: Item) -> None:
        """Append one episode to the data file and to each video file."""
        ledger, index, first = self.ledger, self.ledger.episodes, self.ledger.rows
        values, texts, stats = ledger.enter(item)
        table = pa.table([column.array(values[name]) for name, column in ledger.columns.items()], self._schema())
        if self._data is None or self._sink.tell() + table.nbytes > self.limits[0] * 2**20:
            self._data = self._open_data()
        self._data.write_table(table, row_group_size=item.rows)
        entry = {
            "episode_index": index, "tasks": texts, "length": item.rows, **self._place("data", self._data_at),
            "dataset_from_index": first, "dataset_to_index": ledger.rows,
        }  # fmt: skip
        for key, data in item.videos.items():
            entry |= self._join(key, data)
        entry |= {f"stats/{name}/{k}": v for name, found in sorted(stats.items()) for k, v in found.items()}
        self._held.append(entry | self._place("meta/episodes", 0) | provenance(item.meta))
        self._provenance.add({"episode_index": index, **item.meta})
        if len(self._held) == HELD:
            self._write_held()

    def _join(self, key: str, data: bytes) -> dict:
        video, rate = self._videos.get(key), self.ledger.rate
        if video is None or video.bytes + len(data) > self.limits[1] * 2**20 or not video.fits(data):
            if video is not None:
                video.close()
            self._video_at[key] = self._video_at.get(key, -1) + 1
            path = self.out / VIDEO.format(video_key=key, **self._indices(self._video_at[key]))
            video = self._videos[key] = Joined(path, rate)
        first, stop = video.add(data)
        return {
            **self._place(f"videos/{key}", self._video_at[key]),
            f"videos/{key}/from_timestamp": first / float(rate),
            f"videos/{key}/to_timestamp": stop / float(rate),
        }

    def _indices(self, number: int) -> dict[str, int]:
        return {"chunk_index": number // self.chunks_size, "file_index": number % self.chunks_size}

    def _place(self, prefix: str, number: int) -> dict[str, int]:
        return {f"{prefix}/{name}": value for name, value in self._indices(number).items()}

    def _schema(self) -> pa.Schema:
        columns = self.ledger.columns
        meta = {"huggingface": hugging_face(columns)}
        return pa.schema([(name, column.type) for name, column in columns.items()], metadata=meta)

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

    def _write_held(self) -> None:
        """Append the rows that are held to the episode table."""
        if self._entries is None:
            path = self.out / EPISODES.format(**self._indices(0))
            path.parent.mkdir(parents=True, exist_ok=True)
            self._entries = pq.ParquetWriter(path, pa.Table.from_pylist(self._held).schema, compression="snappy")
        if self._held:
            self._entries.write_table(pa.Table.from_pylist(self._held, self._entries.schema))
        self._held.clear()

    def close(self) -> None:
        """Close what is open; of the episode table, `finish` writes the rest."""
        self._close_data()
        self._provenance.close()
        for video in self._videos.values():
            video.close()

    def finish(self) -> None:
        """Everything under meta/, info.json last. The data and video files must be closed."""
        meta, ledger = self.out / "meta", self.ledger
        self._write_held()
        if self._entries is not None:
            self._entries.close()
        write_tasks(meta / "tasks.parquet", ledger.tasks)
        paths = [self.out / DATA.format(**self._indices(number)) for number in range(self._data_at + 1)]
        stats = ledger.picture_stats()
        for name, column in ledger.columns.items():
            if column.dtype != "string":
                stats[name] = statistics.of_stored(paths, name, column.width)
        write_json(meta / "stats.json", stats)
        write_contract(self.out, self.contract)
        settle(self.out)
        write_json(self.out / INFO, {
            "codebase_version": "v3.0", "robot_type": self.robot_type, "fps": ledger.fps,
            "total_episodes": ledger.episodes, "total_frames": ledger.rows, "total_tasks": len(ledger.tasks),
            "chunks_size": self.chunks_size, "data_files_size_in_mb": self.limits[0],
            "video_files_size_in_mb": self.limits[1], "splits": {"train": f"0:{ledger.episodes}"}, "data_path": DATA,
            "video_path": VIDEO, "features": ledger.features(),
        })  # fmt: skip


def hugging_face(columns: dict) -> str:
    """What the `datasets` library wants to find in a parquet file's schema."""
    features = {name: column.hugging_face() for name, column in columns.items()}
    return json.dumps({"info": {"features": features}})


def write_tasks(path: Path, tasks: dict[str, int]) -> None:
    """The texts as a pandas frame whose index they are."""
    pandas = {"index_columns": ["task"], "column_indexes": [], "columns": [
        {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64",
         "metadata": None},
        {"name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object", "metadata": None},
    ]}  # fmt: skip
    table = pa.table({"task_index": pa.array(tasks.values(), pa.int64()), "task": list(tasks)})
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(pandas)}), path)


def write_contract(out: Path, contract: dict | None) -> None:
    """The robot's contract where it is known, which dreamgen alone reads."""
    if contract is not None:
        write_json(out / CONTRACT, {"contract": contract, "rate": contract["robot_hz"]})
