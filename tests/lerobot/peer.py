"""Runs with the lerobot package, without dreamgen: reads and writes datasets as lerobot does, and tells by .npz files.

`python peer.py JOBS.json`: a list of {"do": "read", "root", "out", "rows", "deltas"} and
{"do": "write", "root", "data", "codec"}; every job's own error is told in `<out or root>.error`, and the next one runs.
"""

import json
import sys
import traceback
from pathlib import Path

import lerobot
import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import CODEBASE_VERSION, LeRobotDataset


def backend() -> str:
    """lerobot's preferred decoder, where its system libraries are there."""
    try:
        from torchcodec.decoders import VideoDecoder  # noqa: F401
    except Exception:  # what a missing system library raises depends on the release
        return "pyav"
    return "torchcodec"


def read(root: str, out: str, rows: list[int], deltas: dict[str, list[float]]) -> None:
    """Items at `rows`, plain and with delta_timestamps, all numbers, tasks and statistics."""
    data = LeRobotDataset("local/data", root=root, video_backend=backend())
    found = {"length": np.array(len(data)), "episodes": np.array(data.num_episodes)}
    for key in data.hf_dataset.column_names:
        found[f"column/{key}"] = np.stack([np.asarray(value) for value in data.hf_dataset[:][key]])
    for row in rows:
        item = data[row]
        found |= {f"item/{row}/{key}": np.asarray(value) for key, value in item.items()}
    windows = LeRobotDataset("local/data", root=root, video_backend=backend(), delta_timestamps=deltas)
    for row in rows:
        item = windows[row]
        found |= {f"window/{row}/{key}": np.asarray(value) for key, value in item.items()}
    for name, stats in (data.meta.stats or {}).items():
        found |= {f"stats/{name}/{key}": np.asarray(value) for key, value in stats.items()}
    if data.meta.episodes is not None and "source" in getattr(data.meta.episodes, "column_names", []):
        found["sources"] = np.array(data.meta.episodes["source"])
        dreams = LeRobotDataset("local/data", root=root, episode_filter=lambda episode: episode["source"] == "dream")
        found["dreams"] = np.array(dreams.episodes)
    np.savez(out, **found)


def write(root: str, data: str, codec: str) -> None:
    """The episodes of an .npz file: `<i>/task`, `<i>/action`, `<i>/state`, `<i>/video/<key>`."""
    with np.load(data) as arrays:
        given = {name: arrays[name] for name in arrays.files}
    cameras = [name.partition("/video/")[2] for name in given if name.startswith("0/video/")]
    height, width = given[f"0/video/{cameras[0]}"].shape[1:3]
    features = {key: {"dtype": "video", "shape": (height, width, 3), "names": ["height", "width", "channels"]}
                for key in cameras}  # fmt: skip
    features["observation.state"] = {"dtype": "float32", "shape": given["0/state"].shape[1:], "names": None}
    features["action"] = {"dtype": "float32", "shape": given["0/action"].shape[1:], "names": None}
    made = LeRobotDataset.create("local/data", fps=int(given["fps"]), features=features, root=root, **encoder(codec))
    for i in range(int(given["episodes"])):
        for row in range(len(given[f"{i}/action"])):
            frame = {key: given[f"{i}/video/{key}"][row] for key in cameras}
            frame |= {"observation.state": given[f"{i}/state"][row], "action": given[f"{i}/action"][row]}
            made.add_frame(frame | {"task": str(given[f"{i}/task"])})
        made.save_episode(parallel_encoding=False)
    made.finalize()


def encoder(codec: str) -> dict:
    """How a release of lerobot is told its codec: its default is AV1."""
    if codec == "av1":
        return {}
    from lerobot.configs import RGBEncoderConfig

    return {"rgb_encoder": RGBEncoderConfig(vcodec="h264")}


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        do = {"read": read, "write": write}[job.pop("do")]
        try:
            do(**job)
        except Exception:
            Path(job.get("out", job["root"]) + ".error").write_text(traceback.format_exc())
    print(json.dumps({"lerobot": getattr(lerobot, "__version__", "?"), "format": CODEBASE_VERSION,
                      "decoder": backend(), "torch": torch.__version__}))  # fmt: skip


if __name__ == "__main__":
    main()
