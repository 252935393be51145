"""The processes of one run, as `torchrun` or Slurm start them: who they are, and how they share one model.

Each process works on its rows of the same global batch (see `dreamgen.engine.shares`), so their number changes nothing
but the order of sums. "ddp" keeps the whole model in each process. "fsdp2" (arXiv:2304.11277, torch's `fully_shard`)
cuts every block's weights, gradients and optimiser state over all of them, for models that do not fit: a block goes
from the CPU to the GPU when it is cut, so a GPU holds its share and one whole block; a machine's main memory holds a
whole model for each process.
"""

import atexit
import contextlib
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dreamgen.engine.precision import best_device
from dreamgen.engine.state import whole

SHARDINGS = ("ddp", "fsdp2")
SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}
PATIENCE = timedelta(hours=6)  # with which one waits for others, who encode, dream samples or write tens of GB


def from_slurm(environment: dict[str, str] | os._Environ = os.environ) -> None:
    """Name this process as `torchrun` would, where `srun` started several tasks for one run.

    `srun` alone says SLURM_STEP_NUM_TASKS. The script of a job, which runs once, is told SLURM_NTASKS and a
    SLURM_PROCID of 0 all the same, and would wait for processes that nobody starts.
    """
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", 1)) < 2:
        return
    for name, slurm in SLURM.items():
        environment[name] = environment[slurm]
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "localhost")
    environment.setdefault("MASTER_ADDR", first_node(nodes))
    environment.setdefault("MASTER_PORT", str(20000 + int(environment.get("SLURM_JOB_ID", 0)) % 20000))


def first_node(nodes: str) -> str:
    """The first name of a Slurm node list: "gpu[07-09,12],cpu1" is "gpu07"."""
    name, bracket, rest = nodes.partition("[")
    if not bracket or "," in name:
        return name.split(",")[0]
    return name + rest.partition("]")[0].split(",")[0].split("-")[0]


def join() -> tuple[int, int]:
    """Rank and number of the processes of this run; the first call meets the others. Alone it is (0, 1)."""
    from_slurm()
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        return 0, 1
    from accelerate import PartialState

    if not dist.is_initialized():
        atexit.register(leave)
    state = PartialState(cpu=best_device().type == "cpu", timeout=PATIENCE)
    return state.process_index, state.num_processes


def leave() -> None:
    """End gloo's threads while Python still runs.

    One that lets go of a tensor after the interpreter has gone aborts the process, whose work was done
    (pytorch/pytorch#179291). NCCL is left alone: its end waits for processes that may have failed.
    """
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


def require_alone(stage: str) -> None:
    """Raise ValueError where several processes were started for `stage`, which is the work of one."""
    from_slurm()
    if (count := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ValueError(f"{stage} is the work of one process, and torchrun or srun has started {count}, all of which "
                         f"would write to one folder; start it alone (of all training only finetune and "
                         "finetune_actions can be shared)")  # fmt: skip


def wait() -> None:
    """Until all processes are here."""
    if dist.is_initialized():
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def agreed(value: Any) -> Any:
    """What the first process says."""
    if not dist.is_initialized():
        return value
    said = [value]
    dist.broadcast_object_list(said, src=0)
    return said[0]


def require_sharding(sharding: str) -> None:
    """Raise ValueError for a way of sharing that is not known."""
    if sharding not in SHARDINGS:
        raise ValueError(f"sharding is '{sharding}'; expected one of {', '.join(SHARDINGS)}")


class Step(nn.Module):
    """`model.loss` as a forward pass, where DDP listens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self.model.loss(batch)


class Processes:
    """`model` on all processes of a run, moved to their devices. `loss(batch)` is the model's, with gradients averaged
    over the processes.

    Raises ValueError for another `sharding`, and for a model that "fsdp2" cannot cut.
    """

    def __init__(self, model: nn.Module, *, sharding: str = "ddp") -> None:
        require_sharding(sharding)
        self.rank, self.count = join()
        self.main, self.model = self.rank == 0, model
        self.sharded: list[nn.Module] = []
        self.step: nn.Module | None = None
        if self.count > 1 and sharding == "fsdp2":
            self._cut(model)
        model.to(best_device())
        if self.count > 1 and sharding == "ddp":
            from accelerate import Accelerator
            from accelerate.utils import DistributedDataParallelKwargs

            # every weight of a diffusers model is used at each step; of others, and of two experts, some may not be
            trained = [type(part) for part in outermost(model) if any(p.requires_grad for p in part.parameters())]
            partly = not trained or len(set(trained)) < len(trained)
            # gradients lie in the buffers that are exchanged; else each would be held twice
            options = DistributedDataParallelKwargs(find_unused_parameters=partly,
                                                    gradient_as_bucket_view=True)  # fmt: skip
            accelerator = Accelerator(cpu=best_device().type == "cpu", kwargs_handlers=[options])
            self.step = accelerator.prepare_model(Step(model))

    def _cut(self, model: nn.Module) -> None:
        from torch.distributed.fsdp import fully_shard

        for parameter in (p for p in model.parameters() if p.requires_grad):
            first = parameter.data.to(best_device())  # an adapter's first weights are drawn in each process
            dist.broadcast(first, 0)
            parameter.data.copy_(first)
        for part in outermost(model):
            blocks = set(getattr(part, "_no_split_modules", None) or getattr(part, "_repeated_blocks", None) or ())
            for block in [m for m in part.modules() if type(m).__name__ in blocks]:
                fully_shard(block)
                self.sharded.append(block)
            # also the outermost, which FSDP would else leave whole after a forward pass without a backward one
            fully_shard(part, reshard_after_forward=True)
            self.sharded.append(part)
        left = [k for k, p in model.named_parameters() if p.requires_grad and whole(p) is p]
        if left:
            raise ValueError(f"fsdp2 cuts diffusers and transformers models into their blocks; {left[0]} and "
                             f"{len(left) - 1} more are outside of one. Use sharding=ddp.")  # fmt: skip

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self.model.loss(batch) if self.step is None else self.step(batch)

    def alone(self, last: bool) -> AbstractContextManager:
        """Leave gradients of all but the last part of a step where they are, unaveraged.

        A model that is cut averages those of every part: a GPU has no room for more than its share of them.
        """
        return contextlib.nullcontext() if last or self.step is None else self.step.no_sync()

    def total(self, metrics: dict[str, float]) -> dict[str, float]:
        """Sums over the processes."""
        if self.count == 1:
            return metrics
        values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=best_device())
        dist.all_reduce(values)
        return dict(zip(metrics, values.tolist(), strict=True))

    def release(self) -> None:
        """Give back a plain model: weights that were cut are gathered, on the CPU."""
        for part in reversed(self.sharded):
            state = part._get_fsdp_state()
            handles = [state._pre_forward_hook_handle, state._post_forward_hook_handle]
            if group := state._fsdp_param_group:  # without these, `state_dict` would put the shares back
                handles += group._module_to_pre_save_state_dict_hook_handle.values()
                handles += group._module_to_pre_load_state_dict_hook_handle.values()
            for handle in handles:
                handle.remove()
            part.__class__ = part.__class__.__bases__[1]
        replace(self.model, lambda p: whole(p.detach()).cpu() if self.sharded else p)
        self.sharded, self.step = [], None


def outermost(model: nn.Module) -> Iterable[nn.Module]:
    """The diffusers and transformers models inside `model`, which are called as a whole, and what else names the
    modules that it is cut into as these do."""
    for child in model.children():
        if hasattr(child, "_no_split_modules") or hasattr(child, "_repeated_blocks"):
            yield child
        else:
            yield from outermost(child)


def replace(model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Put `change(parameter)` in place of each parameter that it changes."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and (made := change(parameter)) is not parameter:
                module._parameters[name] = nn.Parameter(made, requires_grad=parameter.requires_grad)
