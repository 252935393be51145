"""A labeler on disk: config.json, contract.json (of the robot whose videos it reads), model.safetensors; others.json
has the contracts of further robots that it has heads for."""

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment
from dreamgen.core.manifest import differences, read_json, write_json
from dreamgen.engine.state import take_over, weights_of
from idm.tower import PretrainedVision
from idm.vision import ConvVision

OTHERS = "others.json"
TRUNK = ("frames", "width", "layers", "heads")  # beside the vision, what weights are shaped by that robots share
UNSEEN = ("path", "frozen", "config")  # of the vision: the same tower may lie elsewhere, or be tuned now
TOWER = ("model_type", "image_size", "patch_size", "num_attention_heads")
Model = TypeVar("Model", bound=nn.Module)


def save(model: nn.Module, config: dict, robots: Sequence[Embodiment], path: Path) -> None:
    """Weights, statistics and settings in the directory `path`."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "config.json", {"kind": type(model).__name__, **config})
    write_json(path / "contract.json", robots[0].contract())
    (path / OTHERS).unlink(missing_ok=True)
    if robots[1:]:
        write_json(path / OTHERS, [robot.contract() for robot in robots[1:]])
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path / "model.safetensors")


def load(kind: type[Model], path: Path | str, robot: Embodiment | None, changes: dict) -> Model:
    """A model of this kind from a directory written by `save`, its config updated by `changes`, of which None changes
    nothing, for `robot`, or for the first robot that it was trained for.

    Raises ValueError if `robot` is none that it was trained for, for a labeler of another kind, or if a file is
    missing.
    """
    path = Path(path)
    saved = settings(kind, path)
    contracts = [read_json(path / "contract.json"), *(read_json(path / OTHERS) if (path / OTHERS).is_file() else [])]
    robots = {contract["name"]: Embodiment.from_contract(contract) for contract in contracts}
    if robot is not None:
        require_known(robot, contracts, f"labeler {path}", learned=bool(saved.get("labelled", True)))
        robots[robot.name] = robot
    config = {**saved, **{key: value for key, value in changes.items() if value is not None}}
    config["clock"] = Clock(**config["clock"])
    first, *others = robots.values()
    model = kind(robot=first, **config)
    for other in others:
        model.add(other)
    model.load_state_dict(load_file(path / "model.safetensors"))
    if others and robot is not None:
        model.choose(robot.name)
    return model.eval()


def settings(kind: type, path: Path) -> dict:
    """What config.json says of a labeler of this kind; ValueError if there is none, or one of another kind."""
    saved = read_json(path / "config.json")
    made = saved.pop("kind", kind.__name__)  # checkpoints of old do not say it
    strange = sorted(saved.keys() - inspect.signature(kind).parameters.keys())
    if made != kind.__name__ or strange:
        found = made if made != kind.__name__ else f"labeler with the settings {', '.join(strange)}"
        raise ValueError(f"{path} holds a {found}, but a {kind.__name__} was asked for; choose the `labeler` that it "
                         "was trained with, or another path")  # fmt: skip
    return saved


def require_known(robot: Embodiment, contracts: Sequence[dict], where: str, *, learned: bool = True) -> None:
    """Raise ValueError, which tells the robots that there are, if `robot` is none of `contracts`. learned: their
    actions were."""
    names = ", ".join(f"'{contract['name']}'" for contract in contracts)
    own = next((contract for contract in contracts if contract["name"] == robot.name), None)
    if own is None and len(contracts) > 1:
        raise ValueError(f"{where} was made for other robots than embodiment '{robot.name}': it knows {names}. Choose "
                         f"one of these, or train a labeler of this one that begins with it (stage.start)")  # fmt: skip
    try:
        robot.require(own or contracts[0], where, learned=learned)
    except ValueError as error:
        raise ValueError(f"{error}\nIt knows {names}.") from error


def trunk(config: dict, robot: Embodiment) -> dict[str, Any]:
    """The settings, plain, by which two labelers can or cannot share a trunk, defaults included."""
    vision = config["vision"]
    known = inspect.signature(PretrainedVision if "path" in vision else ConvVision).parameters
    chosen = {name: p.default for name, p in known.items() if p.default is not p.empty} | vision
    tower = chosen.get("config") or {}
    tower = {key: value for key, value in tower.get("vision_config", tower).items() if key in TOWER}
    chosen = {key: value for key, value in chosen.items() if key not in UNSEEN} | {"tower": tower}
    found = {key: config[key] for key in TRUNK} | {"vision": chosen, "canvas": robot.canvas}
    return json.loads(json.dumps(found))


def begin_with(model: Any, config: dict, path: Path) -> None:
    """Give a labeler the trunk of the one at `path`, trained for whatever robots: all weights but those of heads. Where
    its chunks reach further, weights for the steps beyond stay its own.

    Raises ValueError where the settings of the two trunks differ.
    """
    path = Path(path)
    saved = trunk(settings(type(model), path), Embodiment.from_contract(read_json(path / "contract.json")))
    if apart := differences(saved, trunk(config, model.robot)):
        raise ValueError(f"labeler {path} is no beginning for this one ({apart}). Set this one as that one was "
                         f"trained, or choose another stage.start")  # fmt: skip
    found = {name: value for name, value in weights_of(path).items() if not name.startswith("heads.")}
    for name, value in model.denoiser.direct[-1].state_dict(prefix="denoiser.direct.2.").items():
        rows = min(len(value), len(found[name]))
        found[name] = torch.cat([found[name][:rows], value[rows:].cpu()])
    take_over(model, found, path, but="heads.")
