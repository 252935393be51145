"""The same inverse dynamics weights under our rule and under the published one, on recorded video held out.

The published script differs in three ways, each of which is also measured alone:

order   frame features are collected with `as_completed` and then indexed as if they were in order
clock   frames of a window stand half as far apart as in training, yet the whole chunk is written: for our weights,
        windows of consecutive rows (20 Hz) under a model of 10 Hz video; 8-frame windows written as 16 steps
mean    overlapping chunks are averaged plainly, and nothing ties them to the positions seen in the frames

    python benchmarks/label_rule.py [--labeler runs/demo/labeler] [--dataset runs/demo/heldout]

All rows are computed in the labeler's precision. Prints a table; the last line is JSON. Intervals are 95%: bootstrap
over episodes, Wilson for replays.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from dreamgen.core.clip import Clip, Labels  # noqa: E402
from dreamgen.core.clock import Clock  # noqa: E402
from dreamgen.core.intervals import success_interval  # noqa: E402
from dreamgen.core.seeding import rng_for, torch_rng_for  # noqa: E402
from dreamgen.data.lerobot import Dataset  # noqa: E402
from dreamgen.data.recordings import recorded_clip  # noqa: E402
from dreamgen.engine.precision import autocast, resolve  # noqa: E402
from dreamgen.sims.rollout import replay  # noqa: E402
from dreamgen.stages.evaluate_labels import held  # noqa: E402
from dreamgen.stages.label_scores import lag, r2  # noqa: E402
from idm.merge import Windows, merge  # noqa: E402
from idm.model import FlowIDM  # noqa: E402
from idm.vision import with_motion  # noqa: E402


def as_they_complete(model: FlowIDM, frames: torch.Tensor, workers: int = 8) -> tuple[torch.Tensor, int]:
    """Tokens (c l width) of frames (c 9 h w) in order of completion, as the published loop collects them, and how many
    stand in another frame's place."""

    def encode(index: int) -> tuple[int, torch.Tensor]:
        with torch.no_grad(), autocast(model.precision):  # both are a thread's own
            return index, model.vision(frames[index : index + 1]).float()[0]

    with ThreadPoolExecutor(workers) as pool:
        done = [future.result() for future in as_completed([pool.submit(encode, i) for i in range(len(frames))])]
    return torch.stack([tokens for _, tokens in done]), sum(place != index for place, (index, _) in enumerate(done))


def written(chunks: np.ndarray, clock: Clock, model: FlowIDM) -> Labels:
    """Chunks (n k h a) of windows that begin at every frame of `clock`, each written whole from its first row on and
    averaged over (rows, a)."""
    n, k, h, _ = chunks.shape
    steps = clock.rows[:k, None] + np.arange(h)
    mask = steps < clock.steps
    windows = Windows(np.zeros((k, 2), np.int64), np.minimum(steps, clock.steps - 1), mask, clock.steps)
    return merge(chunks, windows, model.robot, "mean")


@torch.no_grad()
def under(model: FlowIDM, clip: Clip, *, order: bool, clock: bool) -> tuple[Labels, int]:
    """Labels of one clip under the plain mean, with the faults that are named; and the number of misplaced frames.

    With `clock` the clip is sampled twice as often as the model was trained for.
    """
    model.eval()
    video = torch.from_numpy(clip.video).float().div(127.5).sub(1).permute(0, 3, 1, 2)[None]
    frames, spacing = with_motion(video)[0], float(model.clock.stride)
    windows = model._windows(spacing, len(clip.video))  # the model is told the spacing that it was trained for
    k, h = windows.mask.shape
    noise = torch.randn((k, model.samples, h, model.robot.action_dim),
                        generator=torch_rng_for(model.seed, "label", clip.id))  # fmt: skip
    x, mask = noise, torch.from_numpy(windows.mask)
    with autocast(model.precision):
        tokens, misplaced = as_they_complete(model, frames) if order else (model.vision(frames).float(), 0)
        conditions = model._conditions(tokens[None], windows, spacing)
        for step in range(model.flow_steps):
            t = torch.full(x.shape[:2], step / model.flow_steps)
            x = x + model._velocity(x, t, conditions, mask) / model.flow_steps
    chunks = model.head.action.denormalise(x).float().numpy().swapaxes(0, 1)
    if clock:
        return written(chunks, model.clock_of(clip), model), misplaced
    return merge(chunks, windows, model.robot, "mean"), misplaced


def bootstrap(measure: Callable[[np.ndarray, np.ndarray], float], predicted: Sequence, true: Sequence, seed: int = 0,
              draws: int = 1000) -> list[float]:  # fmt: skip
    """A figure over all episodes and its 95% interval: [value, low, high]."""
    rng, every = rng_for(seed, "bootstrap"), np.arange(len(true))
    drawn = [every, *(rng.choice(every, len(every)) for _ in range(draws))]
    found = [measure(np.concatenate([predicted[i] for i in d]), np.concatenate([true[i] for i in d])) for d in drawn]
    return [float(found[0]), *map(float, np.percentile(found[1:], [2.5, 97.5]))]


def scores(model: FlowIDM, labels: Sequence[Labels], actions: Sequence[np.ndarray]) -> dict:
    """MAE, R2, amplitude and lag of the first part that is not binary, and the accuracy of the binary ones."""
    part = next(p for p in model.robot.action if p.kind != "binary")
    p, t = [label.value[:, part.slice] for label in labels], [a[:, part.slice] for a in actions]
    found = {
        "mae": bootstrap(lambda a, b: np.abs(a - b).mean(), p, t),
        "r2": bootstrap(r2, p, t),
        "amplitude": bootstrap(lambda a, b: float(np.sqrt((a**2).mean() / (b**2).mean())), p, t),
        "lag": lag(p, t),
    }
    for binary in (q for q in model.robot.action if q.kind == "binary"):
        b = [label.value[:, binary.slice] for label in labels], [a[:, binary.slice] for a in actions]
        found[f"accuracy_{binary.name}"] = bootstrap(lambda x, y: float((x == y).mean()), *b)
    return found


def replayed(dataset: Dataset, actions: Sequence[np.ndarray], settle: int) -> dict:
    """Successes in the simulator from each episode's own first state, with the Wilson interval."""
    from dreamgen.sims.tabletop.sim import Tabletop

    sim, won = Tabletop(robot=dataset.robot), 0
    for i, action in enumerate(actions):
        episode = dataset.episode(i)
        won += replay(sim, episode.instruction, int(episode.meta["seed"]), held(action, dataset.robot, settle))
    sim.close()
    return success_interval(won, len(actions))


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--labeler", default="runs/demo/labeler", type=Path)
    words.add_argument("--dataset", default="runs/demo/heldout", type=Path)
    words.add_argument("--episodes", default=None, type=int)
    words.add_argument("--settle", default=6, type=int, help="steps of holding still after the labels")
    words.add_argument("--threads", default=1, type=int)
    given = words.parse_args()
    if not (given.labeler / "model.safetensors").is_file():
        sys.exit(f"error: {given.labeler} holds no trained labeler; train one (python -m jobs.pipeline "
                 f"experiment=demo), or name its folder with --labeler")  # fmt: skip
    torch.set_num_threads(given.threads)
    model = FlowIDM.load(given.labeler)
    dataset = Dataset(given.dataset, model.robot)
    chosen = range(min(len(dataset), given.episodes or len(dataset)))
    double = model.clock.stride / 2
    if double.denominator != 1:
        sys.exit(f"error: a frame gap of {given.labeler} spans {model.clock.stride} robot steps; half of it must be a "
                 f"whole number")  # fmt: skip
    fast = type(model.clock)(robot_hz=model.clock.robot_hz, video_hz=str(model.robot.rate / double), frames=2)
    ours, actions = zip(*(recorded_clip(dataset, i, model.clock) for i in chosen), strict=True)
    dense = [recorded_clip(dataset, i, fast)[0] for i in chosen]
    actions = [a[: model.clock_of(d).steps] for a, d in zip(actions, dense, strict=True)]
    rows, misplaced = {"recorded": list(map(lambda a: Labels(value=a, spread=a * 0), actions))}, {}
    rows["ours"] = model.label(list(ours))
    for name, order, clock in (("mean", False, False), ("order", True, False), ("clock", False, True),
                               ("published", True, True)):  # fmt: skip
        clips = dense if clock else ours
        rows[name], wrong = zip(*(under(model, clip, order=order, clock=clock) for clip in clips), strict=True)
        if order:
            misplaced[name] = [sum(wrong), sum(len(clip.video) for clip in clips)]
    can_replay = all("seed" in dataset.episode(i).meta for i in chosen)
    found = {}
    head = f"{'rule':<10} {'MAE':>22} {'R2':>24} {'amplitude':>22} {'lag':>4} {'replayed':>26}"
    print(f"{given.labeler} on {len(actions)} episodes of {given.dataset}\n{head}")
    for name, labels in rows.items():
        labels = [Labels(value=x.value[: len(a)], spread=x.spread[: len(a)])
                  for x, a in zip(labels, actions, strict=True)]  # fmt: skip
        s = scores(model, labels, actions)
        s["replay"] = replayed(dataset, [x.value for x in labels], given.settle) if can_replay else None
        found[name] = s
        cells = [f"{v[0]:6.3f} [{v[1]:6.3f}, {v[2]:6.3f}]" for v in (s["mae"], s["r2"], s["amplitude"])]
        shown = s["replay"] and f"{s['replay']['successes']}/{s['replay']['n']} [{s['replay']['low']:.2f}, " \
                                f"{s['replay']['high']:.2f}]"  # fmt: skip
        print(f"{name:<10} {cells[0]:>22} {cells[1]:>24} {cells[2]:>22} {s['lag']!s:>4} {shown or '-':>26}", flush=True)
    for name, (wrong, every) in misplaced.items():
        print(f"{name}: {wrong} of {every} frames stand in another frame's place")
    print(json.dumps({"name": "label_rule", "ratio": found["published"]["mae"][0] / found["ours"]["mae"][0],
                      "ours": found["ours"], "peer": found["published"], "rules": found, "misplaced": misplaced,
                      "settings": {"labeler": str(given.labeler), "dataset": str(given.dataset),
                                   "episodes": len(actions), "settle": given.settle, "flow_steps": model.flow_steps,
                                   "samples": model.samples, "rule": model.rule, "correct": model.correct,
                                   "precision": resolve(model.precision)},
                      "device": f"cpu, {given.threads} thread"}))  # fmt: skip


if __name__ == "__main__":
    main()
