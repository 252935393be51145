"""Real and dreamed trajectories -> a policy, saved in `out` itself (config.json, contract.json, model.safetensors)."""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dreamgen.core.manifest import Stage
from dreamgen.core.protocols import Sim
from dreamgen.core.seeding import seed_for
from dreamgen.data.lerobot import Dataset
from dreamgen.data.recordings import noted
from dreamgen.engine.precision import best_device
from dreamgen.engine.processes import require_alone
from dreamgen.engine.shares import parts_of
from dreamgen.engine.state import STATE, keep_frozen, states_gb
from dreamgen.engine.train import clear_state, train
from dreamgen.policies.chunks import Chunks, collate
from dreamgen.policies.features import worthwhile
from dreamgen.policies.feed import Feed, Some, sources
from dreamgen.policies.regression import FOLDER, Regression
from dreamgen.policies.start import begin
from dreamgen.stages.midway import Midway
from dreamgen.stages.sharing import sweep

FEATURES = "features"
log = logging.getLogger(__name__)


def train_policy(
    policy: Callable[[], nn.Module] | nn.Module,
    real: Some,
    dreams: Sequence[Dataset] = (),
    *,
    out: Path,
    start: Path | None = None,
    start_bodies: Mapping[str, str | None] | None = None,
    steps: int = 1000,
    regression_steps: int = 0,
    regression_lr: float = 5e-3,
    batch_size: int = 64,
    lr: float = 1e-3,
    muon_lr: float | None = None,
    warmup: int = 50,
    weight_decay: float = 0.01,
    betas: Sequence[float] = (0.9, 0.99),
    clip: float = 1.0,
    ema: float | None = 0.99,
    encoder_rate: float = 1.0,
    precision: str = "auto",
    replicas: int = 1,
    accumulate: int = 1,
    ratio: str = "1:1",
    dream_body: str = "dream",
    dream_state: str = "recorded",
    dream_labels: str = "own",
    latent: Sequence[Dataset] = (),
    latent_body: str = "latent",
    videos: Sequence[Dataset] = (),
    others: Mapping[str, Any] | None = None,
    past_end: str = "mask",
    keep_idle: int | None = None,
    spread_scale: float | None = None,
    memory_gb: float = 2.0,
    checkpoint_every: int = 500,
    log_every: int = 20,
    validation: Dataset | None = None,
    validate_every: int = 0,
    cache_features: bool = True,
    sim: Callable[[], Sim] | None = None,
    evaluate_every: int = 0,
    evaluate_instructions: Sequence[str] | None = None,
    evaluate_episodes: int = 28,
    evaluate_steps: int = 48,
    evaluate_execute: int = 8,
    seed: int = 0,
    record: dict,
) -> dict:
    """Train `policy` on a real:dream mixture of `ratio` (all real without dreams). real: one dataset of the robot, or
    several, drawn from as `dreamgen.data.mixture` says; so are several dreams.

    policy: a policy, or a function that makes one; the function is called under the stage's seed, so that the first
    weights belong to the run. start: a policy, or the folder of a run of this stage that has not ended, with whose
    weights and normalisers training begins; start_bodies: as which of its bodies those of the policy begin, null for
    fresh weights, where names and robots do not say so already (see `dreamgen.policies.start`). regression_steps: so
    many steps at `regression_lr` come first, in which what leads to the plan of a chunk learns by regression (see
    `dreamgen.policies.regression`). encoder_rate: what the rates are multiplied by for the model inside a pretrained
    encoder that is tuned. accumulate: see `dreamgen.engine.train`.
    dream_body: the embodiment that dreams train; "real" shares the robot's own.
    dream_state: "recorded" takes the dreams' (pseudo-)states, "masked" hides them, "zero" puts zeros. dream_labels:
    "shuffled" is the control of dreams with the actions of others. latent: datasets of another embodiment, such as
    latent actions, that the policy's body `latent_body` learns from; they count as dreams. videos: datasets of the
    robot opened without actions, which train by FLARE's alignment alone; they count as dreams. others: data of other
    bodies of the policy, such as those of other robots: {body: {real: ..., dreams: ..., videos: ...}}, each a dataset
    or several, which count as what they are. past_end: what follows the end of an episode; keep_idle: idle
    observations taken of each episode (null: all); see `Chunks`. spread_scale: trust in labels falls with their spread;
    null trusts all alike.
    validation: held-out episodes of the robot that the policy acts for; their loss is logged every `validate_every`
    steps. cache_features: pictures pass a frozen encoder once, not at every step, where training takes as many
    observations as there are. sim, evaluate_every: closed-loop success in a process beside training, a multiple of
    `validate_every` where both are set (results: midway), on `evaluate_instructions` (null: all that the simulator
    knows).

    Normalisers of each robot are fitted to its real data, to its dreams where there are none. The manifest counts, for
    each dataset, episodes shorter than the horizon, idle observations, and those without a state that they need, all
    left out.
    Raises ValueError for a dataset of another robot, an unknown body, a horizon longer than all episodes, no data, none
    for the body that the policy acts for where that begins afresh, a `start` of another policy or without a body that
    is to begin, features that do not fit on the disk, several processes, and a loss or gradient that is not finite
    (names the episodes; the last good state stays). An evaluation on the way that fails costs itself: `midway` then
    tells its error.
    """
    require_alone("train_policy")
    named: dict[str, Any] = dict(dream_body=dream_body, latent_body=latent_body)
    every = sources(real, dreams, latent, videos, others, **named)
    parents = {f"{source.kind}_{i}": source.dataset.root for i, source in enumerate(every)}
    parents |= {} if validation is None else {"validation": validation.root}
    parents |= {} if start is None else {"start": start}
    with Stage(out, "train_policy", config=record, parents=parents, seed=seed) as run:
        if run.complete:
            clear(run.out)  # killed after the manifest
            return run.manifest()
        interval = validate_every or evaluate_every
        if evaluate_every and (sim is None or evaluate_every % interval):
            raise ValueError(f"evaluate_every is {evaluate_every}; expected a multiple of validate_every "
                             f"({validate_every}) and a simulator: sim=...")  # fmt: skip
        for source in every:
            if source.kind != "video":
                source.dataset.require_actions(f"stage.{source.key}")
        if validation is not None:
            validation.require_actions("stage.validation")
        torch.manual_seed(seed_for(seed, "init"))
        model = policy if isinstance(policy, nn.Module) else policy()
        if start is None and start_bodies:
            raise ValueError(f"stage.start_bodies is {dict(start_bodies)}, and there is no stage.start to begin with")
        if validation is not None:
            model.robot.require(validation.robot.contract(), f"stage.validation, {validation.root},")
        fresh = None if start is None else begin(model, start, start_bodies)
        common: dict[str, Any] = dict(past_end=past_end, keep_idle=keep_idle, memory_gb=memory_gb, folder=run.out,
                                      reserve_gb=states_gb(model))  # fmt: skip
        feed = Feed(model, real=real, dreams=dreams, latent=latent, videos=videos, others=others, **named,
                    batch_size=batch_size, ratio=ratio, spread_scale=spread_scale, fresh=fresh,
                    options=common, dream_options=dict(state=dream_state, labels=dream_labels), seed=seed)  # fmt: skip
        features, draws = run.out / FEATURES, (regression_steps + steps) * batch_size
        sweep(features)
        if cache_features and worthwhile(model, feed.chunks, features, draws=draws):
            feed.cache(features)
        midway = None
        if evaluate_every:
            midway = Midway(run.out, sim, type(model), instructions=evaluate_instructions, episodes=evaluate_episodes,
                            steps=evaluate_steps, execute=evaluate_execute, seed=seed)  # fmt: skip
        left = {**feed.options, "body": model.speaks}
        held_out = None if validation is None else validator(validation, batch_size, left)

        def check(model: nn.Module, step: int) -> dict[str, float]:
            if midway and step % evaluate_every == 0:
                midway.begin(model, step)
            due = step == steps or step % (validate_every or steps) == 0
            return held_out(model, step) if held_out and due else {}

        how: dict[str, Any] = dict(muon_lr=muon_lr, warmup=warmup, weight_decay=weight_decay, betas=list(betas),
                                   clip=clip, precision=precision, replicas=replicas, accumulate=accumulate, seed=seed,
                                   rates={"encoder.model.": encoder_rate}, log_every=log_every,
                                   checkpoint_every=checkpoint_every, describe=feed.describe,
                                   restarts=run.out)  # fmt: skip
        if start is not None:
            keep_frozen(run.out / STATE, model)
        begun = {}
        if model.direct is not None and not regression_steps and start is None:
            log.warning("regression_steps is 0; a policy whose encoder summarises the observation learns what an "
                        "instruction means in these")  # fmt: skip
        if regression_steps:
            first = Regression(model.to(best_device()))
            begun["regression"] = train(first, feed.at, out=run.out / FOLDER, steps=regression_steps,
                                        lr=regression_lr, ema=None, name="regression", **how)  # fmt: skip
        result = train(model, feed.at, out=run.out, steps=steps, lr=lr, ema=ema, name="train_policy",
                       validate=check if held_out or midway else None, validate_every=interval, **how)  # fmt: skip
        model.cpu().save(run.out)
        found = {} if midway is None else {"midway": midway.gather()}
        weights = sum(p.numel() for p in model.parameters())
        manifest = run.finish(**result, **begun, **found, parameters=weights, episodes=[len(d) for d in feed.datasets],
                              observations=[len(c) for c in feed.chunks],
                              idle_left_out=[c.idle_left_out for c in feed.chunks],
                              unknown_left_out=[c.unknown_left_out for c in feed.chunks],
                              short_left_out=[c.short_left_out for c in feed.chunks],
                              **noted(*feed.datasets, validation))  # fmt: skip
        clear(run.out)
        return manifest


def clear(out: Path) -> None:
    """Remove what only a training that has not ended needs."""
    clear_state(out, out / FOLDER)
    shutil.rmtree(out / FEATURES, ignore_errors=True)


def validator(dataset: Dataset, batch_size: int, common: dict) -> Callable[[nn.Module, int], dict[str, float]]:
    """A fixed, evenly spread batch of held-out observations and fixed noise: the loss on it, `batch_size` observations
    at a time. common: see `Chunks`."""
    chunks = Chunks(dataset, **common)
    places = [chunks.at(int(k)) for k in np.linspace(0, len(chunks) - 1, min(4 * batch_size, len(chunks)))]

    def validate(model: nn.Module, step: int) -> dict[str, float]:
        device = next(model.parameters()).device
        batch = model.whole(collate([chunks.batch(places)], model.encoder.words))
        sums: dict[str, float] = {}
        for part in parts_of(batch, 0, 1, 0, 1, -(-len(places) // batch_size), device):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_for(0, "validate"))
                with part.noise():
                    loss, metrics = model.loss(part.to(device))
            for key, value in {"loss": loss, **metrics}.items():
                sums[key] = sums.get(key, 0.0) + float(value) * part.weight
        return sums

    return validate
