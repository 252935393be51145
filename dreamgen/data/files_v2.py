"""The files of a LeRobot v2.1 dataset that is being written: a table and a video per episode and camera."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dreamgen.core.manifest import settle, write_json
from dreamgen.data import statistics
from dreamgen.data.files_v3 import hugging_face, write_contract
from dreamgen.data.layout import INFO, PROVENANCE
from dreamgen.data.ledger import Item, Ledger, provenance
from dreamgen.data.lines import Lines
from dreamgen.video.remux import Joined

DATA = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
STATS = ("min", "max", "mean", "std", "count")


class Files:
    """Takes items one by one; `finish` writes what lies under meta/, `meta/info.json` last.

    groot: name colours and rates as every release of GR00T finds them (the first knew `channel` and `video_info` only).
    """

    def __init__(self, out: Path, ledger: Ledger, *, robot_type: str, contract: dict | None, groot: bool = False,
                 chunks_size: int = 1000) -> None:  # fmt: skip
        self.out, self.ledger, self.robot_type, self.contract = out, ledger, robot_type, contract
        self.groot, self.chunks_size = groot, chunks_size
        self._episodes, self._stats = (Lines(out / "meta" / f"{name}.jsonl") for name in ("episodes", "episodes_stats"))
        self._provenance = Lines(out / PROVENANCE)

    def path(self, index: int) -> Path:
        """The table of an episode."""
        return self.out / DATA.format(episode_chunk=index // self.chunks_size, episode_index=index)

    def add(self, item: Item) -> None:
        """Write one episode's files."""
        ledger, index = self.ledger, self.ledger.episodes
        values, texts, stats = ledger.enter(item)
        schema = pa.schema([(name, column.type) for name, column in ledger.columns.items()],
                           metadata={"huggingface": hugging_face(ledger.columns)})  # fmt: skip
        table = pa.table([column.array(values[name]) for name, column in ledger.columns.items()], schema)
        self.path(index).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, self.path(index), compression="snappy")
        for key, data in item.videos.items():
            place = {"episode_chunk": index // self.chunks_size, "video_key": key, "episode_index": index}
            with Joined(self.out / VIDEO.format(**place), ledger.rate) as video:
                video.add(data)
        about = {"episode_index": index, "tasks": texts, "length": item.rows}
        self._episodes.add(about | provenance(item.meta))
        self._provenance.add({"episode_index": index, **item.meta})
        kept = {name: {k: found[k] for k in STATS} for name, found in stats.items()}
        self._stats.add({"episode_index": index, "stats": kept})

    def close(self) -> None:
        """End the lists of episodes; nothing else is open between two items."""
        for lines in (self._episodes, self._stats, self._provenance):
            lines.close()

    def numbers(self) -> dict[str, dict]:
        """Statistics of all columns of numbers, with quantiles."""
        paths = [self.path(index) for index in range(self.ledger.episodes)]
        columns = {name: column for name, column in self.ledger.columns.items() if column.dtype != "string"}
        return {name: statistics.of_stored(paths, name, column.width) for name, column in columns.items()}

    def finish(self) -> None:
        """Everything under meta/, info.json last."""
        meta, ledger = self.out / "meta", self.ledger
        tasks = Lines(meta / "tasks.jsonl")
        for text, number in ledger.tasks.items():
            tasks.add({"task_index": number, "task": text})
        tasks.close()
        write_contract(self.out, self.contract)
        features = ledger.features()
        for key in ledger.cameras if self.groot else ():
            features[key] |= {"names": ["height", "width", "channel"], "video_info": features[key]["info"]}
        settle(self.out)
        write_json(self.out / INFO, {
            "codebase_version": "v2.1", "robot_type": self.robot_type, "fps": ledger.fps,
            "total_episodes": ledger.episodes, "total_frames": ledger.rows, "total_tasks": len(ledger.tasks),
            "total_videos": ledger.episodes * len(ledger.cameras), "chunks_size": self.chunks_size,
            "total_chunks": -(-ledger.episodes // self.chunks_size), "splits": {"train": f"0:{ledger.episodes}"},
            "data_path": DATA, "video_path": VIDEO, "features": features,
        })  # fmt: skip
