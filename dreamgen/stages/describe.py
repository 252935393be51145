"""A first description of a robot, from a dataset of it: an embodiment in YAML whose comments say what to check."""

import json
import math
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from dreamgen.core import rotations
from dreamgen.core.manifest import Stage, read_json
from dreamgen.core.part import ROTATIONS, Part
from dreamgen.data.columns import entry_names, read_column
from dreamgen.data.fit import MODALITY
from dreamgen.data.layout import CONTRACT, Layout, cameras, is_depth, locate, pictures, read_layout
from dreamgen.stages.rotation_names import GROOT, rotation_at

STATE, ACTION = "observation.state", "action"
FILES = 20  # tables that are looked into
GRAIN = 32  # pixels: sides that every shipped world model takes are multiples of it
WORDS = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")  # which YAML does not take as text
MOST = 0.95  # share of the changes that are looked at: not those between episodes
FOLLOWS = 0.5  # correlation of a command with the state from which on it is called its target


def describe(root: str, *, out: Path, name: str | None = None, revision: str | None = None, record: dict) -> dict:
    """Write `out/embodiment.yaml`, which opens the dataset at `root` (a folder, or a hub id); `text` of the results.

    Views are its cameras, all at the size of the smallest; parts are those of its contract, of GR00T's modality.json,
    or as the entries are named (`joint_0`, `joint_1` are one part, `roll`, `pitch`, `yaw` a rotation). An action part
    of two values is called binary, any other absolute. name: of the robot; None: what the dataset calls it.

    Raises ValueError if there is no such dataset, if it has no video or no actions, and for another name than that of
    its contract, which alone opens it.
    """
    path = locate(root, revision)
    layout = read_layout(path)
    known = read_json(path / CONTRACT)["contract"] if (path / CONTRACT).is_file() else None
    if known and name not in (None, known["name"]):
        raise ValueError(f"name is '{name}', and {path / CONTRACT} says that the robot is '{known['name']}', which an "
                         f"embodiment that opens the dataset must be called too; leave stage.name out")  # fmt: skip
    with Stage(out, "describe", config=record, parents={"data": path}, anew=True) as run:
        named = name or re.sub(r"\W+", "_", str(layout.info.get("robot_type") or path.resolve().name)).lower()
        text = "\n".join(_known(known) if known else _drafted(layout, named)) + "\n"
        (out / "embodiment.yaml").write_text(text, encoding="utf-8")
        return run.finish(text=text)


def _known(contract: dict) -> Iterator[str]:
    """The lines of a robot whose contract lies beside the data."""
    yield f"# {contract['name']}, as the contract beside its data tells."
    yield "_target_: dreamgen.core.embodiment.Embodiment"
    for key, value in contract.items():
        if key in ("views", "state", "action", "tools"):
            yield f"{key}:" if value else f"{key}: []"
            yield from (f"  - {_flow({k: v for k, v in each.items() if v is not None})}" for each in value)
        else:
            yield f"{key}: {_flow(value)}"


def _drafted(layout: Layout, name: str) -> Iterator[str]:
    """The lines of a robot that is guessed from the data."""
    info, features = layout.info, layout.info["features"]
    if not _seen(layout) or ACTION not in features:
        lacks = "no actions" if _seen(layout) else "no video"
        raise ValueError(f"{layout.root} has {lacks} to describe a robot by; it has {sorted(features)}. Write the "
                         f"embodiment by hand, see conf/embodiment")  # fmt: skip
    yield f"# {name}, drafted from {len(layout.entries)} episodes. Read every comment, then delete it."
    yield "_target_: dreamgen.core.embodiment.Embodiment"
    yield f"name: {_flow(name)}"
    yield f'robot_hz: "{Fraction(str(info["fps"])).limit_denominator(1001)}"'
    yield f"state_key: {STATE}"
    yield f"action_key: {ACTION}"
    yield "# height, width: pixels that the models see of a camera, the same for all."
    yield "# fit: crop or pad, where squeezing a picture to this size would distort it."
    yield "# Delete cameras that nothing is to see by."
    yield "views:"
    yield from _views(layout)
    for key, feature in features.items():
        if is_depth(feature):
            yield f"# '{key}' shows depths: it is no view."
    states, actions = (_values(layout, key) for key in (STATE, ACTION))
    moved = {part["name"]: part for part in _parts(layout, "state", STATE)} if STATE in features else {}
    yield "# unit: rad, deg or m, where it has one; limits: the lowest and highest value, where they are known."
    yield f"# rotation: {', '.join(ROTATIONS)}, where the entries tell one (docs/datasets.md)."
    yield "# reach: lowest and highest value of each entry that commands can bring a state part to, [[...], [...]]."
    yield "state:" if moved else "state: []"
    for part in moved.values():
        values = states[:, part["start"] : part["stop"]]
        yield f"  - {_flow(_plain(part))} # {_range(values)}{_asked(part)}"
    yield "# kind: absolute (a target), delta (a step; scale turns it into the state's unit) or binary (two commands)."
    yield "# moves: the state part that it sets or steps. positive: closes or opens, what high values of a gripper do."
    yield "action:"
    for part in _parts(layout, "action", ACTION):
        yield "  - {} # {}".format(*_guessed(part, actions[:, part["start"] : part["stop"]], moved, states))


def _seen(layout: Layout) -> list[str]:
    """Cameras of which a video is on disk, more may be listed, and those whose pictures lie in the tables; not those of
    depths."""
    videos = [key for key in cameras(layout.info)
              if any(key in entry.videos and entry.videos[key][0].is_file() for entry in layout.entries)]  # fmt: skip
    return [key for key in videos + pictures(layout.info) if not is_depth(layout.info["features"][key])]


def _views(layout: Layout) -> Iterator[str]:
    """A line for each camera."""
    sizes = {key: _size(layout.info["features"][key]) for key in _seen(layout)}
    columns = 2 if len(sizes) > 2 else len(sizes)
    rows = -(-len(sizes) // columns)
    shrunk = 2 if len(sizes) > 2 else 1  # of many cameras, so that their canvas has about the size of one
    height, width = (_side(min(size[k] for size in sizes.values()) // shrunk, count)
                     for k, count in ((0, rows), (1, columns)))  # fmt: skip
    called = {part["original_key"]: name for name, part in _modality(layout, "video").items() if "original_key" in part}
    names: list[str | None] = []
    for key, (h, w) in sizes.items():
        rate = _rate(layout.info["features"][key])
        other = "" if rate in (None, layout.info["fps"]) else f", at {rate} Hz: its frames must be those of the rows"
        names.append(called.get(key, re.sub(r"\W+", "_", key.removeprefix("observation.").removeprefix("images."))))
        name = names[-1]
        yield f"  - {_flow({'name': name, 'key': key, 'height': height, 'width': width})} # recorded at {h}x{w}{other}"
    if len(names) < 2:
        return
    size = f"{rows * height}x{columns * width}"
    yield f"# The canvas of all cameras, here {size}: sides are multiples of {GRAIN}; null is black."
    yield "grid:"
    names += [None] * (rows * columns - len(names))
    for row in range(rows):
        yield f"  - {_flow(names[row * columns : (row + 1) * columns])}"


def _side(pixels: int, count: int) -> int:
    """The longest side up to `pixels` of which `count` beside each other are a multiple of GRAIN."""
    grain = GRAIN // math.gcd(GRAIN, count)
    return max(grain, pixels // grain * grain)


def _guessed(part: dict, values: np.ndarray, moved: dict[str, dict], states: np.ndarray) -> tuple[str, str]:
    """An action part with what its values (n k) tell of it, and a comment."""
    levels, target = np.unique(values), moved.get(re.sub("^delta_|_delta$", "", part["name"]))
    if "rotation" in part:
        return _turning(part, values, target, states)
    if target is not None and "rotation" in target:
        return _flow(
            part
        ), f"{_range(values)}; no rotation by its names, as '{part['name']}' of the state: say it of both"
    if len(levels) == 2:
        made = {**part, "kind": "binary", "limits": [float(level) for level in levels]}
        return _flow(made), f"two values: say what the high one does (positive), and {_target(target)}"
    if part.get("kind") == "delta":
        return _flow(part), f"{_range(values)}; a delta by {MODALITY}: add moves and scale, {_target(target)}"
    if len(levels) == 1:
        return _flow(part), _range(values)
    if target is not None and target["stop"] - target["start"] == values.shape[1]:
        follows = _follows(values, states[:, target["start"] : target["stop"]])
        if follows > FOLLOWS:
            return _flow({**part, "moves": target["name"]}), f"{_range(values)}; follows the state ({follows:.2f})"
        pushes, slope = _pushes(values, states[:, target["start"] : target["stop"]])
        if pushes > FOLLOWS:
            scale = {"scale": float(f"{slope:.2g}")} if abs(slope - 1) > 0.1 else {}
            ask = "; the scale is measured, set the true one" if scale else ""
            made = {**part, "kind": "delta", "moves": target["name"], **scale}
            return _flow(made), f"{_range(values)}; follows the change of the state ({pushes:.2f}){ask}"
        return _flow(part), f"{_range(values)}; does not follow the state of that name ({follows:.2f}): a delta?"
    return _flow(part), f"{_range(values)}; no state part of that name: add moves, if it sets one"


def _turning(part: dict, values: np.ndarray, target: dict | None, states: np.ndarray) -> tuple[str, str]:
    """An action part that is a rotation, and a comment."""
    comment = f"{_range(values)}{_asked(part)}"
    if part.get("kind") == "delta" or target is None or "rotation" not in target:
        return _flow(_plain(part)), f"{comment}; {_target(target)}"
    told, held = (Part(**_plain(each)) for each in (part, target))
    state = rotations.read(held, states[:, held.slice])
    off = rotations.angle(rotations.read(told, values), state).mean()
    spread = rotations.angle(rotations.mean(state), state).mean()
    if off < spread * (1 - FOLLOWS):
        scale = {} if told.width > 3 else {"scale": told.radians / held.radians}
        made = {**_plain(part), "moves": target["name"], **(scale if scale.get("scale", 1.0) != 1 else {})}
        return _flow(made), f"{comment}; follows the state ({off:.2g} rad apart)"
    ask = (f"does not follow the state of that name: a delta? Then add kind: delta and moves: {target['name']}, frame: "
           f"tool where it turns about the hand's own axes, and for entries that are no angles unit: \"1\" and scale: "
           f"the radians of one")  # fmt: skip
    return _flow(_plain(part)), f"{comment}; {ask}"


def _plain(part: dict) -> dict:
    """The part as an embodiment has it."""
    return {key: value for key, value in part.items() if key != "ask"}


def _asked(part: dict) -> str:
    return f"; {part['ask']}" if part.get("ask") else ""


def _target(target: dict | None) -> str:
    return f"moves: {target['name']} if it sets that" if target else "moves, if it sets a part of the state"


def _follows(command: np.ndarray, state: np.ndarray) -> float:
    """Mean correlation of the entries that vary in both, 0 if none does."""
    keep = (command.std(0) > 1e-9) & (state.std(0) > 1e-9)
    pairs = zip(command.T[keep], state.T[keep], strict=True)
    return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs])) if keep.any() else 0.0


def _pushes(command: np.ndarray, state: np.ndarray) -> tuple[float, float]:
    """The correlation of the commands (n k) with the changes of the state, and the change by a command of 1."""
    change = np.diff(state, axis=0)
    size = np.linalg.norm(change, axis=1)
    command, change = (values[size <= np.quantile(size, MOST)] for values in (command[:-1], change))
    return _follows(command, change), float((command * change).sum() / max((command**2).sum(), 1e-12))


def _parts(layout: Layout, kind: str, key: str) -> list[dict[str, Any]]:
    """Parts (name, start, stop) of a feature, in order and without a gap."""
    feature = layout.info["features"][key]
    width = (list(feature.get("shape", [])) or [1])[0]
    given = [(name, part) for name, part in _modality(layout, kind).items() if part.get("original_key", key) == key]
    given.sort(key=lambda row: row[1]["start"])
    starts, ends = [part["start"] for _, part in given], [part["end"] for _, part in given]
    if given and all(stop <= start for stop, start in zip([0, *ends], [*starts, width], strict=True)):
        told = [{"name": name, "start": part["start"], "stop": part["end"]}
                | ({"kind": "delta"} if kind == "action" and part.get("absolute") is False else {})
                | _rotation(layout, key, *GROOT.get(part.get("rotation_type"), ("", "")), part["start"], part["end"])
                for name, part in given]  # fmt: skip
        told += [{"name": f"rest_{start}", "start": start, "stop": stop}  # which modality.json does not name
                 for start, stop in zip([0, *ends], [*starts, width], strict=True) if start < stop]  # fmt: skip
        return sorted(told, key=lambda part: part["start"])
    names = entry_names(feature.get("names"))
    if len(names) != width:
        return [{"name": "joints", "start": 0, "stop": width}]
    parts, start = [], 0
    while start < width:
        name, stop, more = _stem(names[start]), start + 1, {}
        if turn := rotation_at(names, start):
            of, wide, rotation, ask = turn
            more = _rotation(layout, key, rotation, ask, start, start + wide)
        if more:
            name, stop = f"{of}_rotation".strip("_"), start + wide
        while not more and stop < width and _stem(names[stop]) == name and rotation_at(names, stop) is None:
            stop += 1
        again = sum(re.sub(r"_\d+$", "", part["name"]) == name for part in parts)
        parts.append({"name": f"{name}_{again + 1}" if again else name, "start": start, "stop": stop} | more)
        start = stop
    return parts


def _rotation(layout: Layout, key: str, rotation: str, ask: str, start: int, stop: int) -> dict[str, str]:
    """What a part of these entries has more if they tell a rotation, and what to check; {} if they are none."""
    values, wide = _values(layout, key)[:, start:stop], stop - start
    if ROTATIONS.get(rotation) != wide or not len(values):
        return {}
    if wide == 4 and np.abs(np.linalg.norm(values, axis=1) - 1).max() > 0.05:
        return {}
    unit = {"unit": "deg" if np.abs(values).max() > 2 * np.pi + 0.1 else "rad"} if wide == 3 else {}
    return {"rotation": rotation, **unit, "ask": ask}


def _stem(name: str) -> str:
    """`Shoulder_pan.pos` is shoulder_pan, `joint_3` is joint."""
    return re.sub(r"\W+", "_", re.sub(r"[._]?\d+$", "", name.lower().removesuffix(".pos"))).strip("_") or "entry"


def _modality(layout: Layout, kind: str) -> dict[str, dict]:
    path = layout.root / MODALITY
    return read_json(path).get(kind, {}) if path.is_file() else {}


def _size(feature: dict) -> tuple[int, int]:
    """Height and width of a camera's pictures; channels stand first or last."""
    shape = [int(n) for n in feature["shape"]]
    return (shape[1], shape[2]) if shape[0] in (1, 3) else (shape[0], shape[1])


def _rate(feature: dict) -> float | int | None:
    """Frames a second, where the feature tells."""
    return next((found["video.fps"] for found in (feature.get("info"), feature.get("video_info"))
                 if found and "video.fps" in found), None)  # fmt: skip


def _values(layout: Layout, key: str) -> np.ndarray:
    """A column of the first tables, (n k), without rows that are not finite."""
    files = list(dict.fromkeys(entry.data for entry in layout.entries))[:FILES]
    if key not in layout.info["features"] or not files:
        return np.zeros((0, 0))
    return np.concatenate([np.nan_to_num(read_column(pq.read_table(file, columns=[key]), key)) for file in files])


def _range(values: np.ndarray) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{low:.4g} to {high:.4g}" if high > low else f"always {low:.4g}"


def _flow(node: Any) -> str:
    """A plain structure in YAML, on one line."""
    if isinstance(node, dict):
        return "{" + ", ".join(f"{key}: {_flow(value)}" for key, value in node.items()) + "}"
    if isinstance(node, list | tuple):
        return "[" + ", ".join(_flow(value) for value in node) + "]"
    plain = isinstance(node, str) and re.fullmatch(r"[A-Za-z_][\w./-]*", node) and node.lower() not in WORDS
    return node if plain else json.dumps(node)
