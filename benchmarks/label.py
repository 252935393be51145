"""Speed of labelling against the published way, on the same weights and from the same noise.

published   one clip at a time; the frames of every window are encoded for that window; keys and values of the frames
            are computed again at every denoising step; 16 Euler steps, one sample, fp32
ours        clips in batches; every frame encoded once; keys and values once, outside the denoising loop
as shipped  the same under the labeler's own precision, steps and samples

`ours` runs under the settings of `published`, so their labels must be equal; `as shipped` changes them, and says by
how much. Rounds are interleaved; the least time of each counts.

    python benchmarks/label.py [--labeler runs/demo/labeler] [--dataset runs/demo/heldout]

Without a trained labeler the weights are random, which changes no timing. The last line is JSON.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from dreamgen.core.clip import Clip, Labels  # noqa: E402
from dreamgen.core.clock import Clock  # noqa: E402
from dreamgen.core.embodiment import Embodiment, Part, View  # noqa: E402
from dreamgen.core.seeding import rng_for, torch_rng_for  # noqa: E402
from idm.merge import Windows, merge  # noqa: E402
from idm.model import FlowIDM  # noqa: E402
from idm.vision import with_motion  # noqa: E402


@torch.no_grad()
def published(model: FlowIDM, clips: list[Clip]) -> list[Labels]:
    """The published way: nothing is shared between windows, steps or clips."""
    labels = []
    for clip in clips:
        clock = model.clock_of(clip)
        windows, one = Windows.of(clock, model.frames), Windows.of(clock.with_frames(model.frames), model.frames)
        k, h = windows.mask.shape
        noise = torch.randn((k, model.samples, h, model.robot.action_dim),
                            generator=torch_rng_for(model.seed, "label", clip.id))  # fmt: skip
        frames = with_motion(torch.from_numpy(clip.video).float().div(127.5).sub(1).permute(0, 3, 1, 2)[None])[0]
        seen = torch.stack([frames[i : i + model.frames] for i in range(k)])  # the frames of every window anew
        tokens = model.vision(seen.flatten(0, 1)).unflatten(0, (k, model.frames)).float()
        spacing, mask = float(clock.stride), torch.from_numpy(windows.mask)
        x = noise
        for step in range(model.flow_steps):
            t = torch.full(x.shape[:2], step / model.flow_steps)
            x = x + model._velocity(x, t, model._conditions(tokens, one, spacing), mask) / model.flow_steps
        chunks = model.head.action.denormalise(x).numpy().swapaxes(0, 1)
        read = model.head.state.denormalise(model.head.read_state(model.vision(frames)[:, 0].float())).numpy()
        labels.append(model.head.corrected(merge(chunks, windows, model.robot, model.rule), read, clock, model.correct))
    return labels


def random_labeler() -> FlowIDM:
    """The default architecture with random weights, on a robot of one 64 x 64 camera."""
    robot = Embodiment(name="random", robot_hz="20", views=(View(name="front", key="front", height=64, width=64),),
                       action=(Part(name="move", start=0, stop=3, kind="delta"), Part(name="grip", start=3, stop=4)),
                       state=(Part(name="hand", start=0, stop=4),))  # fmt: skip
    return FlowIDM(robot=robot, clock=Clock(robot_hz="20", video_hz="10", frames=17)).eval()


def clips_of(model: FlowIDM, dataset: Path, count: int) -> list[Clip]:
    """Clips of the labeler's own length: recorded ones where the dataset is there, noise otherwise."""
    if (dataset / "meta" / "info.json").is_file() and model.path is not None:
        from dreamgen.data.lerobot import Dataset

        data = Dataset(dataset, model.robot)
        return [Clip(id=f"clip_{i}", video=data.canvas(i, model.clock.rows), video_hz=model.clock.video_hz,
                     instruction="") for i in range(min(count, len(data)))]  # fmt: skip
    shape = (model.clock.frames, *model.robot.canvas, 3)
    return [Clip(id=f"clip_{i}", video=rng_for(0, "clip", i).integers(0, 256, shape, dtype=np.uint8),
                 video_hz=model.clock.video_hz, instruction="") for i in range(count)]  # fmt: skip


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--labeler", default="runs/demo/labeler", type=Path)
    words.add_argument("--dataset", default="runs/demo/heldout", type=Path)
    words.add_argument("--clips", default=16, type=int)
    words.add_argument("--rounds", default=3, type=int)
    words.add_argument("--threads", default=1, type=int)
    given = words.parse_args()
    torch.set_num_threads(given.threads)
    trained = (given.labeler / "model.safetensors").is_file()
    model = FlowIDM.load(given.labeler) if trained else random_labeler()
    clips = clips_of(model, given.dataset, given.clips)
    own = {"flow_steps": model.flow_steps, "samples": model.samples, "precision": model.precision}
    same = {"flow_steps": 16, "samples": 1, "precision": "fp32"}

    def under(settings: dict, way: Callable[[list[Clip]], list[Labels]]) -> Callable[[], tuple[np.ndarray, float]]:
        def run() -> tuple[np.ndarray, float]:
            vars(model).update(settings)
            # processor time: on a busy machine the clock on the wall measures the neighbours
            begun = time.process_time()
            labels = way(clips)
            return np.concatenate([label.value for label in labels]), time.process_time() - begun

        return run

    ways = {"published": under(same, lambda c: published(model, c)), "ours": under(same, model.label),
            "as shipped": under(own, model.label)}  # fmt: skip
    found, seconds = {name: run()[0] for name, run in ways.items()}, {name: [] for name in ways}  # also warms up
    parts = [p.slice for p in model.robot.action if p.kind != "binary"]

    def apart(name: str) -> float:
        return max(float(np.abs(found[name][:, p] - found["published"][:, p]).max()) for p in parts)

    if apart("ours") > 1e-3:
        sys.exit(f"error: the labels differ by {apart('ours'):.2g} under equal settings; expected less than 0.001")
    for _ in range(given.rounds):
        for name, run in ways.items():
            seconds[name].append(run()[1])
    best = {name: min(times) for name, times in seconds.items()}
    print(f"{'way':<12} {'ms a clip':>10} {'ratio':>7} {'max difference':>15}")
    for name, time_taken in best.items():
        print(f"{name:<12} {1e3 * time_taken / len(clips):10.1f} {best['published'] / time_taken:7.2f} "
              f"{apart(name):15.2g}")  # fmt: skip
    frames, windows = model.clock.frames, model.clock.frames - model.frames + 1
    print(f"encodings a clip: {windows * model.frames} published, {frames} ours; peak "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")  # fmt: skip
    print(json.dumps({"name": "label", "ratio": best["published"] / best["ours"],
                      "ratio_as_shipped": best["published"] / best["as shipped"],
                      "ours": best["ours"] / len(clips), "peer": best["published"] / len(clips),
                      "as_shipped": best["as shipped"] / len(clips),
                      "max_difference": {"equal_settings": apart("ours"), "as_shipped": apart("as shipped")},
                      "settings": {"trained": trained, "clips": len(clips), "frames": frames, "window": model.frames,
                                   "equal": same, "shipped": own, "clock": "processor seconds", "rounds": given.rounds},
                      "device": f"cpu, {given.threads} thread"}))  # fmt: skip


if __name__ == "__main__":
    main()
