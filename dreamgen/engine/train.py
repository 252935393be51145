"""The one training loop.

Data are addressed by step (`batch_at(step)` is a pure function) and the generators are seeded anew at each step, so
the whole state of a run is (step, weights, EMA, optimiser): a run that is killed and continued ends in the same bits
as one that was not, and may continue on another number of processes.
"""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dreamgen.core.seeding import seed_for
from dreamgen.engine.ahead import Ahead
from dreamgen.engine.compiling import no_new_code
from dreamgen.engine.devices import exhausted
from dreamgen.engine.journal import Journal
from dreamgen.engine.optimiser import optimisers, schedule
from dreamgen.engine.precision import autocast, best_device, resolve
from dreamgen.engine.processes import Processes, agreed, wait
from dreamgen.engine.replicas import Replicas, possible
from dreamgen.engine.shares import Part, parts_of
from dreamgen.engine.state import STATE, Ema, clear_state, load_best, read_losses, restore, save, save_best, whole

__all__ = ["Ema", "clear_state", "read_losses", "schedule", "train"]

KEEP_SECONDS = 900.0  # a state at least so often
SPARE = 20.0  # and at most a twentieth of the time for keeping such


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
    accumulate: int | None = None,
    sharding: str | None = None,
    rates: Mapping[str, float] | None = None,
    restarts: Path | None = None,
    patience: int = 0,
    tracker: str | None = None,
    flops: float | None = None,
    checkpoint_every: int = 500,
    log_every: int = 20,
    validate: Callable[[nn.Module, int], dict[str, float]] | None = None,
    validate_every: int = 0,
    name: str = "train",
    describe: Callable[[int], str] | None = None,
) -> dict[str, Any]:
    """Minimise `model.loss(batch)` over `steps` steps with a cosine schedule.

    AdamW at `lr`; with `muon_lr`, the hidden matrices go to Muon at that rate (see `dreamgen.engine.muon`).

    model: has `loss(batch) -> (scalar, {metric: scalar})`. On return it holds the final (averaged) weights. What moves
        with the weights and is no weight moves in its `after_step()`, if it has one: `loss` runs in all replicas.
    batch_at: pure function of the step, the batch of all processes (`Rows` are read by those who want them); runs in a
        thread. describe: names a step's episodes for error messages.
    replicas: processes that split each batch on a CPU, where that can be (see `dreamgen.engine.replicas`); the noise
        that a loss draws depends on their number.
    accumulate: parts of a process's share whose gradients are added up before a step: less memory, the same result.
    sharding: how processes share the model, "ddp" or "fsdp2" (see `dreamgen.engine.processes`). None, for both, where
        the stage has no such setting, and then none is advised.
    rates: see `dreamgen.engine.optimiser`. restarts: what the stage takes as `start` to begin with these weights.
    patience: validations without a lower loss after which to stop, with the best weights; 0 never stops.
    tracker, flops: see `dreamgen.engine.journal`.
    out: `losses.jsonl`, `<name>.log` and the resumable state `training/` (delete it once the weights are saved).
    checkpoint_every: steps after which the state is kept; where these take long it is kept every quarter of an hour,
        too, or every twentyfold of what keeping takes.
    validate: called with the averaged weights every `validate_every` steps and at the end; its figures are logged.

    Returns the last mean loss, the last validation figures, steps, seconds, the share of time spent on data.
    Raises ValueError at a loss or gradient that is not finite, and where memory does not suffice; the last good state
    stays.
    """
    out = Path(out)
    device = best_device()
    chosen = resolve(precision, device)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"{name}: the model has no trainable weight; unfreeze a part or give it an adapter")
    team = Processes(model, sharding=sharding or "ddp")
    if team.sharded and muon_lr:
        raise ValueError(f"{name}: muon_lr is {muon_lr}, but Muon moves whole matrices, which fsdp2 cuts; set it to "
                         "null, or take sharding=ddp")  # fmt: skip
    replicas = possible(replicas, device) if team.count == 1 else 1
    if replicas > 1 and any(getattr(part, "moves_in_loss", False) for part in model.modules()):
        raise ValueError(f"replicas is {replicas}, but this model moves a codebook of its own while it computes a "
                         f"loss, which replicas would share: set stage.replicas=1")  # fmt: skip
    state = out / STATE
    with memory(name, 0, accumulate, sharding, model):
        movers = optimisers(model, lr=lr, muon_lr=muon_lr, weight_decay=weight_decay, betas=betas, rates=rates)
        average = Ema(model, ema) if ema else None
        start = restore(state, model, average, movers)
    weights = [p for p in model.parameters() if p.requires_grad]
    journal = Journal(out, name, team, start=start, steps=steps, tracker=tracker, flops=flops, replicas=replicas)
    journal.log.info("%d trainable parameters, %s, steps %d to %d", sum(p.numel() for p in weights), chosen, start,
                     steps)  # fmt: skip
    figures: dict[str, float] = {}
    begun, stopped, kept = time.time(), start, start or None
    next_keep = time.monotonic() + KEEP_SECONDS

    def check(step: int) -> dict[str, float]:
        """Figures of the averaged weights, the same for all processes; the best weights are kept."""
        if validate is None:
            return {}
        model.eval()
        if average:
            average.swap(model)
        with torch.no_grad(), autocast(chosen, device, cached=not team.sharded), no_new_code():
            with memory(name, step, accumulate, sharding, model):
                found = agreed({k: float(v) for k, v in validate(model, step).items()})
        before = [row["val_loss"] for row in journal.rows if "val_loss" in row]
        if patience and found.get("loss", math.inf) < min(before, default=math.inf):
            save_best(state, model, write=team.main)
        if average:
            average.swap(model)
        model.train()
        return found

    def require_finite(what: str, value: float, step: int) -> None:
        """ValueError for a number that is none. It has not reached the weights, so these are kept."""
        if math.isfinite(value):
            return
        held = kept
        if held != step and agreed(all(bool(b.isfinite().all()) for b in model.buffers())):  # codebooks move in a loss
            save(state, step, model, average, movers, write=team.main)
            held = step
        where = f" of {describe(step)}" if describe else ""
        good = "No state was kept" if held is None else f"{state} holds the last good state, that of step {held}"
        begin = f" (stage.start={restarts} begins with its weights)" if restarts and held is not None else ""
        raise ValueError(f"{name}: the {what} is {value} at step {step}{where}. Lower the learning rate ({lr}) or mend "
                         f"the data, and choose another `out`: this one only goes on as it began. {good}{begin}."
                         )  # fmt: skip

    ahead: dict[int, Ahead] = {}

    def work(step: int, replica: int) -> dict[str, float]:
        """Gradients of this replica's part of the step."""
        if replica not in ahead:
            cut = (replica, replicas, team.rank, team.count, accumulate or 1)
            ahead[replica] = Ahead(lambda step: parts_of(batch_at(step), *cut, device), steps)
        sums: dict[str, float] = {}
        parts: list[Part] = ahead[replica](step)
        for part in parts:
            torch.manual_seed(seed_for(seed, "step", step, *([replica] if replicas > 1 else [])))
            with team.alone(part is parts[-1]):
                with autocast(chosen, device, cached=not team.sharded), part.noise():
                    loss, metrics = team.loss(part.to(device))
                if team.count > 1 or torch.isfinite(loss):
                    (loss * (part.weight * team.count)).backward()
            for key, value in {"loss": loss, **metrics}.items():
                sums[key] = sums.get(key, 0.0) + float(value.detach()) * part.weight
        return team.total(sums)

    model.train()
    with Replicas(model, work, replicas) as group, journal:
        for step in range(start, steps):
            if patience and (journal.since_best("val_loss") or 0) >= patience:
                journal.log.info("stopped at step %d: no lower validation loss in %d validations", step, patience)
                break
            for options in (options for mover in movers for options in mover.param_groups):
                options["lr"] = options["peak"] * schedule(step, steps=steps, warmup=warmup)
            clock, waited = time.perf_counter(), ahead[0].waited if ahead else 0.0
            with memory(name, step, accumulate, sharding, model):
                metrics = group.run(step)
                require_finite("loss", metrics["loss"], step)
                require_finite("norm of the gradient", float(whole(nn.utils.clip_grad_norm_(weights, clip))), step)
                for mover in movers:
                    mover.step()
                model.zero_grad(set_to_none=True)
                if hasattr(model, "after_step"):
                    model.after_step()
                if average:
                    average.update(model, step)
            stopped = step + 1
            journal.add(metrics, time.perf_counter() - clock, ahead[0].waited - waited)
            due = bool(validate_every) and stopped % validate_every == 0 or stopped == steps
            if stopped % log_every == 0 or due:
                figures = check(stopped) if due else figures
                journal.write(step, figures if due else {})
            if (stopped % checkpoint_every == 0 or agreed(time.monotonic() >= next_keep)) and stopped < steps:
                saving = time.monotonic()
                journal.keep()
                save(state, stopped, model, average, movers, write=team.main)
                kept, took = stopped, time.monotonic() - saving
                next_keep = time.monotonic() + max(KEEP_SECONDS, SPARE * took)
    if start == stopped:
        figures = check(stopped)
    elif kept != stopped:  # one that is there is not written again: a kill would leave it in pieces
        save(state, stopped, model, average, movers, write=team.main)
    if average:
        average.swap(model)
    wait()
    if patience and load_best(state, model):
        best = min((row for row in journal.rows if "val_loss" in row), key=lambda row: row["val_loss"])
        figures = {key.removeprefix("val_"): value for key, value in best.items() if key.startswith("val_")}
        figures["step"] = best["step"] + 1
    model.eval()
    movers.clear()
    team.release()
    return {**journal.summary(), "validation": figures, "steps": stopped, "precision": chosen, "processes": team.count,
            "seconds": round(time.time() - begun, 2)}  # fmt: skip


class memory:
    """A context in which a lack of memory is told as what would fit, by settings that the stage has: one that shards a
    model also trains it with checkpointing, or an adapter of it."""

    def __init__(self, name: str, step: int, accumulate: int | None, sharding: str | None, model: nn.Module) -> None:
        self.name, self.step, self.less = name, step, ["a smaller batch"]
        if sharding is not None:
            self.less = ["method=lora", "sharding=fsdp2 on several GPUs", *self.less]
        if accumulate is not None:
            self.less.insert(0, f"accumulate={2 * accumulate} (the same result)")
        if sharding is not None and not any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
            self.less.insert(0, "checkpointing=true")

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if exhausted(error) and not isinstance(error, ValueError):  # which is told already
            raise ValueError(f"{self.name}: out of memory at step {self.step}. What takes less, in this order: "
                             f"{', '.join(self.less)} ({str(error).splitlines()[0]})") from error  # fmt: skip
