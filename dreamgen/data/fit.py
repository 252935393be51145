"""Does a dataset fit a robot? Its contract, rate, parts and cameras against the embodiment, one sentence each."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

from dreamgen.core.embodiment import Embodiment, Part
from dreamgen.core.manifest import read_json
from dreamgen.data.layout import CONTRACT, Entry, cameras, is_depth, pictures

MODALITY = "meta/modality.json"


def misfits(root: Path, info: dict, robot: Embodiment, *, actions: bool = True) -> Iterator[str]:
    """What of the dataset at `root` does not fit `robot`; names the part, the rate or the camera. actions: False for
    video alone, which needs no actions and may lack states."""
    features = info["features"]
    if (root / CONTRACT).is_file():
        try:
            robot.require(read_json(root / CONTRACT)["contract"], str(root))
        except ValueError as error:
            yield str(error)
    fps = Fraction(str(info["fps"]))
    if abs(fps / robot.rate - 1) > Fraction(1, 1000):
        yield (f"{root} was recorded at {float(fps):g} Hz, embodiment '{robot.name}' says robot_hz {robot.robot_hz}; "
               f"set robot_hz to the rate of the recording")  # fmt: skip
    for kind, key, parts in (("state", robot.state_key, robot.state), ("action", robot.action_key, robot.action)):
        if not parts or (not actions and (kind == "action" or key not in features)):
            continue
        if key not in features:
            other = ", or open it as video where no actions are needed: data=video" if kind == "action" else ""
            yield (f"{root} has no feature '{key}', which embodiment '{robot.name}' reads; it has {sorted(features)}; "
                   f"choose the embodiment it was made with{other}")  # fmt: skip
            continue
        shape = list(features[key].get("shape", []))
        wrong = _parts(root, kind, key, features[key], parts)
        if shape != [parts[-1].stop]:
            words = ", ".join(f"{part.name} {part.width}" for part in parts)
            yield (f"'{key}' of {root} is {shape}, embodiment '{robot.name}' expects [{parts[-1].stop}] ({words})"
                   f"{'; ' + wrong if wrong else ''}; choose the embodiment it was made with")  # fmt: skip
        elif wrong:
            yield (f"'{key}' of {root} does not fit embodiment '{robot.name}': {wrong}; choose the embodiment it was "
                   f"made with, or mend {MODALITY}")  # fmt: skip
    for view in robot.views:
        if view.key not in (seen := [*cameras(info), *pictures(info)]):
            yield (f"{root} has no video '{view.key}' for view '{view.name}' of embodiment '{robot.name}'; it has "
                   f"{seen}")  # fmt: skip
        elif is_depth(features[view.key]):
            yield (f"view '{view.name}' of embodiment '{robot.name}' is '{view.key}' of {root}, whose pictures are "
                   f"depths; a depth camera is no view, take it out of the embodiment")  # fmt: skip


def _parts(root: Path, kind: str, key: str, feature: dict, parts: Sequence[Part]) -> str:
    """The first part that lies elsewhere in the dataset than in the embodiment, as far as the dataset tells."""
    theirs = read_json(root / MODALITY).get(kind, {}) if (root / MODALITY).is_file() else {}
    theirs = {name: part for name, part in theirs.items() if part.get("original_key", key) == key}
    for part in parts:
        other = theirs.get(part.name)
        if other is not None and (other["start"], other["end"]) != (part.start, part.stop):
            return (f"{kind} part '{part.name}' is [{part.start}, {part.stop}) here and [{other['start']}, "
                    f"{other['end']}) in its {MODALITY}")  # fmt: skip
    mine = {part.name for part in parts}
    if theirs and mine.isdisjoint(theirs):
        return f"its {kind} parts are {', '.join(theirs)}, those of the embodiment {', '.join(p.name for p in parts)}"
    width = (list(feature.get("shape", [])) or [0])[0]
    for part in parts:
        if part.stop > width:
            return f"{kind} part '{part.name}' covers [{part.start}, {part.stop}), the dataset ends at {width}"
    return f"its entries from {parts[-1].stop} on belong to no {kind} part" if width > parts[-1].stop else ""


def absent_cameras(root: Path, info: dict, robot: Embodiment, entries: Sequence[Entry]) -> list[str]:
    """Cameras that are listed and not on disk. ValueError for one that the robot sees by."""
    used, absent = {view.key: view for view in robot.views}, []
    for key in cameras(info):
        if any(key in entry.videos and entry.videos[key][0].exists() for entry in entries):
            continue
        if key in used and entries:
            raise ValueError(f"{root}: camera '{key}' (view '{used[key].name}' of embodiment '{robot.name}') is "
                             f"listed and no video of it is on disk")  # fmt: skip
        absent.append(key)
    return absent
