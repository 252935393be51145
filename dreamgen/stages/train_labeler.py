"""Recorded episodes -> a labeler, saved in `out` itself."""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dreamgen.core.manifest import Stage
from dreamgen.core.seeding import rng_for
from dreamgen.data.groups import group_of
from dreamgen.data.joined import Joined
from dreamgen.data.lerobot import Dataset
from dreamgen.data.recordings import noted
from dreamgen.engine.processes import require_alone
from dreamgen.engine.train import clear_state, train
from dreamgen.stages.drawn import DRAWN, Drawn, drawn_by, frames_through, frames_within
from dreamgen.stages.label_scores import score_labels
from dreamgen.stages.recorded_video import batches_of, long_enough


def held_out(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers for training and held out, drawn from the seed; at least one of each where there are two."""
    order = rng_for(seed, "labeler split").permutation(count).tolist()
    apart = min(count - 1, max(1, round(share * count)))
    return sorted(order[apart:]), sorted(order[:apart])


@dataclass(frozen=True, kw_only=True)
class Split:
    """Recordings of one robot: the episodes that a labeler learns on, those held out, how many are too short.

    name: of a robot that was added to the labeler, None of its own; this one's training goes on beyond the end of
    `dataset`, with those of more recordings.
    """

    dataset: Dataset | Joined
    training: list[int]
    apart: list[int]
    too_short: int
    name: str | None = None

    @classmethod
    def of(cls, dataset: Dataset | Joined, labeler: Any, share: float, seed: int, name: str | None = None) -> "Split":
        """A share of the first states held out, with all episodes that begin there, of those that are long enough;
        ValueError for fewer than two."""
        with reading(labeler, name):
            usable, too_short = long_enough(dataset, range(len(dataset)), [labeler], least=2)
        own = {i: group_of(dataset, i) for i in usable}
        groups = list(dict.fromkeys(own.values()))
        if len(groups) < 2:
            raise ValueError(f"all {len(usable)} episodes of {dataset.root} that are long enough begin in one state; a "
                             f"labeler needs at least 2 first states, one to train on and one to be scored on: "
                             f"collect more")  # fmt: skip
        held = {groups[i] for i in held_out(len(groups), share, seed)[1]}
        training, apart = [i for i in usable if own[i] not in held], [i for i in usable if own[i] in held]
        return cls(dataset=dataset, training=training, apart=apart, too_short=too_short, name=name)

    def measured(self, labeler: Any, most: int | None = None) -> dict[str, dict]:
        """Scores of the labeler on episodes held out, `most` of them or all."""
        chosen = self.apart[:: -(-len(self.apart) // most)] if most else self.apart
        with reading(labeler, self.name):
            batches = batches_of(self.dataset, chosen, labeler.clock, labeler.label_batch)
            if hasattr(labeler, "measure"):
                return labeler.measure(clips for clips, _ in batches)
            labels, actions = [], []
            for clips, true in batches:
                labels += labeler.label(clips)
                actions += true
            return score_labels(labels, actions, labeler.robot, labeler.clock)

    def results(self, labeler: Any) -> dict:
        """What the manifest says of them: counts, the calibration, which is done here, and the scores."""
        with reading(labeler, self.name):
            calibration = labeler.calibrate(self.dataset, self.apart)
        return {"episodes": len(self.training), "held_out": len(self.apart), "too_short": self.too_short,
                "calibration": calibration, "held_out_scores": self.measured(labeler)}  # fmt: skip


def reading(labeler: Any, name: str | None) -> AbstractContextManager:
    """A context in which the labeler is one of the robot `name` that was added to it, or of its own for None."""
    return nullcontext() if name is None else labeler.reading(name)


def added(labeler: Any, others: Mapping[str, Dataset]) -> dict[str, Joined]:
    """Recordings of other robots by the robot's name; the labeler gets a head for each.

    Raises ValueError for a labeler of one robot alone, and for robots that it cannot learn beside its own.
    """
    if others and not hasattr(labeler, "add"):
        raise ValueError(f"a {type(labeler).__name__} learns from one robot; set stage.others={{}}")
    groups: dict[str, list[Dataset]] = {}
    for key, dataset in others.items():
        dataset.require_actions(f"stage.others.{key} of a labeler of actions")
        groups.setdefault(dataset.robot.name, []).append(dataset)
    for group in groups.values():
        labeler.add(group[0].robot)
    return {name: Joined(group) for name, group in groups.items()}


def train_labeler(
    labeler: Any,
    dataset: Dataset,
    *,
    out: Path,
    start: Path | None = None,
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
    others: Mapping[str, Dataset] | None = None,
    own_share: float | None = None,
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
    """Train `labeler` on `dataset`, a share of its episodes held out for scores during training and for calibration:
    of the states that they begin in, where several begin in one (`dreamgen.data.groups`).

    labeler: a Labeler with fit, batches, loss, calibrate and save, as `idm.model.FlowIDM`; one with `measure` scores
    itself (latent actions have no recorded truth). held_out_clips: so many of the episodes held out are scored during
    training, all of them after it. Episodes shorter than a window of the labeler are left out. world_model: one with
    `encode` and `decode`, whose autoencoder a training clip passes with probability `degraded`, so that the labeler
    knows how dreams look; `degraded_clips` pass once, before training. redream_up_to: they are noised up to a level
    below it and dreamt again (`dreamgen.worlds.redream`), 0 leaves that out; of each other robot as many pass the
    autoencoder alone, for a world model draws the robot that it was trained on. more: recordings of the robot that are
    trained on as well, of which nothing is held out: play, for instance, without which a labeler knows the motions of
    its demonstrations alone. episodes: train on so many of `dataset` only, the same ones among more (to measure what
    data brings).

    others: recordings of other robots, by any name, whose videos it learns to label too, through the same network with
    heads of their own (`idm.robots`). Every batch is of one robot: of its own in `own_share` of the steps, or as
    `dreamgen.data.mixture` weighs datasets. Of each robot a share of the episodes is held out. start: a trained
    labeler, of this robot or of others, with whose weights it begins, those of heads apart.

    Results: scores on the held-out episodes (r2, mae, ... by part), the last loss, the calibration, too_short: how many
    episodes were left out; others: the same of each other robot, by its name.
    Raises ValueError for a dataset of another robot, other robots that do not fit (see `Seen.beside`), too few or too
    short episodes, a `start` with another trunk, a loss that is not finite.
    """
    require_alone("train_labeler")
    others = others or {}
    world = getattr(world_model, "folder", None)
    parents = {"dataset": dataset.root} | ({"world_model": world} if world is not None else {})
    parents |= {f"more_{k}": other.root for k, other in enumerate(more)}
    parents |= {f"other_{key}": other.root for key, other in others.items()}
    parents |= {} if start is None else {"start": start}
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
        if own_share is not None and not others:
            raise ValueError(f"own_share is {own_share}, and there are no other robots; name some in stage.others, or "
                             f"set it to null")  # fmt: skip
        beside = [Split.of(data, labeler, held_out_share, seed, name) for name, data in added(labeler, others).items()]
        if start is not None:
            if not hasattr(labeler, "begin_with"):
                raise ValueError(f"a {type(labeler).__name__} cannot begin with another; set stage.start=null")
            labeler.begin_with(start)
        own = Split.of(dataset, labeler, held_out_share, seed)
        training, known = own.training, Joined([dataset, *more])
        if episodes is not None:
            training = sorted(rng_for(seed, "labeler episodes").permutation(training)[:episodes].tolist())
        own = replace(own, training=[*training, *range(len(dataset), len(known))])
        labeler.fit(known, own.training)
        for other in beside:
            with reading(labeler, other.name):
                labeler.fit(other.dataset, other.training)
        shown = [labeler.clock.frames_in(max(map(known.length, own.training)))]
        for other in beside:
            with reading(labeler, other.name):
                shown.append(labeler.clock.frames_in(max(map(other.dataset.length, other.training))))
        # what is drawn again is as long as a dream, or else as recordings are, and no shorter than what is learned from
        least = min(labeler.clock.frames, frames_within(world_model, min(shown)))
        least = max(least, getattr(labeler, "clip_frames", 2))

        def drawn(**how: Any) -> Drawn | None:
            return None if world_model is None else drawn_by(world_model, out, seed=seed, **how)

        mixed: dict[str, Any] = {} if not beside else {
            "others": [(other.dataset, other.training, drawn(apart=other.name)) for other in beside],
            "own_share": own_share}  # fmt: skip
        batches = labeler.batches(known, own.training, batch_size=batch_size, seed=seed, **mixed,
                                  degrade=drawn(redream_up_to=redream_up_to), degraded=degraded,
                                  degraded_clips=degraded_clips,
                                  degrade_frames=frames_through(world_model, least))  # fmt: skip

        def scores(model: Any, step: int = 0) -> dict[str, float]:
            return {f"{split.name + '_' if split.name else ''}{key}_{part}": value
                    for split in (own, *beside)
                    for key, parts in split.measured(model, held_out_clips).items()
                    for part, value in parts.items()
                    if key in ("r2", "mae", "change") and value is not None}  # fmt: skip

        done = train(labeler, batches, out=out, steps=steps, lr=lr, muon_lr=muon_lr, warmup=warmup,
                     weight_decay=weight_decay, betas=betas, clip=clip, ema=ema, precision=precision,
                     replicas=replicas, seed=seed, validate=scores, validate_every=validate_every,
                     checkpoint_every=checkpoint_every, log_every=log_every, name="train_labeler")  # fmt: skip
        found = own.results(labeler)
        found |= {"others": {other.name: other.results(labeler) for other in beside}} if beside else {}
        labeler.save(out)
        manifest = run.finish(**found, steps=steps, loss=done["loss"], precision=done["precision"],
                              **noted(dataset, *more, *others.values()))  # fmt: skip
        clear_state(out)
        shutil.rmtree(out / DRAWN, ignore_errors=True)
        return manifest
