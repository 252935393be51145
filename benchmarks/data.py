"""Writing and random reading of LeRobot datasets: ours against the lerobot package, the same episodes and files.

    python benchmarks/data.py [--episodes 200] [--size 64] [--windows 320] [--lerobot .venv-lerobot/bin/python]

Each side is this script in its own environment, kept open and asked in turn. Writer: episodes in memory to a finished
v3.0 dataset, at each side's defaults, and ours with lerobot's codec (AV1, g=2, crf 30, 4:2:0). Loader: windows of 17
frames at 10 Hz and 32 actions from random places, batches of 8 from a torch DataLoader, pictures decoded every time.
Processor time is told beside wall time, which says little on a busy machine. Before timing, both must give the same
actions and nearly the same pictures. The last line is JSON; its ratio is the writer's at the same codec.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve()
KEY, HZ, FRAMES, STRIDE, BATCH = "observation.images.front", 20, 17, 2, 8
ROWS = (FRAMES - 1) * STRIDE + 4  # of an episode
DELTAS = {KEY: [k * STRIDE / HZ for k in range(FRAMES)], "action": [k / HZ for k in range((FRAMES - 1) * STRIDE)]}


def episodes(count: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, str]]:
    """Video (rows h w 3), state, action, instruction: coloured squares that move over a smooth ground."""
    y, x = np.mgrid[:size, :size] / size
    for i in range(count):
        rng = np.random.default_rng(i)
        action = rng.uniform(-1, 1, (ROWS, 4)).astype(np.float32)
        state = np.cumsum(action * 0.03, 0).astype(np.float32)
        ground = (110 + 60 * np.stack([x, y, (x + y) / 2], -1)).astype(np.uint8)
        video = np.repeat(ground[None], ROWS, 0)
        for k in range(3):
            at = (0.2 + 0.6 * rng.random(2) + state[:, k : k + 2]) * size
            colour = rng.integers(0, 255, 3)
            for frame, (top, left) in zip(video, np.clip(at, 0, size - size // 6).astype(int), strict=True):
                frame[top : top + size // 6, left : left + size // 6] = colour
        yield video, state, action, f"push block {i % 3}"


class Ours:
    def __init__(self, size: int) -> None:
        sys.path.insert(0, str(HERE.parents[1]))
        from dreamgen.core.embodiment import Embodiment, Part, View

        view = View(name="front", key=KEY, height=size, width=size)
        state, action = (Part(name=n, start=0, stop=4) for n in ("pose", "move"))
        self.robot = Embodiment(name="bench", robot_hz=HZ, views=(view,), state=(state,), action=(action,))

    def write(self, root: str, made: list, codec: str) -> None:
        from dreamgen.core.clip import Episode
        from dreamgen.data.writer import write_dataset

        same = {"codec": "av1", "crf": 30, "gop": 2} if codec == "av1" else {}
        given = (Episode(instruction=text, state=state, action=action, video={"front": video})
                 for video, state, action, text in made)  # fmt: skip
        write_dataset(Path(root), given, self.robot, workers=os.cpu_count() or 1, **same)

    def windows(self, root: str, kept: bool = False):  # noqa: ANN201
        import torch

        from dreamgen.data.lerobot import Dataset
        from dreamgen.data.windows import Windows

        data = Dataset(root, self.robot, cache_mb=512 if kept else 0)
        spans = np.arange(FRAMES) * STRIDE
        places = Windows(data, int(spans[-1]) + 1)

        class Items(torch.utils.data.Dataset):
            def __getitem__(self, index: int) -> tuple:
                episode, row = places.at(index)
                actions = data.episode(episode).action[row : row + spans[-1]]
                return torch.from_numpy(data.canvas(episode, row + spans)), torch.from_numpy(actions)

            def __len__(self) -> int:
                return len(places)

        return Items()


class Peer:
    def __init__(self, size: int) -> None:
        self.size = size
        try:
            from torchcodec.decoders import VideoDecoder  # noqa: F401

            self.backend = "torchcodec"
        except Exception:  # what a missing system library raises depends on the release
            self.backend = "pyav"

    def write(self, root: str, made: list, codec: str) -> None:
        from lerobot.datasets.lerobot_dataset import LeRobotDataset

        numbers = {"dtype": "float32", "shape": (4,), "names": None}
        features = {KEY: {"dtype": "video", "shape": (self.size, self.size, 3),
                          "names": ["height", "width", "channels"]},
                    "observation.state": numbers, "action": numbers}  # fmt: skip
        options = {"streaming_encoding": True, "encoder_queue_maxsize": ROWS} if codec == "streaming" else {
            "image_writer_threads": 4}  # fmt: skip
        data = LeRobotDataset.create("local/bench", fps=HZ, features=features, root=root, **options)
        for video, state, action, text in made:
            for k in range(len(action)):
                data.add_frame({KEY: video[k], "observation.state": state[k], "action": action[k], "task": text})
            data.save_episode()
        data.finalize()

    def windows(self, root: str, kept: bool = False):  # noqa: ANN201
        import torch
        from lerobot.datasets.lerobot_dataset import LeRobotDataset

        data = LeRobotDataset("local/bench", root=root, delta_timestamps=DELTAS, video_backend=self.backend,
                              return_uint8=True)  # fmt: skip
        length = ROWS - (FRAMES - 1) * STRIDE

        class Items(torch.utils.data.Dataset):
            def __getitem__(self, index: int) -> tuple:
                item = data[index // length * ROWS + index % length]
                return item[KEY], item["action"]

            def __len__(self) -> int:
                return len(data) // ROWS * length

        return Items()


def spent() -> float:
    """Seconds of processor time of this process, all its threads, and its children that have ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in usage)


def load(items: object, order: list[int], workers: int) -> tuple[float, float]:
    """Seconds, and seconds of processor time, that a window of `order` costs but for the first batch of each worker.

    Processor time is that of all threads of this process: it tells the cost of a window with 0 workers alone.
    """
    import torch

    loader = torch.utils.data.DataLoader(items, batch_size=BATCH, sampler=order, num_workers=workers,
                                         prefetch_factor=2 if workers else None)  # fmt: skip
    warm, seen, start, used = max(workers, 1), 0, 0.0, 0.0
    for number, (frames, _) in enumerate(loader, 1):
        if number == warm:
            start, used = time.perf_counter(), spent()
        elif number > warm:
            seen += len(frames)
    return (time.perf_counter() - start) / seen, (spent() - used) / seen


def serve(side: str, size: int) -> None:
    """Answer one JSON request a line: {"do", ...} -> {"seconds", ...}."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    me = {"ours": Ours, "peer": Peer}[side](size)
    made: list = []
    for line in sys.stdin:
        ask = json.loads(line)
        if ask["do"] == "write":
            made = made if len(made) == ask["episodes"] else list(episodes(ask["episodes"], size))
            start, used = time.perf_counter(), spent()
            me.write(ask["root"], made, ask["codec"])
            answer = {"seconds": time.perf_counter() - start, "cpu": spent() - used}
        elif ask["do"] == "load":
            seconds, used = load(me.windows(ask["root"], ask["kept"]), ask["order"], ask["workers"])
            answer = {"seconds": seconds, "cpu": used}
        else:
            frames, actions = me.windows(ask["root"])[ask["item"]]
            frames = frames if frames.shape[-1] == 3 else frames.permute(0, 2, 3, 1)
            answer = {"frames": frames.numpy().tolist(), "actions": actions.numpy().tolist()}
        peak = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        answers.write(json.dumps(answer | {"peak_mb": round(max(peak)), "decoder": getattr(me, "backend", "decord")})
                      + "\n")  # fmt: skip
        answers.flush()


class Side:
    """One of the two processes."""

    def __init__(self, python: str, name: str, size: int, home: Path) -> None:
        quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(home),
                 "SVT_LOG": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}  # fmt: skip
        self.process = subprocess.Popen([python, str(HERE), "--serve", name, "--size", str(size)], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                        env=os.environ | quiet)  # fmt: skip

    def ask(self, **request: object) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args} ended while it was asked to {request['do']}")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--windows", type=int, default=320)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lerobot", default=str(HERE.parents[1] / ".venv-lerobot/bin/python"))
    parser.add_argument("--serve", choices=("ours", "peer"))
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.size)
    if not Path(args.lerobot).is_file():
        raise SystemExit(f"{args.lerobot} is not there; `make test-lerobot` builds it")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sides = {name: Side(python, name, args.size, root / "hub")
                 for name, python in (("ours", sys.executable), ("peer", args.lerobot))}  # fmt: skip
        try:
            measure(sides, root, args)
        finally:
            for side in sides.values():
                side.close()


def measure(sides: dict[str, Side], root: Path, args: argparse.Namespace) -> None:
    writers = {"ours": ("ours", "h264"), "ours, AV1 as lerobot": ("ours", "av1"), "lerobot": ("peer", "av1"),
               "lerobot, streaming": ("peer", "streaming")}  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in writers}
    cost: dict[str, list[float]] = {name: [] for name in writers}
    peak, told = {"ours": 0, "peer": 0}, {}
    for number in range(args.rounds + 1):  # the first, small one warms
        count = args.episodes if number else min(args.episodes, 4)
        for name, (side, codec) in writers.items():
            path = root / name.replace(" ", "_").replace(",", "")
            shutil.rmtree(path, ignore_errors=True)
            told = sides[side].ask(do="write", root=str(path), episodes=count, codec=codec)
            peak[side] = max(peak[side], told["peak_mb"])
            if number:
                times[name].append(told["seconds"] / count)
                cost[name].append(told["cpu"] / count)
    files = {"ours": root / "ours", "lerobot": root / "lerobot"}
    bytes_of = {name: sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) for name, path in files.items()}
    order = np.random.default_rng(0).permutation(args.episodes * (ROWS - (FRAMES - 1) * STRIDE)).tolist()
    for name, path in files.items():
        mine, theirs = (sides[side].ask(do="item", root=str(path), item=order[0]) for side in ("ours", "peer"))
        far = np.abs(np.array(mine["frames"], float) - np.array(theirs["frames"], float)).mean()
        if not np.allclose(mine["actions"], theirs["actions"]) or far > 3:
            raise SystemExit(f"the two sides differ on {name}'s files: pictures by {far:.2f} levels")
    order = (order * (args.windows // len(order) + 1))[: args.windows]
    loads: dict[tuple, list[float]] = {}
    spans: dict[str, list[float]] = {}
    decoder = ""
    for _ in range(args.rounds):
        for name, path in files.items():
            for workers in (0, *args.workers):
                for side, kept in (("ours", False), ("peer", False), ("ours", True)):
                    told = sides[side].ask(do="load", root=str(path), order=order, workers=workers, kept=kept)
                    loads.setdefault((name, workers, side, kept), []).append(told["seconds"])
                    if not workers and not kept:
                        spans.setdefault(f"{name}'s files, {side}", []).append(told["cpu"])
                    decoder = told["decoder"] if side == "peer" else decoder
                    peak[side] = max(peak[side], told["peak_mb"])
    cpu = {name: 1000 * float(np.median(values)) for name, values in (*cost.items(), *spans.items())}
    report(writers, times, loads, cpu, bytes_of, peak, decoder, args)


def report(writers: dict, times: dict, loads: dict, cpu: dict, bytes_of: dict, peak: dict, decoder: str,
           args: argparse.Namespace) -> None:  # fmt: skip
    rate = {name: 1 / float(np.median(seconds)) for name, seconds in times.items()}
    raw = ROWS * args.size**2 * 3 / 2**20
    print(f"writer, {args.episodes} episodes of {ROWS} frames of {args.size} pixels ({raw:.1f} MB raw each)")
    for name in writers:
        print(f"  {name:<22}{rate[name]:>8.2f} episodes/s{cpu[name]:>9.1f} ms of processor an episode")
    best = max(rate["lerobot"], rate["lerobot, streaming"])
    ratios = {"writer, same codec": rate["ours, AV1 as lerobot"] / rate["lerobot"],
              "writer, each side's defaults": rate["ours"] / rate["lerobot"],
              "writer, defaults, lerobot streaming": rate["ours"] / best}  # fmt: skip
    print(f"loader, windows of {FRAMES} frames over {(FRAMES - 1) * STRIDE + 1}, lerobot decodes by {decoder}")
    speeds = {}
    for name in ("ours", "lerobot"):
        print(f"  files of {name} ({bytes_of[name] / 2**20:.1f} MB)" + "".join(f"{w:>9} w" for w in args.workers))
        for side, kept in (("ours", False), ("peer", False), ("ours", True)):
            row = [1 / float(np.median(loads[name, workers, side, kept])) for workers in args.workers]
            label = {"ours": "ours", "peer": "lerobot"}[side] + (", kept in memory" if kept else "")
            print(f"    {label:<28}" + "".join(f"{speed:>9.1f}  " for speed in row))
            speeds[f"{name}'s files, {label}"] = dict(zip(map(str, args.workers), row, strict=True))
        ratios |= {f"loader, {name}'s files, {w} workers": float(np.median(loads[name, w, "peer", False]))
                   / float(np.median(loads[name, w, "ours", False])) for w in args.workers}  # fmt: skip
    for name in ("ours", "lerobot"):
        pair = [cpu[f"{name}'s files, {side}"] for side in ("ours", "peer")]
        print(f"  processor time of a window, {name}'s files: ours {pair[0]:.2f} ms, lerobot {pair[1]:.2f} ms")
        ratios[f"loader, {name}'s files, processor time"] = pair[1] / pair[0]
    ratios["writer, same codec, processor time"] = cpu["lerobot"] / cpu["ours, AV1 as lerobot"]
    ratios["writer, each side's defaults, processor time"] = cpu["lerobot"] / cpu["ours"]
    for name, ratio in ratios.items():
        print(f"  {name:<44}{ratio:>7.2f}x")
    print(f"peak memory: ours {peak['ours']} MB, lerobot {peak['peer']} MB")
    settings = {"episodes": args.episodes, "rows": ROWS, "size": args.size, "windows": args.windows,
                "rounds": args.rounds, "workers": args.workers, "lerobot decoder": decoder}  # fmt: skip
    print(json.dumps({
        "name": "data", "ratio": ratios["writer, same codec"], "ratios": ratios,
        "ours": {"writer": rate["ours, AV1 as lerobot"], "writer, defaults": rate["ours"]},
        "peer": {"writer": rate["lerobot"], "writer, streaming": rate["lerobot, streaming"]}, "loader": speeds,
        "processor_ms": cpu, "peak_mb": peak, "settings": settings, "device": f"{os.cpu_count()} CPU cores",
    }))  # fmt: skip


if __name__ == "__main__":
    main()
