"""Video of successes and failures -> a calibrated judge of success, saved in `out` itself.

Episodes are split three ways: to train on, to calibrate on and choose the threshold by, and to measure on; those that
share a first state stay together. So nothing that is fitted here has seen what the true positive and negative rates,
which correct success rates later, are counted on; a world model that shows the clips may have learned from them.
"""

import csv
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dreamgen.core.clip import Clip
from dreamgen.core.manifest import Stage, read_json, write_json
from dreamgen.core.protocols import ActionWorldModel, Sim
from dreamgen.core.seeding import rng_for, seed_for
from dreamgen.data.lerobot import Dataset
from dreamgen.data.recordings import noted
from dreamgen.engine.precision import place
from dreamgen.engine.processes import require_alone
from dreamgen.engine.train import clear_state, train
from dreamgen.filters.rates import Rates, threshold_for
from dreamgen.stages.agreement import auroc_interval, calibration
from dreamgen.stages.candidates import Candidates
from dreamgen.stages.evaluate_filters import replayed
from dreamgen.stages.judge_clips import SHOWN, Batches, Recorded, shown_by
from dreamgen.stages.label_scores import auroc

HARDLY = 0.75  # AUROC within one instruction, below which a warning says so
log = logging.getLogger(__name__)
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
    least_precision: float | None = None,
    swapped: float = 0.25,
    shift: int = 2,
    world_model: Any = None,
    degraded: float = 0.5,
    degraded_clips: int = 128,
    shown_clips: int = 200,
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
    at the end and replayed in `sim` for the rates on dreams under instructions, which correct no success in a dream
    under actions; dream_clips: the stage that dreamed them.
    video_hz: rate at which clips are seen. held_out_share: of episodes; half of them calibrates, half measures;
    episodes of one dataset with the same meta `pair` share a first state and are not parted.
    least_precision: the threshold is the lowest whose yes is right so often on the calibrating half; None: the one of
    as many yeses there as successes, so that rates of success are told without bias.
    swapped: share of a batch that shows a success under another instruction, which is a failure. shift: pixels by which
    training clips move. world_model: `degraded` is the share of a batch that is shown as this model draws it
    (`judge_clips.shown_by`, `degraded_clips` of the clips, once, before training). One that takes actions dreams a clip
    from its first frame; then such dreams calibrate the judge, too. Any other returns it through its autoencoder.
    shown_clips: at most so many clips of either half are so shown.

    Results: held_out {auroc, low, high, n, positives, brier, ece, tpr, tnr, precision, by_instruction}, imagined or
    decoded the same of up to `shown_clips` of these as the model shows them, dreamt the same of dreams, threshold.
    Raises ValueError for episodes without success, too few of one outcome, a dataset of another robot, bad labels,
    dreams without a simulator to replay them.
    """
    require_alone("train_judge")
    if dreams is not None and sim is None:
        raise ValueError(f"the judge's rates on {dreams.root} come from replaying these dreams and the recipe has no "
                         "simulator; choose sim=..., or leave out stage.dreams")  # fmt: skip
    parents = {f"dataset_{k}": dataset.root for k, dataset in enumerate(datasets)}
    parents |= ({"labels": labels} if labels else {}) | ({"dreams": dreams.root} if dreams is not None else {})
    with Stage(out, "train_judge", config=record, parents=parents, seed=seed) as run:
        if run.complete:
            clear_state(out)
            return run.manifest()
        clips = Recorded(datasets, outcomes(datasets, labels), video_hz)
        training, fitting, apart = three_ways(clips.success, held_out_share, seed, clips.groups)
        torch.manual_seed(seed_for(seed, "init"))
        model = judge(instructions=sorted({clips.instruction(k) for k in range(len(clips))}))
        for dataset in datasets:
            model.robot.require(dataset.robot.contract(), f"the dataset {dataset.root}")
        imagines = isinstance(world_model, ActionWorldModel)
        if imagines:
            world_model.robot.require(model.robot.contract(), "the judge")
        shown = shown_by(world_model, out, seed)
        place(world_model)
        if world_model is not None and degraded:
            order = rng_for(seed, "degrade").permutation(training).tolist()
            clips.degrade(shown, order[:degraded_clips])
        if model.state is not None:
            model.fit(clips.states(model, clips.some(training, seed)))
        if hasattr(model.encoder, "fit"):
            model.encoder.fit(torch.from_numpy(clips.sample(model, clips.some(training, seed))))
        batches = Batches(model, clips, training, batch_size=batch_size, swapped=swapped, shift=shift,
                          degraded=degraded, seed=seed)  # fmt: skip
        done = train(model, batches, out=out, steps=steps, lr=lr, muon_lr=muon_lr, warmup=warmup,
                     weight_decay=weight_decay, betas=betas, clip=clip, ema=ema, precision=precision,
                     replicas=replicas, seed=seed, checkpoint_every=checkpoint_every, log_every=log_every,
                     name="train_judge")  # fmt: skip
        known = clips.some(fitting, seed, shown_clips) if imagines else fitting
        logits = model.logits(clips.again(shown, known) if imagines else (clips[k] for k in known))
        model.slope, model.offset = platt(logits, clips.success[known])
        model.threshold, reached = threshold_for(least_precision, model.calibrated(logits), clips.success[known])
        scores = {"held_out": measured(model, "real", model.judge(clips[k] for k in apart), clips.success[apart],
                                       [clips.groups[k] for k in apart], seed,
                                       [clips.instruction(k) for k in apart])}  # fmt: skip
        if world_model is not None:
            some, name = clips.some(apart, seed, shown_clips), "imagined" if imagines else "decoded"
            scores[name] = measured(model, name, model.judge(clips.again(shown, some)), clips.success[some],
                                    [clips.groups[k] for k in some], seed,
                                    [clips.instruction(k) for k in some])  # fmt: skip
        if dreams is not None:
            asked, success, pairs = dreamt(dreams, dream_clips, sim, settle, out)
            scores["dreamt"] = measured(model, "dreamt", model.judge(asked), success, pairs, seed)
        model.save(out)
        write_json(Path(out) / "scores.json", scores)
        manifest = run.finish(episodes=[len(training), len(fitting), len(apart)], successes=int(clips.success.sum()),
                              loss=done["loss"], threshold=model.threshold, threshold_precision=reached,
                              slope=model.slope, offset=model.offset, **noted(*datasets, dreams),
                              **scores)  # fmt: skip
        clear_state(out)
        shutil.rmtree(Path(out) / SHOWN, ignore_errors=True)
        return manifest


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
        with path.open(newline="", encoding="utf-8-sig") as file:  # Excel begins a file with a mark
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


def three_ways(success: np.ndarray, share: float, seed: int,
               groups: Sequence[str] | None = None) -> tuple[list[int], list[int], list[int]]:  # fmt: skip
    """Clips to train on, to calibrate on, to measure on, each outcome split alike; clips of one of `groups` stay
    together, so their outcomes are split as nearly alike as whole groups allow. ValueError if one has too few."""
    together: dict[object, list[int]] = {}
    for k, group in enumerate(range(len(success)) if groups is None else groups):
        together.setdefault(group, []).append(k)
    alone = np.array([one[0] for one in together.values() if len(one) == 1], np.int64)
    parts: list[list[int]] = [[], [], []]
    for kind in (True, False):
        mine = rng_for(seed, "judge split", int(kind)).permutation(alone[success[alone] == kind])
        each = max(1, round(share * len(mine) / 2))
        for part, piece in zip(parts, (mine[2 * each :], mine[:each], mine[each : 2 * each]), strict=True):
            part += piece.tolist()
    siblings = [one for one in together.values() if len(one) > 1]
    order = rng_for(seed, "judge split", "groups").permutation(len(siblings)).tolist()
    each, owed = min(1 / 3, max(share / 2, 1 / max(1, len(siblings)))), np.zeros(3)
    for n in sorted(order, key=lambda n: success[siblings[n]].mean()):  # dealt out: neighbours succeed equally often
        owed += np.array([1 - 2 * each, each, each]) * len(siblings[n])
        part = int(owed.argmax())
        parts[part] += siblings[n]
        owed[part] -= len(siblings[n])
    for kind in (True, False):
        if not all((success[part] == kind).any() for part in parts):
            raise ValueError(f"{(success == kind).sum()} of {len(success)} episodes, of {len(together)} first states, "
                             f"are {'successes' if kind else 'failures'}; a judge needs at least 3 of each, of "
                             "different first states, to train, calibrate and measure on. Collect more with "
                             "stage.source=play or stage.keep_failures=true.")  # fmt: skip
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


def measured(model: Any, name: str, probability: np.ndarray, success: np.ndarray, groups: Sequence[str],
             seed: int, texts: Sequence[str] = ()) -> dict:  # fmt: skip
    """Scores of what a judge says (n,) of clips of known outcome, those of one first state in one group; its rates are
    kept in the judge as `name`. texts: their instructions, each of which is scored by itself: a judge may have learned
    all but one. A warning names one that it hardly tells."""
    yes = probability >= model.threshold
    found = {**auroc_interval(probability, success, groups=groups, seed=seed), **calibration(probability, success),
             "abstained": int(np.isnan(probability).sum()),
             "precision": float(success[yes].mean()) if yes.any() else None}  # fmt: skip
    told = np.isfinite(probability)
    if success[told].any() and not success[told].all():
        model.rates[name] = Rates.measured(probability, success, model.threshold)
        found |= {"tpr": model.rates[name].tpr, "tnr": model.rates[name].tnr}
    if texts:
        found["by_instruction"] = {}
    for text in sorted(set(texts)):
        here = np.array([one == text for one in texts]) & told
        wins, n = int(success[here].sum()), int(here.sum())
        own = auroc(probability[here], success[here]) if 0 < wins < n else None
        found["by_instruction"][text] = {"auroc": own, "n": n, "positives": wins}
        if own is not None and own < HARDLY and min(wins, n - wins) >= 5:
            log.warning("on %s video the judge hardly tells successes of '%s' from failures (AUROC %.2f, %d of %d "
                        "succeed); train it longer, with another seed, or on more of both",
                        name, text, own, wins, n)  # fmt: skip
    return found


def dreamt(dreams: Dataset, clips: Path | None, sim: Callable[[], Sim], settle: int,
           out: Path) -> tuple[Iterator[Clip], np.ndarray, list[str]]:  # fmt: skip
    """Dreams, read one by one, whether their labels succeed when replayed, and their first states. ValueError if none
    began in the simulator."""
    candidates = Candidates(dreams, clips)
    truth = replayed([candidates.describe(i) for i in range(len(candidates))], dreams, sim, settle, out)
    if not truth:
        raise ValueError(f"no dream of {dreams.root} has an origin in the simulator and an instruction that it knows; "
                         "leave out stage.dreams")  # fmt: skip
    success = {row["id"]: row["success"] for row in truth}
    known = [i for i, id in enumerate(candidates.ids) if id in success]
    shown = (replace(candidates.clip(i), action=candidates.labels(i).value) for i in known)
    pairs = [candidates.describe(i)["pair"] for i in known]
    return shown, np.array([success[candidates.ids[i]] for i in known]), pairs
