"""Speed of labelling against the published way, on the same weights and from the same noise.

published   one clip at a time; each window's frames are encoded for that window alone, though its neighbours hold all
            but one of them; keys and values of the frames are computed again at every denoising step; 16 Euler steps,
            one sample, fp32; plain mean, no correction of drift
ours        clips in batches; every frame encoded once; keys and values once, outside the denoising loop
as shipped  the same under the labeler's own precision, steps, samples, merge rule and correction

`ours` runs under the settings of `published`, so their labels must be equal; `as shipped` changes them, and says by
how much. Rounds are interleaved; the least time of each counts. All runs twice: on the labeler's weights, whose windows
have five frames by default, so that the published way takes five encodings a window; and on an untrained labeler that
differs in its windows alone, of two frames as the published ones, which takes two.

    python benchmarks/label.py [--labeler runs/demo/labeler] [--dataset runs/demo/heldout]

Without a trained labeler the weights are random, which changes no timing. It runs on the accelerator, if there is one.
The last line is JSON.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from dreamgen.core.clip import Clip, Labels  # noqa: E402
from dreamgen.core.clock import Clock  # noqa: E402
from dreamgen.core.embodiment import Embodiment, Part, View  # noqa: E402
from dreamgen.core.seeding import rng_for, torch_rng_for  # noqa: E402
from dreamgen.engine.precision import best_device  # noqa: E402
from idm.clips import pictures, stacked  # noqa: E402
from idm.merge import Windows, merge  # noqa: E402
from idm.model import FlowIDM  # noqa: E402
from idm.vision import with_motion  # noqa: E402

SAME = {"flow_steps": 16, "samples": 1, "precision": "fp32", "rule": "mean", "correct": 0.0}  # of the published way


@torch.no_grad()
def published(model: FlowIDM, clips: list[Clip]) -> list[Labels]:
    """The published way: nothing is shared between windows, steps or clips."""
    labels, device = [], next(model.parameters()).device
    for clip in clips:
        clock = model.clock_of(clip)
        windows, one = Windows.of(clock, model.frames), Windows.of(clock.with_frames(model.frames), model.frames)
        k, h = windows.mask.shape
        x = torch.randn((k, model.samples, h, model.robot.action_dim),
                        generator=torch_rng_for(model.seed, "label", clip.id)).to(device)  # fmt: skip
        frames = with_motion(pictures(stacked([clip], device)))[0]
        seen = torch.stack([frames[i : i + model.frames] for i in range(k)])  # the frames of every window anew
        tokens = model.vision(seen.flatten(0, 1)).unflatten(0, (k, model.frames)).float()
        spacing, mask = float(clock.stride), torch.from_numpy(windows.mask).to(device)
        for step in range(model.flow_steps):
            t = torch.full(x.shape[:2], step / model.flow_steps, device=device)
            x = x + model._velocity(x, t, model._conditions(tokens, one, spacing), mask) / model.flow_steps
        chunks = model.head.action.denormalise(x).cpu().numpy().swapaxes(0, 1)
        unread = np.zeros((clock.frames, model.robot.state_dim), np.float32)
        labels.append(model.head.corrected(merge(chunks, windows, model.robot, model.rule), unread, clock, 0.0))
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


def two_frames(model: FlowIDM) -> FlowIDM:
    """An untrained labeler that differs from `model` in its windows alone: of two frames, as published."""
    return FlowIDM(robot=model.robot, **{**model.config, "clock": model.clock, "frames": 2}).eval()


def now(device: torch.device) -> float:
    """Seconds: of the processor, as on a busy machine the clock on the wall measures the neighbours; the wall's once a
    GPU is done."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def compare(model: FlowIDM, clips: list[Clip], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """By way: the least seconds for all clips, and the largest difference of a label from the published one."""
    device = next(model.parameters()).device
    own = {key: getattr(model, key) for key in SAME}
    ways = {"published": (SAME, lambda clips: published(model, clips)), "ours": (SAME, model.label),
            "as shipped": (own, model.label)}  # fmt: skip
    found, seconds = {}, {name: [] for name in ways}
    for turn in range(rounds + 1):  # the first warms up
        for name, (settings, way) in ways.items():
            vars(model).update(settings)
            begun = now(device)
            labels = way(clips)
            seconds[name] += [now(device) - begun] if turn else []
            found[name] = np.concatenate([label.value for label in labels])
    parts = [p.slice for p in model.robot.action if p.kind != "binary"]
    apart = {name: max(float(np.abs(label[:, p] - found["published"][:, p]).max()) for p in parts)
             for name, label in found.items()}  # fmt: skip
    if apart["ours"] > 1e-3:
        sys.exit(f"error: the labels differ by {apart['ours']:.2g} under equal settings; expected less than 0.001")
    best = {name: min(times) for name, times in seconds.items()}
    print(f"windows of {model.frames} frames\n{'way':<12} {'ms a clip':>10} {'ratio':>7} {'max difference':>15}")
    for name, taken in best.items():
        print(f"{name:<12} {1e3 * taken / len(clips):10.1f} {best['published'] / taken:7.2f} {apart[name]:15.2g}")
    frames = model.clock.frames
    print(f"encodings a clip: {(frames - model.frames + 1) * model.frames} published, {frames} ours")
    return best, apart


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--labeler", default="runs/demo/labeler", type=Path)
    words.add_argument("--dataset", default="runs/demo/heldout", type=Path)
    words.add_argument("--clips", default=16, type=int)
    words.add_argument("--rounds", default=3, type=int)
    words.add_argument("--threads", default=1, type=int)
    given = words.parse_args()
    torch.set_num_threads(given.threads)
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    device = best_device()
    trained = (given.labeler / "model.safetensors").is_file()
    model = (FlowIDM.load(given.labeler) if trained else random_labeler()).place()
    clips = clips_of(model, given.dataset, given.clips)
    shipped = {key: getattr(model, key) for key in SAME}
    best, apart = compare(model, clips, given.rounds)
    pair, _ = compare(two_frames(model).place(), clips, given.rounds)
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")
    print(json.dumps({"name": "label", "ratio": best["published"] / best["ours"],
                      "ratio_as_shipped": best["published"] / best["as shipped"],
                      "ratio_two_frames": pair["published"] / pair["ours"],
                      "ours": best["ours"] / len(clips), "peer": best["published"] / len(clips),
                      "as_shipped": best["as shipped"] / len(clips),
                      "max_difference": {"equal_settings": apart["ours"], "as_shipped": apart["as shipped"]},
                      "settings": {"trained": trained, "clips": len(clips), "frames": model.clock.frames,
                                   "window": model.frames, "equal": SAME, "shipped": shipped, "rounds": given.rounds,
                                   "clock": f"{'processor' if device.type == 'cpu' else 'wall'} seconds"},
                      "device": f"cpu, {given.threads} thread" if device.type == "cpu"
                      else torch.cuda.get_device_name(0)}))  # fmt: skip


if __name__ == "__main__":
    main()
