"""Recorded episodes -> a labeler, saved in `out` itself."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dreamgen.core.manifest import Stage
from dreamgen.core.seeding import rng_for
from dreamgen.data.joined import Joined
from dreamgen.data.lerobot import Dataset
from dreamgen.data.recordings import noted
from dreamgen.engine.precision import place
from dreamgen.engine.processes import require_alone
from dreamgen.engine.train import clear_state, train
from dreamgen.stages.drawn import DRAWN, drawn_by, frames_through
from dreamgen.stages.label_scores import score_labels
from dreamgen.stages.recorded_video import batches_of, long_enough


def held_out(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Episode numbers for training and held out, drawn from the seed; at least one of each where there are two."""
    order = rng_for(seed, "labeler split").permutation(count).tolist()
    apart = min(count - 1, max(1, round(share * count)))
    return sorted(order[apart:]), sorted(order[:apart])


def train_labeler(
    labeler: Any,
    dataset: Dataset,
    *,
    out: Path,
    steps: int = 1000,
    batch_size: int = 16,
    lr: float = 1.5e-3,
    muon_lr: float | None = None,
    warmup: int = 30,
    weight_decay: float = 0.01,
    betas: Sequence[float] = (0.9, 0.99),
    clip: float = 1.0,
    ema: float | None = 0.99,
    precision: str = "auto",
    replicas: int = 1,
    held_out_share: float = 0.1,
    held_out_clips: int = 64,
    more: Sequence[Dataset] = (),
    episodes: int | None = None,
    world_model: Any = None,
    degraded: float = 0.5,
    redream_up_to: float = 0.0,
    degraded_clips: int = 64,
    checkpoint_every: int = 200,
    log_every: int = 20,
    validate_every: int = 0,
    seed: int = 0,
    record: dict,
) -> dict:
    """Train `labeler` on `dataset`, a share of its episodes held out for scores during training and for calibration.

    labeler: a Labeler with fit, batches, loss, calibrate and save, as `idm.model.FlowIDM`; one with `measure` scores
    itself (latent actions have no recorded truth). held_out_clips: so many of the episodes held out are scored during
    training, all of them after it. Episodes shorter than a window of the labeler are left out. world_model: one with
    `encode` and `decode`, whose autoencoder a training clip passes with probability `degraded`, so that the labeler
    knows how dreams look; `degraded_clips` pass once, before training. redream_up_to: they are noised up to a level
    below it and dreamt again (`dreamgen.worlds.redream`), 0 leaves that out. more: recordings of the robot that are
    trained on as well, of which nothing is held out: play, for instance, without which a labeler knows the motions of
    its demonstrations alone. episodes: train on so many of `dataset` only, the same ones among more (to measure what
    data brings).

    Results: scores on the held-out episodes (r2, mae, ... by part), the last loss, the calibration, too_short: how many
    episodes were left out.
    Raises ValueError for a dataset of another robot, too few or too short episodes, a loss that is not finite.
    """
    require_alone("train_labeler")
    world = getattr(world_model, "folder", None)
    parents = {"dataset": dataset.root} | ({"world_model": world} if world is not None else {})
    parents |= {f"more_{k}": other.root for k, other in enumerate(more)}
    with Stage(out, "train_labeler", config=record, parents=parents, seed=seed) as run:
        if run.complete:
            clear_state(out)
            shutil.rmtree(out / DRAWN, ignore_errors=True)  # killed after the manifest
            return run.manifest()
        if len(dataset) < 2:
            raise ValueError(f"{dataset.root} has {len(dataset)} episode; a labeler needs at least 2, one to train on "
                             f"and one to be scored on")  # fmt: skip
        if not hasattr(labeler, "measure"):  # latent actions need none
            for key, one in [("dataset", dataset), *(("more", other) for other in more)]:
                one.require_actions(f"stage.{key} of a labeler of actions")
        if held_out_clips < 1:
            raise ValueError(f"held_out_clips is {held_out_clips}; expected 1 or more")
        usable, too_short = long_enough(dataset, range(len(dataset)), [labeler], least=2)
        training, apart = ([usable[i] for i in part] for part in held_out(len(usable), held_out_share, seed))
        if episodes is not None:
            training = sorted(rng_for(seed, "labeler episodes").permutation(training)[:episodes].tolist())
        known = Joined([dataset, *more])
        training += range(len(dataset), len(known))
        labeler.fit(known, training)
        place(world_model)
        least = max(labeler.clock.frames, getattr(labeler, "train_frames", 2))
        batches = labeler.batches(known, training, batch_size=batch_size, seed=seed,
                                  degrade=None if world_model is None
                                  else drawn_by(world_model, out, redream_up_to=redream_up_to, seed=seed),
                                  degraded=degraded, degraded_clips=degraded_clips,
                                  degrade_frames=frames_through(world_model, least))  # fmt: skip

        def measured(model: Any, chosen: Sequence[int]) -> dict[str, dict]:
            batches = batches_of(dataset, chosen, labeler.clock, labeler.label_batch)
            if hasattr(model, "measure"):
                return model.measure(clips for clips, _ in batches)
            labels, actions = [], []
            for clips, true in batches:
                labels += model.label(clips)
                actions += true
            return score_labels(labels, actions, labeler.robot, labeler.clock)

        def scores(model: Any, step: int = 0) -> dict[str, float]:
            found = measured(model, apart[:: -(-len(apart) // held_out_clips)])
            return {f"{key}_{part}": value for key, parts in found.items() for part, value in parts.items()
                    if key in ("r2", "mae", "change") and value is not None}  # fmt: skip

        done = train(labeler, batches, out=out, steps=steps, lr=lr, muon_lr=muon_lr, warmup=warmup,
                     weight_decay=weight_decay, betas=betas, clip=clip, ema=ema, precision=precision,
                     replicas=replicas, seed=seed, validate=scores, validate_every=validate_every,
                     checkpoint_every=checkpoint_every, log_every=log_every, name="train_labeler")  # fmt: skip
        calibration = labeler.calibrate(dataset, apart)
        labeler.save(out)
        found = measured(labeler, apart)
        manifest = run.finish(episodes=len(training), held_out=len(apart), too_short=too_short, steps=steps,
                              loss=done["loss"], precision=done["precision"], calibration=calibration,
                              held_out_scores=found, **noted(dataset, *more))  # fmt: skip
        clear_state(out)
        shutil.rmtree(out / DRAWN, ignore_errors=True)
        return manifest
