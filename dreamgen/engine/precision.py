"""Which number format pays on this machine."""

import contextlib
import warnings
from contextlib import AbstractContextManager

import torch
from torch import nn

from dreamgen.engine.onednn import OneDnn, available

PRECISIONS = ("auto", "fp32", "bf16")
# torch says so of every norm whose weights stay as they are under `autocast`
warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")


def resolve(precision: str, device: torch.device | str = "cpu") -> str:
    """ "auto" is bf16 where the hardware multiplies it (CUDA, CPUs with AMX or AVX512-BF16), else fp32."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision is '{precision}'; expected one of {', '.join(PRECISIONS)}")
    if precision != "auto":
        return precision
    if torch.device(device).type == "cuda":
        return "bf16"
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast else "fp32"


def autocast(precision: str, device: torch.device | str = "cpu", *, cached: bool = True) -> AbstractContextManager:
    """Context in which matrix products run in `precision`; weights stay as they are.

    cached: a weight's bf16 copy is kept until the context ends. Of a model that is cut over GPUs (fsdp2) that would be
    the whole model on each of them; contexts inside this one then keep none either.
    """
    kind = torch.device(device).type
    if resolve(precision, device) == "fp32":
        return OneDnn() if kind == "cpu" and available() else contextlib.nullcontext()
    return torch.autocast(kind, dtype=torch.bfloat16, cache_enabled=None if cached else False)


def best_device() -> torch.device:
    """The accelerator if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def place(*parts: object) -> None:
    """Move models to the best device: as they say themselves (`place`), or all of a module; of a policy that joins or
    changes the chunks of another (`policy`) the inner one. None is nothing, and what a server computes stays there.

    Models are opened on the CPU, so that a stage may look at them, and at what it is asked, before it takes a GPU.
    """
    for part in map(_inner, parts):
        if hasattr(part, "place"):
            part.place()
        elif isinstance(part, nn.Module):
            part.to(best_device())


def withdraw(*parts: object) -> None:
    """Move what `place` moved back to main memory, as it says itself (`place` of a device), or all of a module, and
    leave the accelerator's to what comes next."""
    cpu = torch.device("cpu")
    for part in map(_inner, parts):
        if hasattr(part, "place"):
            part.place(cpu)
        elif isinstance(part, nn.Module):
            part.to(cpu)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _inner(part: object) -> object:
    """What of a part holds the weights."""
    while not isinstance(part, nn.Module) and not hasattr(part, "place") and hasattr(part, "policy"):
        part = part.policy
    return part
