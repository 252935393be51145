"""The one training loop.

Data are addressed by step (`batch_at(step)` is a pure function) and the generators are seeded anew at each step, so
the whole state of a run is (step, weights, EMA, optimiser): a run that is killed and continued ends in the same bits
as one that was not.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dreamgen.core.manifest import read_json, write_json
from dreamgen.core.seeding import seed_for
from dreamgen.engine.muon import Muon, is_hidden
from dreamgen.engine.precision import autocast, best_device, resolve
from dreamgen.engine.progress import bar, file_logger
from dreamgen.engine.replicas import Replicas, possible, share

STATE = "training"


def schedule(step: int, *, steps: int, warmup: int) -> float:
    """Learning-rate factor: linear warm-up, then a cosine to 0 at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Ema:
    """Exponential moving average of the trainable weights, with a warm-up: decay_t = min(decay, (1 + t) / (10 + t))."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        live = dict(model.named_parameters())
        torch._foreach_lerp_(list(self.shadow.values()), [live[name] for name in self.shadow], 1 - decay)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the averaged and the live weights."""
        for name, p in model.named_parameters():
            if name in self.shadow:
                kept = p.detach().clone()
                p.copy_(self.shadow[name])
                self.shadow[name] = kept


class _Ahead:
    """Batches by step; the next one is made in a thread while this one is used."""

    def __init__(self, batch_at: Callable[[int], Any], stop: int) -> None:
        self.batch_at, self.stop = batch_at, stop
        self.pool: ThreadPoolExecutor | None = None  # made on first use: a fork inherits no threads
        self.pending: tuple[int, Future] | None = None

    def __call__(self, step: int) -> Any:
        self.pool = self.pool or ThreadPoolExecutor(1)
        asked, future = self.pending or (None, None)
        batch = future.result() if future is not None and asked == step else self.batch_at(step)
        self.pending = (step + 1, self.pool.submit(self.batch_at, step + 1)) if step + 1 < self.stop else None
        return batch


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: _to(value, device) for key, value in batch.items()}
    return batch


def _optimisers(
    model: nn.Module, *, lr: float, muon_lr: float | None, weight_decay: float, betas: Sequence[float]
) -> list[torch.optim.Optimizer]:
    """AdamW, without decay on vectors; with `muon_lr`, Muon for the hidden matrices."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = [p for name, p in named if muon_lr and is_hidden(name, p)]
    taken = {id(p) for p in hidden}
    rest = [p for _, p in named if id(p) not in taken]
    groups = [{"params": [p for p in rest if p.ndim > 1], "weight_decay": weight_decay},
              {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0}]  # fmt: skip
    made: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]))]
    if hidden:
        made.append(Muon(hidden, lr=muon_lr or 0.0))
    for optimiser in made:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return made


def _save(folder: Path, step: int, model: nn.Module, ema: Ema | None, optimisers: list) -> None:
    """Write the state beside the last one, then let `latest.json` point at it: a kill leaves the older state whole."""
    path = folder / f"step_{step:08d}"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    save_file({k: p.detach().contiguous().cpu() for k, p in model.named_parameters() if p.requires_grad},
              path / "model.safetensors")  # fmt: skip
    buffers = {k: b.detach().contiguous().cpu().clone() for k, b in model.named_buffers()}
    save_file(buffers, path / "buffers.safetensors")
    if ema:
        save_file({k: v.contiguous().cpu() for k, v in ema.shadow.items()}, path / "ema.safetensors")
    torch.save([optimiser.state_dict() for optimiser in optimisers], path / "optimisers.pt")
    write_json(folder / "latest.json", {"step": step})
    for old in folder.glob("step_*"):
        if old != path:
            shutil.rmtree(old, ignore_errors=True)


@torch.no_grad()
def _restore(folder: Path, model: nn.Module, ema: Ema | None, optimisers: list) -> int:
    step = int(read_json(folder / "latest.json")["step"])
    path = folder / f"step_{step:08d}"
    live = dict(model.named_parameters()) | dict(model.named_buffers())
    for file in ("model.safetensors", "buffers.safetensors"):
        for name, value in load_file(path / file).items():
            live[name].copy_(value)
    if ema:
        device = next(model.parameters()).device
        ema.shadow = {k: v.to(device) for k, v in load_file(path / "ema.safetensors").items()}
    states = torch.load(path / "optimisers.pt", weights_only=True)
    for optimiser, saved in zip(optimisers, states, strict=True):
        optimiser.load_state_dict(saved)
    return step


def read_losses(out: Path) -> list[dict]:
    """The rows of a run's loss curve: step, seconds, loss and metrics."""
    path = Path(out) / "losses.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def train(
    model: nn.Module,
    batch_at: Callable[[int], Any],
    *,
    out: Path,
    steps: int,
    lr: float = 3e-4,
    muon_lr: float | None = None,
    warmup: int = 100,
    weight_decay: float = 0.01,
    betas: tuple[float, float] | list[float] = (0.9, 0.99),
    clip: float = 1.0,
    ema: float | None = 0.999,
    precision: str = "auto",
    seed: int = 0,
    replicas: int = 1,
    checkpoint_every: int = 500,
    log_every: int = 20,
    validate: Callable[[nn.Module, int], dict[str, float]] | None = None,
    validate_every: int = 0,
    name: str = "train",
    describe: Callable[[int], str] | None = None,
) -> dict[str, Any]:
    """Minimise `model.loss(batch)` over `steps` steps with a cosine schedule.

    AdamW at `lr`; with `muon_lr`, the hidden matrices go to Muon at that rate (see `dreamgen.engine.muon`).

    model: has `loss(batch) -> (scalar, {metric: scalar})`. On return it holds the final (averaged) weights.
    batch_at: pure function of the step; runs in a thread. describe: names a step's episodes for error messages.
    replicas: processes that split each batch on a CPU, where that can be (see `dreamgen.engine.replicas`); the noise
        that a loss draws depends on their number.
    out: `losses.jsonl`, `<name>.log` and the resumable state `training/` (delete it once the weights are saved).
    validate: called with the averaged weights every `validate_every` steps and at the end; its figures are logged.

    Returns the last mean loss, the last validation figures, steps, seconds.
    Raises ValueError at a loss that is not finite; the last good state stays.
    """
    out = Path(out)
    device = best_device()
    chosen = resolve(precision, device)
    logger = file_logger(name, out / f"{name}.log")
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(f"{name}: the model has no trainable weight; unfreeze a part or give it an adapter")
    model.to(device)
    optimisers = _optimisers(model, lr=lr, muon_lr=muon_lr, weight_decay=weight_decay, betas=betas)
    average = Ema(model, ema) if ema else None
    state, losses = out / STATE, out / "losses.jsonl"
    start = _restore(state, model, average, optimisers) if (state / "latest.json").is_file() else 0
    rows = [row for row in read_losses(out) if row["step"] < start]
    losses.write_text("".join(json.dumps(row) + "\n" for row in rows))
    logger.info("%d trainable parameters, %s, steps %d to %d", sum(p.numel() for p in trainable),
                chosen, start, steps)  # fmt: skip

    def check(step: int) -> dict[str, float]:
        if validate is None:
            return {}
        model.eval()
        if average:
            average.swap(model)
        with torch.no_grad(), autocast(chosen, device):
            figures = {k: float(v) for k, v in validate(model, step).items()}
        if average:
            average.swap(model)
        model.train()
        logger.info("step %d %s", step, figures)
        return figures

    replicas = possible(replicas, device)
    ahead = _Ahead(batch_at, steps)

    def work(step: int, rank: int) -> dict[str, float]:
        """Gradients of this replica's part of the step."""
        torch.manual_seed(seed_for(seed, "step", step, *([rank] if replicas > 1 else [])))
        batch = share(ahead(step), rank, replicas) if replicas > 1 else ahead(step)
        with autocast(chosen, device):
            loss, metrics = model.loss(_to(batch, device))
        if torch.isfinite(loss):
            loss.backward()
        return {key: float(value.detach()) for key, value in {"loss": loss, **metrics}.items()}

    model.train()
    sums: dict[str, float] = {}
    count, last, figures, begun = 0, {}, {}, time.time()
    with (
        Replicas(model, work, replicas) as team,
        bar(steps, name, initial=start, unit="step") as drawn,
        losses.open("a") as file,
    ):
        for step in range(start, steps):
            for group in (group for optimiser in optimisers for group in optimiser.param_groups):
                group["lr"] = group["peak"] * schedule(step, steps=steps, warmup=warmup)
            metrics = team.run(step)
            if not math.isfinite(metrics["loss"]):
                where = f" of {describe(step)}" if describe else ""
                raise ValueError(f"{name}: the loss is {metrics['loss']} at step {step}{where}. Lower the learning "
                                 f"rate ({lr}) or mend the data; {state} holds the last good state.")  # fmt: skip
            nn.utils.clip_grad_norm_(trainable, clip)
            for optimiser in optimisers:
                optimiser.step()
            model.zero_grad(set_to_none=True)
            if average:
                average.update(model, step)
            for key, value in metrics.items():
                sums[key] = sums.get(key, 0.0) + value
            count += 1
            drawn.update()
            due = validate_every and (step + 1) % validate_every == 0
            if (step + 1) % log_every == 0 or step + 1 == steps or due:
                last = {key: value / count for key, value in sums.items()}
                if due or step + 1 == steps:
                    figures = check(step + 1)
                row = {"step": step, "seconds": round(time.time() - begun, 2), **last}
                row |= {f"val_{k}": v for k, v in figures.items()} if due or step + 1 == steps else {}
                file.write(json.dumps(row) + "\n")
                file.flush()
                drawn.set_postfix({k: f"{v:.4f}" for k, v in list(last.items())[:2]}, refresh=False)
                sums, count = {}, 0
            if (step + 1) % checkpoint_every == 0 and step + 1 < steps:
                os.fsync(file.fileno())
                _save(state, step + 1, model, average, optimisers)
    if start < steps:
        _save(state, steps, model, average, optimisers)
    elif validate is not None:
        figures = check(steps)
    if average:
        average.swap(model)
    model.eval()
    done = read_losses(out)
    return {"loss": (last or (done[-1] if done else {})).get("loss"), "validation": figures, "steps": steps,
            "precision": chosen, "seconds": round(time.time() - begun, 2)}  # fmt: skip


def clear_state(out: Path) -> None:
    """Remove the resumable state of a run whose weights are saved."""
    shutil.rmtree(Path(out) / STATE, ignore_errors=True)
