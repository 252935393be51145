"""Real and dreamed trajectories -> a policy, saved in `out` itself (config.json, contract.json, model.safetensors)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dreamgen.core.manifest import Stage, write_json
from dreamgen.core.seeding import seed_for
from dreamgen.data.lerobot import Dataset
from dreamgen.data.mixture import Mixture
from dreamgen.engine.train import clear_state, train
from dreamgen.policies.chunks import Chunks, collate


def train_policy(
    policy: Callable[[], nn.Module] | nn.Module,
    real: Dataset | None,
    dreams: Sequence[Dataset] = (),
    *,
    out: Path,
    steps: int = 1000,
    batch_size: int = 64,
    lr: float = 1e-3,
    muon_lr: float | None = None,
    warmup: int = 50,
    weight_decay: float = 0.01,
    betas: Sequence[float] = (0.9, 0.99),
    clip: float = 1.0,
    ema: float | None = 0.99,
    precision: str = "auto",
    replicas: int = 1,
    ratio: str = "1:1",
    dream_body: str = "dream",
    dream_state: str = "recorded",
    past_end: str = "mask",
    keep_idle: int | None = None,
    spread_scale: float | None = None,
    memory_gb: float = 2.0,
    checkpoint_every: int = 500,
    log_every: int = 20,
    validation: Dataset | None = None,
    validate_every: int = 0,
    seed: int = 0,
    record: dict,
) -> dict:
    """Train `policy` on a real:dream mixture of `ratio` (all real without dreams).

    policy: a policy, or a function that makes one; the function is called under the stage's seed, so that the first
    weights belong to the run. dream_body: the embodiment that dreams train; "real" shares the robot's own.
    dream_state: "recorded" takes the dreams' (pseudo-)states, "masked" hides them. past_end: what follows the end of
    an episode; keep_idle: idle observations taken of each episode (null: all); see `Chunks`. spread_scale: trust in
    labels falls with their spread; null trusts all alike.
    validation: held-out episodes; their loss is logged every `validate_every` steps.

    Normalisers are fitted to the real data, to the dreams where there are none.
    Raises ValueError for a dataset of another robot, an unknown body, a horizon longer than an episode, no data, and a
    loss that is not finite (names the episodes; the last good state stays).
    """
    datasets = ([] if real is None else [real]) + list(dreams)
    parents = {f"real_{i}" if i < len(datasets) - len(dreams) else f"dream_{i}": d.root for i, d in enumerate(datasets)}
    parents |= {} if validation is None else {"validation": validation.root}
    with Stage(out, "train_policy", config=record, parents=parents, seed=seed) as run:
        if run.complete:
            return run.manifest()
        if not datasets:
            raise ValueError("train_policy got neither real data nor dreams; give at least one dataset")
        torch.manual_seed(seed_for(seed, "init"))
        model = policy if isinstance(policy, nn.Module) else policy()
        for dataset in datasets:
            model.robot.require(dataset.robot.contract(), f"the dataset {dataset.root}")
        common: dict[str, Any] = dict(horizon=model.horizon, past_end=past_end, keep_idle=keep_idle,
                                      memory_gb=memory_gb, future_steps=model.future_steps)  # fmt: skip
        scale = np.concatenate([d.actions() for d in ([real] if real is not None else dreams)]).std(0)
        trust = dict(spread_scale=spread_scale, action_scale=np.where(scale < 1e-5, 1, scale))
        chunks = [] if real is None else [Chunks(real, body=model.body("real"), **common)]
        chunks += [Chunks(d, body=model.body(dream_body), state=dream_state, **common, **trust) for d in dreams]
        fitted = range(1) if real is not None else range(len(dreams))
        model.fit(np.concatenate([datasets[k].states() for k in fitted]),
                  np.concatenate([chunks[k].whole() for k in fitted]),
                  np.concatenate([chunks[k].sample() for k in fitted]))  # fmt: skip
        mixture = Mixture(real=chunks[: len(chunks) - len(dreams)], dreams=chunks[len(chunks) - len(dreams) :],
                          batch_size=batch_size, ratio=ratio if real is not None else "0:1", seed=seed)  # fmt: skip

        def batch_at(step: int) -> dict[str, torch.Tensor]:
            draw = mixture.at(step)
            places = list(zip(draw.episode.tolist(), draw.row.tolist(), strict=True))
            mine = {k: [p for p, d in zip(places, draw.dataset, strict=True) if d == k] for k in range(len(chunks))}
            return collate([chunks[k].batch(p) for k, p in mine.items() if p], model.encoder.words)

        def describe(step: int) -> str:
            draw = mixture.at(step)
            named = {k: sorted(set(draw.episode[draw.dataset == k].tolist())) for k in range(len(chunks))}
            return "; ".join(f"episodes {', '.join(map(str, e))} of {datasets[k].root}" for k, e in named.items() if e)

        held_out = None if validation is None else validator(validation, batch_size, common)
        result = train(model, batch_at, out=run.out, steps=steps, lr=lr, muon_lr=muon_lr, warmup=warmup,
                       weight_decay=weight_decay,
                       betas=list(betas), clip=clip, ema=ema, precision=precision, replicas=replicas, seed=seed,
                       checkpoint_every=checkpoint_every, log_every=log_every, validate=held_out,
                       validate_every=validate_every, name="train_policy", describe=describe)  # fmt: skip
        model.cpu().save(run.out)
        write_json(run.out / "clock.json", {"robot_hz": model.robot.robot_hz, "horizon": model.horizon})
        clear_state(run.out)
        weights = sum(p.numel() for p in model.parameters())
        return run.finish(**result, parameters=weights, episodes=[len(d) for d in datasets],
                          observations=[len(c) for c in chunks])  # fmt: skip


def validator(dataset: Dataset, batch_size: int, common: dict) -> Callable[[nn.Module, int], dict[str, float]]:
    """A fixed, evenly spread batch of held-out observations and fixed noise: the loss on it."""
    chunks = Chunks(dataset, **common)
    places = [chunks.at(int(k)) for k in np.linspace(0, len(chunks) - 1, min(4 * batch_size, len(chunks)))]

    def validate(model: nn.Module, step: int) -> dict[str, float]:
        device = next(model.parameters()).device
        batch = {key: value.to(device) for key, value in collate([chunks.batch(places)], model.encoder.words).items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(0, "validate"))
            loss, metrics = model.loss(batch)
        return {"loss": float(loss), **{key: float(value) for key, value in metrics.items()}}

    return validate
