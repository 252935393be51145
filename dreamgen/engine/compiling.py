"""torch.compile of the blocks that a model repeats.

On a CPU most of a small model's step goes into reading and writing tensors between its many small operations; fused
they take well under half the time. Inductor needs a C++ compiler there, which a bare machine may lack.
"""

import contextlib
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from dreamgen.engine.precision import best_device

CHOICES = (True, False, "auto")
ENOUGH = 100  # training steps that save the time which compiling takes


def wanted(choice: bool | str, *, steps: int = ENOUGH) -> bool:
    """Whether to compile for `steps` steps; "auto": on a CPU with a C++ compiler, if they are `ENOUGH`.

    Raises ValueError for another choice, and for true on a CPU that lacks a compiler or Python's headers.
    """
    if choice not in CHOICES:
        raise ValueError(f"compile is {choice!r}; expected one of {CHOICES}")
    on_cpu = best_device().type == "cpu"
    lacks = missing() if on_cpu else ""
    if choice is True and lacks:
        raise ValueError(f"compile=true needs {lacks} on a CPU; install it, or set compile=auto")
    return choice is True or (choice == "auto" and on_cpu and not lacks and steps >= ENOUGH)


def missing() -> str:
    """What a CPU's code cannot be compiled without and is not there, "" for nothing."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "a C++ compiler (c++, g++ or clang++ in PATH)"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return "" if header.is_file() else f"Python's headers ({header})"


def compile_blocks(*modules: nn.Module) -> None:
    """Compile, in place, all entries of the lists of blocks in each module, equal blocks once; names of weights stay.
    Forks may follow: nothing is started."""
    import torch._inductor.config as inductor

    if best_device().type == "cpu":
        inductor.compile_threads = 1  # no pool of helpers, which a fork could not use
    for module in modules:
        for blocks in (child for child in module.children() if isinstance(child, nn.ModuleList)):
            for block in blocks:
                block.compile()


@contextlib.contextmanager
def no_new_code() -> Iterator[None]:
    """Inside, what has been compiled is used, and all else runs as it is written: for shapes that come once."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("eager_on_recompile"):
        yield
