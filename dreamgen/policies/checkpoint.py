"""A policy as a directory: config.json, contract.json, model.safetensors; `encoder/` of a pretrained encoder.

Encoders are named in config.json by their class. Such a name can come with a downloaded checkpoint, so only classes of
`dreamgen.policies` are ever imported.
"""

import importlib
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dreamgen.core.embodiment import Embodiment
from dreamgen.core.manifest import read_json, replacing, write_json

ALLOWED = "dreamgen.policies."
ENCODER = "encoder"


def save(policy: nn.Module, path: Path) -> None:
    """Weights and configuration of a policy."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    target = f"{type(policy.encoder).__module__}.{type(policy.encoder).__qualname__}"
    weights = {name: value.detach().cpu().contiguous() for name, value in policy.state_dict().items()}
    with replacing(path / "model.safetensors") as temporary:
        save_file(weights, temporary)
    if hasattr(policy.encoder, "save"):
        policy.encoder.save(path / ENCODER)
    write_json(path / "contract.json", policy.robot.contract())
    write_json(path / "config.json", {**policy.config, "encoder": {"_target_": target, **policy.encoder.config}})


def _encoder(config: dict[str, Any], path: Path) -> nn.Module:
    arguments = dict(config)
    if (path / ENCODER).is_dir():
        arguments["path"] = str(path / ENCODER)  # its weights are among the policy's
    module, _, name = arguments.pop("_target_").rpartition(".")
    if not f"{module}.".startswith(ALLOWED):
        raise ValueError(f"{path}/config.json names the encoder {module}.{name}; only classes of {ALLOWED[:-1]} are "
                         f"loaded: a name in a checkpoint is code")  # fmt: skip
    return getattr(importlib.import_module(module), name)(**arguments)


def load(kind: type, path: Path | str, *, robot: Embodiment | None = None, **changes: Any) -> Any:
    """A `kind` saved at `path`, on the CPU (`engine.precision.place`). changes: to its configuration; None is none.

    ValueError says what is missing, broken, or made for another robot than `robot`.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"policy {path} does not exist; run train_policy first, or mend the path")
    config, contract = read_json(path / "config.json"), read_json(path / "contract.json")
    if robot is not None:
        robot.require(contract, f"policy {path}")
    changed = {name: value for name, value in changes.items() if value is not None}
    config |= {"encoder": _encoder(config["encoder"], path), **changed}
    policy = kind(robot=robot or Embodiment.from_contract(contract), **config)
    try:
        policy.load_state_dict(load_file(path / "model.safetensors"), strict=True)
    except (FileNotFoundError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"the weights of policy {path} do not load: {error}. Run train_policy again.") from error
    policy.path = path  # what a stage names as its input
    return policy.eval()
