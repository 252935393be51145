"""LoRA adapters in diffusers' files: trained ones saved for anybody's pipeline, anybody's stacked on a pipeline."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dreamgen.core.manifest import read_json

TASK = "default"  # the adapter that a training adds
FOLDER, FILE = "adapter", "world.json"  # where a world model keeps its adapter, and the file beside it


def add_lora(module: nn.Module, *, rank: int, alpha: int, targets: Sequence[str]) -> None:
    """Put a trainable LoRA on the layers whose names end in one of `targets`, in fp32.

    Raises ValueError if there is no such layer.
    """
    from peft import LoraConfig

    layers = [name for name, _ in module.named_modules()]
    idle = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in layers)]
    if idle:
        raise ValueError(f"LoRA targets {idle} name no layer of {type(module).__name__}; its linear layers are "
                         f"called, for instance, {_linear(module)}")  # fmt: skip
    module.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian",
                                  target_modules=list(targets)), TASK)  # fmt: skip
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _linear(module: nn.Module) -> list[str]:
    """What the linear layers of the blocks are called, without the blocks' numbers."""
    names = [name.split(".") for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    return sorted({".".join(name[2:]) for name in names if len(name) > 2 and name[1].isdigit()})[:8]


def load_adapters(pipe: Any, experts: Mapping[str, nn.Module], entries: Sequence[Mapping[str, Any]]) -> None:
    """Load adapters {path, weight = 1, expert, weight_name, revision} and activate them all with their weights.

    An adapter goes to the transformer that `expert` names, else to those that its training had, as the file beside it
    says where a world model saved it, else to every one; a subfolder called `transformer_2` holds what goes to the
    second, and a folder with nothing else goes to that alone. Raises ValueError for one that is not there or fits
    nowhere.
    """
    names: dict[str, dict[str, float]] = {expert: {} for expert in experts}
    for i, entry in enumerate(entries):
        known = {"path", "weight", "expert", "weight_name", "revision"}
        if "path" not in entry or set(entry) - known:
            raise ValueError(f"adapter {i} is {dict(entry)}; expected a path and any of {sorted(known - {'path'})}")
        for expert in [entry["expert"]] if entry.get("expert") else _meant(Path(entry["path"]), experts):
            if expert not in experts:
                raise ValueError(f"adapter {entry['path']} is for '{expert}'; the pipeline has {sorted(experts)}")
            path, second = str(entry["path"]), Path(entry["path"]) / expert
            path = str(second) if expert != "transformer" and second.is_dir() else path
            name = f"{TASK}_{i}"
            _load(pipe, experts[expert], path, name, {k: entry[k] for k in ("weight_name", "revision") if k in entry})
            names[expert][name] = float(entry.get("weight", 1.0))
    for expert, weights in names.items():
        if weights:
            experts[expert].set_adapters(list(weights), list(weights.values()))


def _meant(folder: Path, experts: Mapping[str, nn.Module]) -> list[str]:
    """The transformers that an adapter's folder is for, where nobody names one."""
    told = folder.parent / FILE
    if folder.name == FOLDER and told.is_file() and (trained := read_json(told).get("experts")):
        return trained
    inside = [name for name in experts if (folder / name).is_dir()]
    return inside if inside and not any(folder.glob("*.safetensors")) else list(experts)


def _load(pipe: Any, module: nn.Module, path: str, name: str, options: dict[str, Any]) -> None:
    state: Any = path
    try:
        if hasattr(pipe, "lora_state_dict"):  # knows other trainers' names
            state, options = pipe.lora_state_dict(path, return_lora_metadata=True, **options)
            expand = getattr(pipe, "_maybe_expand_t2v_lora_for_i2v", None)
            state = expand(transformer=module, state_dict=state) if expand else state
            options = {"metadata": options}
        else:
            options = {"prefix": None, "use_safetensors": True, **options}
        module.load_lora_adapter(state, adapter_name=name, _pipeline=pipe, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = str(error).splitlines()[0][:200]
        raise ValueError(f"adapter {path} does not fit {type(module).__name__}: {first}") from error
    if not any(name in getattr(layer, "lora_A", ()) for layer in module.modules()):
        raise ValueError(f"adapter {path} matches no module of {type(module).__name__}; it was made for another model")


def loaded_adapters(experts: Mapping[str, nn.Module]) -> list[str]:
    """Names of the adapters that `load_adapters` put on the transformers."""
    return sorted({name for module in experts.values() for name in getattr(module, "peft_config", {})} - {TASK})


def fuse(experts: Mapping[str, nn.Module]) -> None:
    """Make the active adapters, with their weights, part of the weights that they are on."""
    for module in experts.values():
        if getattr(module, "peft_config", None):
            module.fuse_lora()
            module.unload_lora()


def save_adapters(pipe: Any, experts: Mapping[str, nn.Module], out: Path) -> list[str]:
    """Write what `add_lora` added as stock diffusers loads it; returns the transformers that have one.

    `load_lora_weights(out)`; for a second transformer `load_lora_weights(out / "transformer_2",
    load_into_transformer_2=True)`.
    """
    from peft import get_peft_model_state_dict

    found = []
    for name, module in experts.items():
        config = getattr(module, "peft_config", {}).get(TASK)
        if config is None:
            continue
        found.append(name)
        folder = out if name == "transformer" else out / name
        if hasattr(type(pipe), "save_lora_weights"):
            type(pipe).save_lora_weights(
                folder, transformer_lora_layers=get_peft_model_state_dict(module, adapter_name=TASK),
                transformer_lora_adapter_metadata=config.to_dict(),  # with it loaders know alpha; else alpha = rank
            )  # fmt: skip
        else:
            module.save_lora_adapter(folder, adapter_name=TASK)
    return found
