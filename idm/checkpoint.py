"""A labeler on disk: config.json, contract.json (of the robot whose videos it reads), model.safetensors."""

import inspect
from pathlib import Path
from typing import TypeVar

from safetensors.torch import load_file, save_file
from torch import nn

from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment
from dreamgen.core.manifest import read_json, write_json

Model = TypeVar("Model", bound=nn.Module)


def save(model: nn.Module, config: dict, robot: Embodiment, path: Path) -> None:
    """Weights, statistics and settings in the directory `path`."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "config.json", {"kind": type(model).__name__, **config})
    write_json(path / "contract.json", robot.contract())
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path / "model.safetensors")


def load(kind: type[Model], path: Path | str, robot: Embodiment | None, changes: dict) -> Model:
    """A model of this kind from a directory written by `save`, its config updated by `changes`.

    Raises ValueError if `robot` is not the one that it was trained for, for a labeler of another kind, or if a file is
    missing.
    """
    path = Path(path)
    saved = read_json(path / "config.json")
    made = saved.pop("kind", kind.__name__)  # checkpoints of old do not say it
    strange = sorted(saved.keys() - inspect.signature(kind).parameters.keys())
    if made != kind.__name__ or strange:
        found = made if made != kind.__name__ else f"labeler with the settings {', '.join(strange)}"
        raise ValueError(f"{path} holds a {found}, but a {kind.__name__} was asked for; choose the `labeler` that it "
                         "was trained with, or another path")  # fmt: skip
    contract = read_json(path / "contract.json")
    if robot is not None:
        robot.require(contract, f"labeler {path}")
    config = {**saved, **changes}
    config["clock"] = Clock(**config["clock"])
    model = kind(robot=robot or Embodiment.from_contract(contract), **config)
    model.load_state_dict(load_file(path / "model.safetensors"))
    return model.eval()
