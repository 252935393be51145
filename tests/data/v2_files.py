"""A v2.1 dataset as others write it, and changes to it."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dreamgen.core.clip import Episode
from dreamgen.core.embodiment import Embodiment
from dreamgen.video.mp4 import write_mp4


def write_v2(root: Path, robot: Embodiment, episodes: Sequence[Episode]) -> None:
    """A clean dataset of three episodes."""
    tasks = sorted({e.instruction for e in episodes})
    (root / "meta").mkdir(parents=True)
    at, listed = 0, []
    for i, e in enumerate(episodes):
        n = len(e.action)
        table = {
            "observation.state": e.state.astype(float).tolist(), "action": e.action.astype(float).tolist(),
            "timestamp": (np.arange(n) / 20).tolist(), "frame_index": list(range(n)), "episode_index": [i] * n,
            "index": list(range(at, at + n)), "task_index": [tasks.index(e.instruction)] * n,
        }  # fmt: skip
        path = root / f"data/chunk-000/episode_{i:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(table), path)
        for view in robot.views:
            write_mp4(root / f"videos/chunk-000/{view.key}/episode_{i:06d}.mp4", e.video[view.name], 20)
        listed.append({"episode_index": i, "tasks": [e.instruction], "length": n})
        at += n
    features = {view.key: {"dtype": "video", "shape": [40, 56, 3], "names": None} for view in robot.views}
    for key, width in (("observation.state", 5), ("action", 4)):
        features[key] = {"dtype": "float64", "shape": [width]}
    info = {
        "codebase_version": "v2.1", "fps": 20.0, "total_episodes": 3, "total_frames": at, "total_tasks": 3,
        "chunks_size": 1000, "splits": {"train": "0:3"}, "features": features,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }  # fmt: skip
    (root / "meta/info.json").write_text(json.dumps(info))
    write_lines(root / "meta/episodes.jsonl", listed)
    write_lines(root / "meta/tasks.jsonl", [{"task_index": k, "task": text} for k, text in enumerate(tasks)])


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_table(root: Path, i: int, change) -> None:
    path = root / f"data/chunk-000/episode_{i:06d}.parquet"
    pq.write_table(pa.table(change(pq.read_table(path).to_pydict())), path)


def change_info(root: Path, **change) -> None:
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
