"""A world model as a folder: what it is saved as, and how it is opened again."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from dreamgen.core.embodiment import Embodiment
from dreamgen.core.manifest import digest, read_json, write_json
from dreamgen.worlds.adapters import FILE, FOLDER, fuse, loaded_adapters, save_adapters
from dreamgen.worlds.autoencoder import weights_digest
from dreamgen.worlds.layout import Layout, content

ROOM = "dreamgen.worlds."  # a class that a file names is code: only these are opened
PREFIX = "dreamgen.worlds.prefix.PrefixWorld"
World = TypeVar("World", bound="Stored")


class Stored(nn.Module):
    """A pipeline with settings (`spec`) for one robot, in a diffusers folder or, with adapters, on top of one."""

    robot: Embodiment
    pipe: Any
    layout: Layout
    path: str
    revision: str | None
    adapters: list[dict[str, Any]]
    fused: Sequence[dict[str, Any]] = ()  # adapters that are part of the weights
    folder: Path

    def spec(self) -> dict[str, Any]:
        """Constructor arguments as plain JSON, without the weights' place."""
        raise NotImplementedError

    def fuse_adapters(self) -> None:
        """Make the adapters part of the weights, so that these can be trained; `save` then writes all of them."""
        fuse(self.layout.experts)
        self.fused, self.adapters = [*self.fused, *self.adapters], []

    def save(self, out: Path, *, dtype: torch.dtype | None = None) -> None:
        """A diffusers pipeline folder `out/model`, or an adapter in `out/adapter`, and `world.json` last, which names
        the class. With fused adapters one that was trained is fused, too. Raises ValueError for adapters that were
        loaded for dreaming."""
        if loaded := loaded_adapters(self.layout.experts):
            raise ValueError(f"{self.path} has {len(loaded)} adapters on it ({', '.join(loaded)}), which are not saved "
                             "with it: call fuse_adapters() first, or open it without them")  # fmt: skip
        if self.fused:
            fuse(self.layout.experts)
        lora = save_adapters(self.pipe, self.layout.experts, out / FOLDER)
        if not lora:
            if dtype is not None:
                self.pipe.to(dtype=dtype)
            self.layout.save(out / "model")
        base = {"base": self.path if lora else None, "revision": self.revision if lora else None, "experts": lora}
        write_json(out / FILE, {"world": name_of(self), "spec": self.spec(), "contract": self.robot.contract(), **base})

    @classmethod
    def load(cls: type[World], path: Path | str, **changed: Any) -> World:
        """A world model that `save` wrote; `changed` overrides its settings, None leaves them. Where it turns guidance
        off or sets a step cache, a saved guidance_interval goes."""
        path, changed = Path(path), {key: value for key, value in changed.items() if value is not None}
        saved = read_json(path / FILE)
        robot = changed.pop("robot", None) or Embodiment.from_contract(saved["contract"])
        robot.require(saved["contract"], str(path))
        where = {"path": saved["base"] or str(path / "model"), "revision": saved.get("revision")}
        if saved["base"]:
            own = [{"path": str(path / FOLDER), "expert": name} for name in saved.get("experts", [None])]
            changed["adapters"] = [*own, *changed.get("adapters", ())]
        spec = dict(saved["spec"])
        if changed.get("guidance", 2.0) <= 1 or "step_cache" in changed:  # beside which an interval is refused
            spec.pop("guidance_interval", None)
        world = cls(robot=robot, **{**spec, **where, **changed})
        world.folder = path
        return world

    def fingerprint(self) -> str:
        """Names the weights that this world model was opened with: by where they lie or, of a pipeline that was given
        without a path, by their bytes."""
        adapters = [(entry["path"], entry.get("revision")) for entry in [*self.fused, *self.adapters]]
        given = [(self.path, self.revision), *adapters]
        names = [content(*source) if source[0] else self._held() for source in dict.fromkeys(given)]
        return names[0] if len(names) == 1 else digest(names)

    def _held(self) -> str:
        parts = {name: part for name, part in self.pipe.components.items() if isinstance(part, nn.Module)}
        return digest({name: weights_digest(part) for name, part in parts.items()})


def name_of(world: object) -> str:
    """The class of a world model, as a file of its folder names it."""
    return f"{type(world).__module__}.{type(world).__qualname__}"


def named(kind: str, file: Path) -> Any:
    """The class that `file` names as `name_of` does. ValueError for one that is none of ours."""
    module, _, name = kind.rpartition(".")
    if not module.startswith(ROOM):
        raise ValueError(f"{file} names the class '{kind}'; only classes of {ROOM}* are opened")
    return getattr(import_module(module), name)


def open_saved(path: Path | str, **changed: Any) -> Any:
    """A world model that `save` wrote, by the class that its folder names, `changed` as in `load`; one that names none
    is a `PrefixWorld`.

    Raises ValueError where it is not.
    """
    file = Path(path) / FILE
    kind = read_json(file).get("world")
    try:
        return named(kind or PREFIX, file).load(path, **changed)
    except (ValueError, TypeError) as error:  # the latter for settings that are another class's
        if kind:
            raise
        raise ValueError(f"{file} does not name the class that saved it, and could not be opened as {PREFIX} ({error});"
                         f' add it, e.g. "world": "dreamgen.worlds.ltx.LtxWorld"') from error  # fmt: skip
