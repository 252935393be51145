"""The whole state of a run: step, weights, their average, optimisers. One format for any number of processes.

Sharded tensors are gathered before they are written and cut again when they are read, so a run may go on with other
processes, or with another way of sharing the model, than it began with.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dreamgen.core.manifest import read_json, replacing, write_json

STATE = "training"
BEST = "best.safetensors"


def whole(value: Tensor) -> Tensor:
    """All of a tensor that may be sharded; every process calls it."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def cut(value: Tensor, like: Tensor) -> Tensor:
    """`value` on the device of `like`, sharded as `like` is."""
    if hasattr(like, "full_tensor") and value.shape == like.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value.to(like.device) if value.ndim else value


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


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The trainable weights by name, whole, on the CPU."""
    return {k: whole(p.detach()).contiguous().cpu() for k, p in model.named_parameters() if p.requires_grad}


def gathered(state: dict) -> dict:
    """An optimiser's state with all of each tensor."""
    return {**state, "state": {k: {n: whole(v) for n, v in of.items()} for k, of in state["state"].items()}}


def save(folder: Path, step: int, model: nn.Module, ema: Ema | None, optimisers: list, *, write: bool = True) -> None:
    """Write the state beside the last one, then let `latest.json` point at it: a kill leaves the older state whole.

    All processes call it; the one with `write` writes.
    """
    weights, moved = trainable(model), [gathered(optimiser.state_dict()) for optimiser in optimisers]
    average = {k: whole(v).contiguous().cpu() for k, v in ema.shadow.items()} if ema else {}
    if not write:
        return
    path = folder / f"step_{step:08d}"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    save_file(weights, path / "model.safetensors")
    buffers = {k: b.detach().contiguous().cpu().clone() for k, b in model.named_buffers()}
    save_file(buffers, path / "buffers.safetensors")
    if ema:
        save_file(average, path / "ema.safetensors")
    torch.save(moved, path / "optimisers.pt")
    write_json(folder / "latest.json", {"step": step})
    for old in folder.glob("step_*"):
        if old != path:
            shutil.rmtree(old, ignore_errors=True)


@torch.no_grad()
def restore(folder: Path, model: nn.Module, ema: Ema | None, optimisers: list) -> int:
    """Read what `save` wrote into a model and optimisers that may be shared otherwise; returns the step, 0 if none."""
    if not (folder / "latest.json").is_file():
        return 0
    step = int(read_json(folder / "latest.json")["step"])
    path = folder / f"step_{step:08d}"
    live = dict(model.named_parameters()) | dict(model.named_buffers())
    for file in ("model.safetensors", "buffers.safetensors"):
        for name, value in load_file(path / file).items():
            live[name].copy_(cut(value, live[name]))
    if ema:
        ema.shadow = {k: cut(v, live[k]) for k, v in load_file(path / "ema.safetensors").items()}
    states = torch.load(path / "optimisers.pt", weights_only=True)
    for optimiser, saved in zip(optimisers, states, strict=True):
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        for number, of in saved["state"].items():
            saved["state"][number] = {n: cut(v, parameters[number]) if isinstance(v, Tensor) else v
                                      for n, v in of.items()}  # fmt: skip
        optimiser.load_state_dict(saved)
    return step


def save_best(folder: Path, model: nn.Module, *, write: bool = True) -> None:
    """Keep the trainable weights as they are now as the best so far."""
    weights = trainable(model)
    if write:
        with replacing(folder / BEST) as temporary:
            save_file(weights, temporary)


@torch.no_grad()
def load_best(folder: Path, model: nn.Module) -> bool:
    """Give the model the best weights, if any were kept."""
    if not (folder / BEST).is_file():
        return False
    live = dict(model.named_parameters())
    for name, value in load_file(folder / BEST).items():
        live[name].copy_(cut(value, live[name]))
    return True


def clear_state(out: Path) -> None:
    """Remove the resumable state of a run whose weights are saved."""
    shutil.rmtree(Path(out) / STATE, ignore_errors=True)


def read_losses(out: Path) -> list[dict[str, Any]]:
    """The rows of a run's loss curve: step, seconds, loss and metrics."""
    path = Path(out) / "losses.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
