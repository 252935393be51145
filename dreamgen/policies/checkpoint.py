"""A policy as a directory: config.json, contract.json, model.safetensors; `encoder/` of a pretrained encoder.

contract.json is that of the policy's own robot; `others` in it has those of the bodies of other robots (until 0.12 they
lay in config.json), as `dreamgen.policies.spaces` describes them.
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
from dreamgen.policies.spaces import owner

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
    config = dict(policy.config)
    others = config.pop("robots")
    write_json(path / "contract.json", {**policy.own.contract(), **({"others": others} if others else {})})
    write_json(path / "config.json", {**config, "encoder": {"_target_": target, **policy.encoder.config}})


def read(path: Path) -> tuple[dict[str, Any], dict[str | None, dict]]:
    """The configuration of a saved policy, with its `robots`, and the contract of the robot of each of its bodies; None
    names its own robot."""
    config, contract = read_json(path / "config.json"), read_json(path / "contract.json")
    config["robots"] = contract.pop("others", config.get("robots") or {})
    owners = {name: owner(name, config["robots"]) for name in config["bodies"]}
    each = {name: contract if of is None else config["robots"][of] for name, of in owners.items()}
    return config, {None: contract, **each}


def _encoder(config: dict[str, Any], path: Path) -> nn.Module:
    arguments = dict(config)
    if (path / ENCODER).is_dir():
        arguments["path"] = str(path / ENCODER)  # its weights are among the policy's
    module, _, name = arguments.pop("_target_").rpartition(".")
    if not f"{module}.".startswith(ALLOWED):
        raise ValueError(f"{path}/config.json names the encoder {module}.{name}; only classes of {ALLOWED[:-1]} are "
                         f"loaded: a name in a checkpoint is code")  # fmt: skip
    return getattr(importlib.import_module(module), name)(**arguments)


def _cast(path: Path, config: dict[str, Any], contracts: dict[str | None, dict], robot: Embodiment, speaks: str | None
          ) -> str | None:  # fmt: skip
    """The body that acts for `robot`: the one that `speaks` names, else the one that the policy was saved to speak for,
    or else the first of this robot; None where it has no such body. ValueError names what differs."""
    bodies = config["bodies"]
    asked = speaks or config.get("speaks") or bodies[0]
    if speaks is None and robot.mismatches(contracts[asked], learned=True):
        asked = next((name for name in bodies if not robot.mismatches(contracts[name], learned=True)), asked)
    if asked not in contracts:
        return None
    try:
        where = f"policy {path}" + (f", as the body '{asked}'," if speaks else "")
        robot.require(contracts[asked], where, learned=True)
    except ValueError as error:
        known = {id(contracts[name]): contracts[name] for name in bodies}
        told = [f"'{contract['name']}' ({', '.join(name for name in bodies if contracts[name] is contract)})"
                for contract in known.values()]  # fmt: skip
        if len(known) == 1:
            raise
        raise ValueError(f"{error}\nIt knows the robots {', '.join(told)}; in brackets their bodies.") from None
    return asked


def load(kind: type, path: Path | str, *, robot: Embodiment | None = None, speaks: str | None = None,
         **changes: Any) -> Any:  # fmt: skip
    """A `kind` saved at `path`, on the CPU (`engine.precision.place`), that acts for `robot`, or through the body
    `speaks`. changes: to its configuration; None is none.

    ValueError says what is missing, broken, or made for other robots than `robot`.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"policy {path} does not exist; run train_policy first, or mend the path")
    config, contracts = read(path)
    own = contracts[None]
    if robot is not None and (body := _cast(path, config, contracts, robot, speaks)) is not None:
        if (told := contracts[body]) is own:
            own = robot
        config["robots"] = {name: robot if other is told else other for name, other in config["robots"].items()}
        speaks = None if speaks is None and body == (config.get("speaks") or config["bodies"][0]) else body
    changed = {name: value for name, value in {**changes, "speaks": speaks}.items() if value is not None}
    config |= {"encoder": _encoder(config["encoder"], path), **changed}
    policy = kind(robot=own if isinstance(own, Embodiment) else Embodiment.from_contract(own), **config)
    try:
        policy.load_state_dict(load_file(path / "model.safetensors"), strict=True)
    except (FileNotFoundError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"the weights of policy {path} do not load: {error}. Run train_policy again.") from error
    policy.path = path  # what a stage names as its input
    return policy.eval()
