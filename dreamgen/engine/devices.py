"""What machines can do at most: the data sheets in `devices.json`, dense bf16, and this CPU by a short measurement."""

import json
import os
import time
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import torch

from dreamgen.engine.precision import autocast, best_device


@dataclass(frozen=True, kw_only=True)
class Device:
    """bf16: FLOP/s of dense matrix products, 0 where unknown; memory: bytes."""

    name: str
    bf16: float
    memory: float
    match: str = ""


@cache
def table() -> dict[str, Device]:
    """The known GPUs by their short names."""
    rows = json.loads((files("dreamgen.engine") / "devices.json").read_text())
    return {key: Device(**row) for key, row in rows.items()}


def device(name: str) -> Device:
    """A GPU of the table, "cpu", or "here": the accelerator of this machine, else its CPU. ValueError names them."""
    if name == "cpu" or (name == "here" and best_device().type == "cpu"):
        return this_cpu(torch.get_num_threads())
    if name == "here":
        return this_gpu()
    if name not in table():
        raise ValueError(f"gpu is '{name}'; expected one of {', '.join(table())}, cpu, here")
    return table()[name]


def this_gpu() -> Device:
    """The GPU in use; one that the table does not know has a peak of 0."""
    found = torch.cuda.get_device_properties(0)
    fitting = [row for row in table().values() if row.match in found.name]
    known = max(fitting, key=lambda row: len(row.match), default=None)
    return Device(name=found.name, memory=found.total_memory, bf16=known.bf16 if known else 0.0)


@cache
def this_cpu(threads: int) -> Device:
    """This machine's processors on so many threads; their peak is the best of ten products in the best precision.

    Counted in processor time: on a busy machine the clock on the wall measures the neighbours.
    """
    size = 768
    a = torch.ones(size, size)
    seconds = []
    with torch.no_grad(), autocast("auto"):
        for _ in range(10):
            begun = time.process_time()
            torch.mm(a, a)
            seconds.append((time.process_time() - begun) / threads)
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(name=f"this CPU, {threads} threads", bf16=2 * size**3 / min(seconds), memory=float(pages))


def exhausted(error: BaseException | None) -> bool:
    """Whether an error says that an allocation failed, on a GPU or a CPU."""
    words = ("allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def memory_left() -> float:
    """Bytes that this process can still take on the device in use."""
    if best_device().type == "cuda":
        return float(torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
