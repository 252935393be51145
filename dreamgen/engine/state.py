"""The whole state of a run: step, weights, their average, optimisers. One format for any number of processes.

Sharded tensors are gathered before they are written and cut again when they are read, so a run may go on with other
processes, or with another way of sharing the model, than it began with.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dreamgen.core.manifest import read_json, replacing, settle, write_json

STATE = "training"
BEST = "best.safetensors"
FROZEN = "frozen.safetensors"


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


def gathered(values: Iterable[tuple[Any, Tensor]], *, keep: bool) -> dict[Any, Tensor]:
    """All of each tensor, on the CPU, by its name. Every process calls it; one without `keep` gets nothing.

    One after another: a GPU holds no more than one whole tensor beside its shares.
    """
    found = {}
    for name, value in values:
        value = whole(value)
        if keep:
            found[name] = value.contiguous().cpu()
    return found


def trainable(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The trainable weights by name, as `gathered`."""
    return gathered(((k, p.detach()) for k, p in model.named_parameters() if p.requires_grad), keep=keep)


def moments(optimiser: torch.optim.Optimizer, *, keep: bool) -> dict:
    """An optimiser's state, its tensors as `gathered`."""
    state = optimiser.state_dict()
    return {**state, "state": {number: gathered(of.items(), keep=keep) for number, of in state["state"].items()}}


def save(folder: Path, step: int, model: nn.Module, ema: Ema | None, optimisers: list, *, write: bool = True) -> None:
    """Write the state beside the last one, then let `latest.json` point at it: a kill leaves the older state whole.

    All processes call it; the one with `write` writes.
    """
    weights, moved = trainable(model, keep=write), [moments(optimiser, keep=write) for optimiser in optimisers]
    average = gathered(ema.shadow.items(), keep=write) if ema else {}
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
    settle(path)
    write_json(folder / "latest.json", {"step": step})
    for old in folder.glob("step_*"):
        if old != path:
            shutil.rmtree(old, ignore_errors=True)


def states_gb(model: nn.Module) -> float:
    """Of a disk that a training of `model` writes at most, in GB: weights, average and two moments, in two states while
    one takes the place of another; the best weights, and the last. What is not trained is written up to three times."""
    sizes = [(10 if x.requires_grad else 3) * x.nbytes for x in (*model.parameters(), *model.buffers())]
    return sum(sizes) / 1e9


def keep_frozen(folder: Path, model: nn.Module) -> None:
    """Keep, beside the states, the weights that `save` leaves out, of a model that is made with others."""
    frozen = {name: p.detach().contiguous().cpu() for name, p in model.named_parameters() if not p.requires_grad}
    if frozen and not (folder / FROZEN).is_file():
        with replacing(folder / FROZEN) as temporary:
            save_file(frozen, temporary)


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
    states = torch.load(path / "optimisers.pt", map_location="cpu", mmap=True, weights_only=True)
    for optimiser, saved in zip(optimisers, states, strict=True):
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        for number, of in saved["state"].items():
            saved["state"][number] = {n: cut(v, parameters[number]) if isinstance(v, Tensor) else v
                                      for n, v in of.items()}  # fmt: skip
        optimiser.load_state_dict(saved)
    return step


def holds(out: Path) -> bool:
    """Whether a run has saved its weights in `out`, or kept a state there."""
    return (Path(out) / "model.safetensors").is_file() or (Path(out) / STATE / "latest.json").is_file()


def weights_of(out: Path) -> dict[str, Tensor]:
    """Weights and buffers by name of what a run has saved in `out`, or else of the last state that it kept there,
    averaged where these are, and frozen ones where they were kept. ValueError where there is neither."""
    out, latest = Path(out), Path(out) / STATE / "latest.json"
    files = [out / "model.safetensors"]
    if not files[0].is_file() and latest.is_file():
        step = out / STATE / f"step_{int(read_json(latest)['step']):08d}"
        files = [*(step / f"{kind}.safetensors" for kind in ("model", "buffers", "ema")), latest.parent / FROZEN]
    if not files[0].is_file():
        raise ValueError(f"{out} holds neither saved weights nor the state of a training; name the folder of a run")
    return {name: value for file in files if file.is_file() for name, value in load_file(file).items()}


def begin_with(model: nn.Module, out: Path) -> None:
    """Give a model the weights and buffers of `out` (see `weights_of`). ValueError where it is another model's."""
    take_over(model, weights_of(out), out)


@torch.no_grad()
def take_over(model: nn.Module, found: Mapping[str, Tensor], out: Path, *, but: str | None = None) -> None:
    """Give a model weights and buffers by name, which are those of `out`; but: how the names of those begin that stay
    its own. ValueError where they are another model's."""
    live = dict(model.named_parameters()) | dict(model.named_buffers())
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}  # a state leaves them out
    lacking = [name for name in model.state_dict() if name not in found and name not in frozen
               and not (but and name.startswith(but))]  # fmt: skip
    other = [name for name, value in found.items() if name not in live or live[name].shape != value.shape]
    if lacking or other:
        raise ValueError(f"{out} is no beginning for this model: {len(lacking)} of its weights are not there, and "
                         f"{len(other)} are there that it has not, or has in another size; the first is "
                         f"{[*lacking, *other][0]}")  # fmt: skip
    for name, value in found.items():
        live[name].copy_(value)


def save_best(folder: Path, model: nn.Module, *, write: bool = True) -> None:
    """Keep the trainable weights as they are now as the best so far."""
    weights = trainable(model, keep=write)
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


def clear_state(*outs: Path) -> None:
    """Remove the resumable states of runs whose manifest is there: first what points at one, so that a kill leaves none
    that is half there."""
    for out in outs:
        (Path(out) / STATE / "latest.json").unlink(missing_ok=True)
        shutil.rmtree(Path(out) / STATE, ignore_errors=True)


def read_losses(out: Path) -> list[dict[str, Any]]:
    """The rows of a run's loss curve: step, seconds, loss and metrics; no last one that a power cut broke off."""
    path = Path(out) / "losses.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
