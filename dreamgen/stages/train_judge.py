"""Video of successes and failures -> a calibrated judge of success, saved in `out` itself.

Episodes are split three ways: to train on, to calibrate on and choose the threshold by, and to measure on. So the true
positive and negative rates that correct success rates later were seen by nothing that was fitted.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dreamgen.core.clip import Clip
from dreamgen.core.clock import Clock
from dreamgen.core.manifest import Stage, read_json, write_json
from dreamgen.core.protocols import Sim
from dreamgen.core.seeding import rng_for, seed_for
from dreamgen.data.lerobot import Dataset
from dreamgen.data.recordings import recorded_clip
from dreamgen.engine.train import clear_state, train
from dreamgen.filters.rates import Rates, threshold_for
from dreamgen.stages.agreement import auroc_interval, calibration
from dreamgen.stages.candidates import Candidates
from dreamgen.stages.evaluate_filters import replayed
from dreamgen.stages.train_labeler import through

YES, NO = ("1", "true", "yes", "success"), ("0", "false", "no", "failure")


def train_judge(
    judge: Callable[..., nn.Module],
    datasets: Sequence[Dataset],
    *,
    out: Path,
    labels: Path | None = None,
    dreams: Dataset | None = None,
    dream_clips: Path | None = None,
    sim: Callable[[], Sim] | None = None,
    settle: int = 6,
    video_hz: str = "10",
    held_out_share: float = 0.3,
    least_precision: float = 0.9,
    swapped: float = 0.25,
    shift: int = 2,
    world_model: Any = None,
    degraded: float = 0.5,
    degraded_clips: int = 128,
    steps: int = 400,
    batch_size: int = 32,
    lr: float = 1e-3,
    muon_lr: float | None = None,
    warmup: int = 30,
    weight_decay: float = 0.05,
    betas: Sequence[float] = (0.9, 0.99),
    clip: float = 1.0,
    ema: float | None = 0.99,
    precision: str = "auto",
    replicas: int = 1,
    checkpoint_every: int = 200,
    log_every: int = 20,
    seed: int = 0,
    record: dict,
) -> dict:
    """Train `judge(instructions=...)` on the episodes of `datasets`, whose meta says `success` (or `labels` does).

    labels: a CSV or JSON file of rows {episode_index, success} for a single dataset. dreams: labelled dreams, judged
    at the end and replayed in `sim` for the rates on dreamt video; dream_clips: the stage that dreamed them.
    video_hz: rate at which clips are seen. held_out_share: of episodes; half of them calibrates, half measures.
    least_precision: the threshold is the lowest whose yes is right so often on the calibrating half.
    swapped: share of a batch that shows a success under another instruction, which is a failure. shift: pixels by which
    training clips move. world_model: whose autoencoder a training clip passes with probability `degraded`, as dreams do
    (`degraded_clips` pass once, before training).

    Results: held_out {auroc, low, high, n, positives, brier, ece, tpr, tnr, precision}, decoded the same of some of
    these clips as the world model's autoencoder returns them, dreamt the same of dreams, threshold.
    Raises ValueError for episodes without success, too few of one outcome, a dataset of another robot, bad labels.
    """
    parents = {f"dataset_{k}": dataset.root for k, dataset in enumerate(datasets)}
    parents |= ({"labels": labels} if labels else {}) | ({"dreams": dreams.root} if dreams is not None else {})
    with Stage(out, "train_judge", config=record, parents=parents, seed=seed) as run:
        if run.complete:
            return run.manifest()
        clips = Recorded(datasets, outcomes(datasets, labels), video_hz)
        training, fitting, apart = three_ways(clips.success, held_out_share, seed)
        torch.manual_seed(seed_for(seed, "init"))
        model = judge(instructions=sorted({clips.instruction(k) for k in range(len(clips))}))
        for dataset in datasets:
            model.robot.require(dataset.robot.contract(), f"the dataset {dataset.root}")
        if world_model is not None and degraded:
            order = rng_for(seed, "degrade").permutation(training).tolist()
            clips.degrade(through(world_model), order[:degraded_clips])
        if model.state is not None:
            model.fit(np.concatenate([model.states(clips[k]) for k in clips.some(training, seed)]))
        if hasattr(model.encoder, "fit"):
            model.encoder.fit(torch.from_numpy(clips.sample(model, clips.some(training, seed))))
        batches = Batches(model, clips, training, batch_size=batch_size, swapped=swapped, shift=shift,
                          degraded=degraded, seed=seed)  # fmt: skip
        done = train(model, batches, out=out, steps=steps, lr=lr, muon_lr=muon_lr, warmup=warmup,
                     weight_decay=weight_decay, betas=betas, clip=clip, ema=ema, precision=precision,
                     replicas=replicas, seed=seed, checkpoint_every=checkpoint_every, log_every=log_every,
                     name="train_judge")  # fmt: skip
        model.slope, model.offset = platt(model.logits([clips[k] for k in fitting]), clips.success[fitting])
        model.threshold, reached = threshold_for(least_precision, model.judge([clips[k] for k in fitting]),
                                                 clips.success[fitting])  # fmt: skip
        scores = {"held_out": measured(model, "real", [clips[k] for k in apart], clips.success[apart], seed)}
        if world_model is not None:
            some = clips.some(apart, seed, degraded_clips)
            seen = [clips.decoded(k, through(world_model)) for k in some]
            scores["decoded"] = measured(model, "decoded", seen, clips.success[some], seed)
        if dreams is not None and sim is not None:
            known, success = dreamt(dreams, dream_clips, sim, settle, out)
            scores["dreamt"] = measured(model, "dreamt", known, success, seed)
        model.save(out)
        write_json(Path(out) / "scores.json", scores)
        clear_state(out)
        return run.finish(episodes=[len(training), len(fitting), len(apart)], successes=int(clips.success.sum()),
                          loss=done["loss"], threshold=model.threshold, threshold_precision=reached,
                          slope=model.slope, offset=model.offset, **scores)  # fmt: skip


class Recorded:
    """Recorded clips with their outcomes, decoded when asked for and kept up to `room` bytes; some also as an
    autoencoder returns them."""

    def __init__(self, datasets: Sequence[Dataset], success: Sequence[Mapping[int, bool]], video_hz: str,
                 room: int = 1 << 30) -> None:  # fmt: skip
        self.datasets, self.video_hz, self.room = datasets, video_hz, room
        self.places = [(d, i) for d, known in enumerate(success) for i in sorted(known)]
        self.success = np.array([success[d][i] for d, i in self.places], bool)
        self.returned, self.kept = dict[int, np.ndarray](), dict[int, Clip]()

    def __len__(self) -> int:
        return len(self.places)

    def instruction(self, k: int) -> str:
        d, i = self.places[k]
        return self.datasets[d].instruction(i)

    def __getitem__(self, k: int) -> Clip:
        if k in self.kept:
            return self.kept[k]
        d, i = self.places[k]
        dataset = self.datasets[d]
        clock = Clock(robot_hz=dataset.robot.robot_hz, video_hz=self.video_hz, frames=2)
        clip, action = recorded_clip(dataset, i, clock)
        clip = replace(clip, action=action)
        if clip.video.nbytes <= self.room:
            self.room -= clip.video.nbytes
            self.kept[k] = clip
        return clip

    def degrade(self, returned: Callable[[np.ndarray], np.ndarray], chosen: Sequence[int]) -> None:
        """Keep what an autoencoder returns of the clips `chosen`; it may take fewer frames than a clip has."""
        for k in chosen:
            self.returned[k] = self.decoded(k, returned).video

    def decoded(self, k: int, returned: Callable[[np.ndarray], np.ndarray]) -> Clip:
        """Clip k, up to the last frame that an autoencoder can end on, as it returns it."""
        clip = self[k]
        return replace(clip, video=returned(clip.video[: len(clip.video) - (len(clip.video) - 1) % 4]))

    def some(self, chosen: Sequence[int], seed: int, most: int = 200) -> list[int]:
        """Up to `most` of the clips `chosen`, to take statistics of."""
        return rng_for(seed, "sample").permutation(chosen)[:most].tolist()

    def sample(self, model: Any, chosen: Sequence[int]) -> np.ndarray:
        """Pictures (n v h w 3) that the judge looks at of the clips `chosen`, as returned if kept."""
        shown = (self.returned[k] if k in self.returned else self[k].video for k in chosen)
        return np.concatenate([model.pictures(video) for video in shown])


class Batches:
    """Step to batch: as many successes as failures, in random order; a share of the successes swapped to failures."""

    def __init__(self, model: Any, clips: Recorded, chosen: Sequence[int], *, batch_size: int, swapped: float,
                 shift: int, degraded: float, seed: int) -> None:  # fmt: skip
        self.model, self.clips, self.batch_size, self.seed = model, clips, batch_size, seed
        self.swapped, self.shift, self.degraded = swapped, shift, degraded
        self.kinds = [np.array([k for k in chosen if clips.success[k] == kind]) for kind in (True, False)]

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        rng = rng_for(self.seed, "batch", step)
        pictures, texts, success, states = [], [], [], []
        for row in rng.permutation(self.batch_size):
            swap = row < round(self.swapped * self.batch_size) and len(self.model.instructions) > 1
            right = swap or row % 2 == 0
            k = int(rng.choice(self.kinds[0 if right else 1]))
            text = self.clips.instruction(k)
            if swap:
                text = str(rng.choice([other for other in self.model.instructions if other != text]))
            use = k in self.clips.returned and rng.random() < self.degraded
            video = self.clips.returned[k] if use else self.clips[k].video
            chosen = jittered(len(video), self.model.frames, rng)
            pictures.append(moved(self.model.pictures(video, chosen), rng.integers(-self.shift, self.shift + 1, 2)))
            texts.append(text)
            success.append(right and not swap)
            if self.model.state is not None:  # sometimes unknown, so that it can do without
                states.append(self.model.states(self.clips[k], chosen) * (np.nan if rng.random() < 0.1 else 1))
        batch = {"pictures": torch.from_numpy(np.stack(pictures)), "words": self.model.encoder.words(texts),
                 "success": torch.tensor(success, dtype=torch.float32)}  # fmt: skip
        return batch | ({"states": torch.from_numpy(np.stack(states).astype(np.float32))} if states else {})


def jittered(frames: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` frame numbers in order: the first and the last, and one from each span between."""
    edges = np.linspace(0, frames - 1, count)
    inner = edges[1:-1] + rng.uniform(-0.5, 0.5, max(0, count - 2)) * (edges[1] - edges[0])
    return np.concatenate([[0], inner, [frames - 1]]).round().astype(np.int64)


def moved(pictures: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Pictures (t v h w 3) moved by `by` rows and columns; the edge repeats."""
    reach = int(np.abs(by).max())
    if not reach:
        return pictures
    h, w = pictures.shape[2:4]
    wide = np.pad(pictures, ((0, 0), (0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    top, left = reach + int(by[0]), reach + int(by[1])
    return wide[:, :, top : top + h, left : left + w]


def outcomes(datasets: Sequence[Dataset], labels: Path | None) -> list[dict[int, bool]]:
    """Per dataset the episodes whose outcome is known. ValueError if none is, or the file cannot be read as labels."""
    if labels is not None:
        if len(datasets) != 1:
            raise ValueError(f"labels {labels} name episodes of one dataset, got {len(datasets)} datasets")
        told = read_labels(labels)
        number = {datasets[0].index(i): i for i in range(len(datasets[0]))}
        if unknown := sorted(set(told) - set(number)):
            raise ValueError(f"{labels} labels the episodes {unknown[:5]}, which {datasets[0].root} does not have")
        return [{number[index]: success for index, success in told.items()}]
    found = [{i: bool(d.episode(i).meta["success"]) for i in range(len(d)) if "success" in d.episode(i).meta}
             for d in datasets]  # fmt: skip
    for dataset, known in zip(datasets, found, strict=True):
        if not known:
            raise ValueError(f"{dataset.root} does not say which episodes succeeded (meta `success`, as jobs.collect "
                             "writes it); give your own in stage.labels, a CSV or JSON")  # fmt: skip
    return found


def read_labels(path: Path) -> dict[int, bool]:
    """Episode number to success, from a CSV with these columns or a JSON list of such rows. ValueError names a row."""
    path = Path(path)
    if path.suffix == ".json":
        rows = read_json(path)
    elif path.is_file():
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    else:
        raise ValueError(f"labels {path} do not exist")
    found = {}
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        word = str(row.get("success", "")).strip().lower() if isinstance(row, dict) else ""
        index = str(row.get("episode_index", "")).strip() if isinstance(row, dict) else ""
        if word not in YES + NO or not index.isdigit():
            raise ValueError(f"row {number} of {path} is {row}; expected episode_index, a number, and success, one of "
                             f"{', '.join(YES + NO)}")  # fmt: skip
        found[int(index)] = word in YES
    return found


def three_ways(success: np.ndarray, share: float, seed: int) -> tuple[list[int], list[int], list[int]]:
    """Clips to train on, to calibrate on, to measure on, each outcome split alike. ValueError if one has too few."""
    parts: list[list[int]] = [[], [], []]
    for kind in (True, False):
        mine = rng_for(seed, "judge split", int(kind)).permutation(np.flatnonzero(success == kind))
        each = max(1, round(share * len(mine) / 2))
        if len(mine) < 3 or len(mine) <= 2 * each:
            raise ValueError(f"{len(mine)} of {len(success)} episodes are {'successes' if kind else 'failures'}; a "
                             f"judge needs at least 3 of each, to train, calibrate and measure on. Collect more with "
                             f"stage.source=play or stage.keep_failures=true.")  # fmt: skip
        for part, piece in zip(parts, (mine[2 * each :], mine[:each], mine[each : 2 * each]), strict=True):
            part += piece.tolist()
    return sorted(parts[0]), sorted(parts[1]), sorted(parts[2])


def platt(logits: np.ndarray, success: np.ndarray) -> tuple[float, float]:
    """Slope and offset of the most likely sigmoid (Platt 1999, with his soft targets); the slope is not negative."""
    from scipy.optimize import minimize

    n, m = int(success.sum()), int((~success).sum())
    target = np.where(success, (n + 1) / (n + 2), 1 / (m + 2))

    def loss(x: np.ndarray) -> float:
        z = x[0] * logits + x[1]
        return float(np.logaddexp(0, z).sum() - (target * z).sum())

    slope, offset = minimize(loss, (1.0, 0.0), bounds=((1e-3, None), (None, None)), method="L-BFGS-B").x
    return float(slope), float(offset)


def measured(model: Any, name: str, clips: Sequence[Clip], success: np.ndarray, seed: int) -> dict:
    """Scores of a judge on clips of known outcome; its rates are kept in the judge as `name`."""
    probability = model.judge(clips)
    yes = probability >= model.threshold
    found = {**auroc_interval(probability, success, seed=seed), **calibration(probability, success),
             "abstained": int(np.isnan(probability).sum()),
             "precision": float(success[yes].mean()) if yes.any() else None}  # fmt: skip
    told = np.isfinite(probability)
    if success[told].any() and not success[told].all():
        model.rates[name] = Rates.measured(probability, success, model.threshold)
        found |= {"tpr": model.rates[name].tpr, "tnr": model.rates[name].tnr}
    return found


def dreamt(dreams: Dataset, clips: Path | None, sim: Callable[[], Sim], settle: int,
           out: Path) -> tuple[list[Clip], np.ndarray]:  # fmt: skip
    """Dreams and whether their labels succeed when replayed. ValueError if none began in the simulator."""
    candidates = Candidates(dreams, clips)
    truth = replayed([candidates.describe(i) for i in range(len(candidates))], dreams, sim, settle, out)
    if not truth:
        raise ValueError(f"no dream of {dreams.root} has an origin in the simulator; leave out stage.dreams")
    success = {row["id"]: row["success"] for row in truth}
    known = [i for i, id in enumerate(candidates.ids) if id in success]
    shown = [replace(candidates.clip(i), action=candidates.labels(i).value) for i in known]
    return shown, np.array([success[candidates.ids[i]] for i in known])
