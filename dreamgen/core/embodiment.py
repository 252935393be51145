"""One robot: its cameras and their tiling, its state and action parts, its rate.

An embodiment is a YAML file in `conf/embodiment`; adding a robot needs no Python.
"""

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any

from dreamgen.core.camera import Camera, Tool
from dreamgen.core.part import Part

ORIENTATIONS = ("", "upright", "rotated", "mirrored", "flipped")
FITS = ("squeeze", "crop", "pad")
UNSAID = {"fit": "squeeze"}  # what a contract does not spell out
# what a saved contract may lack: data need not know of it
OPTIONAL = ("camera", "orientation", "positive", "sets", "travel", "reach", "tools", "rotation", "turned_by")
LEARNED = {"rotation", "turned_by"}  # of these, what changes the numbers that networks see
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class View:
    """One camera: its LeRobot feature key and the size, in pixels, at which the models see it.

    camera: its place and lens where they are known, for pose maps. orientation: how its pictures lie, as recorded and
    as the models see them: upright, rotated (by half a turn), mirrored (left to right), flipped (top to bottom), or
    empty in contracts that are older than it; nothing turns them. fit: how pictures of another shape are brought to
    this size, of recordings, video files and photos alike: squeeze (each side by itself), crop (their largest middle
    part of this shape), pad (all of them, between black bars). Raises ValueError for another size, orientation or fit.
    """

    name: str
    key: str
    height: int
    width: int
    camera: Camera | Mapping[str, Any] | None = None  # a plain map of its settings becomes a Camera
    orientation: str = "upright"
    fit: str = "squeeze"

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise ValueError(f"view '{self.name}' has the fit '{self.fit}'; expected one of {', '.join(FITS)}")
        if self.orientation not in ORIENTATIONS:
            raise ValueError(f"view '{self.name}' has the orientation '{self.orientation}'; expected one of "
                             f"{', '.join(ORIENTATIONS[1:])}, or none")  # fmt: skip
        if self.height <= 0 or self.width <= 0:
            raise ValueError(f"view '{self.name}' is {self.height}x{self.width} pixels; both must be positive")
        object.__setattr__(self, "camera", _made(Camera, self.camera))

    def require(self, picture: Any) -> None:
        """Raise ValueError for an array that is no picture (height, width, 3) uint8 of this view."""
        if picture.shape != (self.height, self.width, 3) or picture.dtype != "uint8":
            raise ValueError(f"view '{self.name}' of the observation is {picture.shape} {picture.dtype}; expected "
                             f"({self.height}, {self.width}, 3) uint8: resize it first")  # fmt: skip


MEMBERS = {"views": View, "state": Part, "action": Part, "tools": Tool}


def _made(kind: Any, node: Any) -> Any:
    """`node`, or what a plain map of its settings describes. ValueError for settings that it has not, or lacks."""
    if not isinstance(node, Mapping):
        return node
    try:
        return kind(**node)
    except TypeError as error:
        what, why, known = kind.__name__.lower(), str(error).rpartition("() ")[2], kind.__dataclass_fields__
        raise ValueError(f"{what} '{node.get('name', '')}' {why}; a {what} has {', '.join(known)}") from error


def _require_names(kind: str, named: Sequence[Any]) -> None:
    """Raise ValueError where two of them have one name."""
    names = [each.name for each in named]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two {kind}s are named '{twice[0]}'; give each a name of its own, by which it is found")


def _cover(kind: str, parts: Sequence[Part]) -> int:
    """Total width of `parts`; they must cover [0, width) in order, without a gap, each with a name of its own."""
    _require_names(f"{kind} part", parts)
    at = 0
    for part in parts:
        if part.start != at:
            raise ValueError(f"{kind} part '{part.name}' starts at {part.start}; expected {at}: parts must follow on")
        at = part.stop
    return at


def _plain(contract: dict) -> dict:
    """As it is read from a file."""
    return json.loads(json.dumps(contract))


def _without(node: Any, unwanted: Callable[[str, Any], bool]) -> Any:
    """A plain structure without the keys that are `unwanted`."""
    if isinstance(node, dict):
        return {key: _without(value, unwanted) for key, value in node.items() if not unwanted(key, value)}
    return type(node)(_without(item, unwanted) for item in node) if isinstance(node, list | tuple) else node


def _apart(left: dict | None, right: dict | None, silent: Collection[str]) -> list[str]:
    """The fields in which two parts or views differ, but for those that may be `silent` where one of them is."""
    if left is None or right is None:
        return [] if left == right else [f"here {left}, saved {right}"]
    left, right = {**UNSAID, **left}, {**UNSAID, **right}
    silent = {key for key in silent if not (left.get(key) and right.get(key))}
    keys = [key for key in {**left, **right} if key not in silent and left.get(key) != right.get(key)]
    return [f"{key} here {left.get(key)!r}, saved {right.get(key)!r}" for key in keys]


@dataclass(frozen=True, kw_only=True)
class Embodiment:
    """One robot. Views, parts and tools may be given as plain maps of their settings, as a YAML file has them.

    robot_hz: rows of state and action a second ("30", "20", "50/3").
    views: the cameras the models see; `grid` lays them out on one canvas, row by row, by name (None is black).
        Without a grid the views stand side by side. All views of a grid have one size.
    state, action: the parts of `state_key` and `action_key`, in order and without gaps; none of either for video of
        what is no robot, from which latent actions can still be learned.
    tools: grippers that pose maps draw, in views with a camera.
    """

    name: str
    robot_hz: str | int
    views: Sequence[View]
    action: Sequence[Part] = ()
    state: Sequence[Part] = ()
    grid: Sequence[Sequence[str | None]] = ()
    state_key: str = "observation.state"
    action_key: str = "action"
    tools: Sequence[Tool] = ()
    description: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for key, kind in MEMBERS.items():
            object.__setattr__(self, key, tuple(_made(kind, each) for each in getattr(self, key)))
        object.__setattr__(self, "robot_hz", str(self.robot_hz))
        if not self.views:
            raise ValueError(f"embodiment '{self.name}' has no views; name at least one camera")
        _require_names("view", self.views)
        grid = tuple(tuple(row) for row in self.grid) or (tuple(view.name for view in self.views),)
        object.__setattr__(self, "grid", grid)
        if len({len(row) for row in grid}) != 1:
            raise ValueError(f"embodiment '{self.name}': the rows of its grid differ in length: {grid}")
        placed = [name for row in grid for name in row if name is not None]
        if sorted(placed) != sorted(view.name for view in self.views):
            raise ValueError(f"embodiment '{self.name}': its grid places {placed}, its views are "
                             f"{[view.name for view in self.views]}; each view must be placed once")  # fmt: skip
        if len({(view.height, view.width) for view in self.views}) != 1:
            sizes = ", ".join(f"{view.name} {view.height}x{view.width}" for view in self.views)
            raise ValueError(f"embodiment '{self.name}': the views of a grid must have one size; here {sizes}")
        _cover("state", self.state)
        _cover("action", self.action)
        names = {part.name: part for part in self.state}
        for part in self.action:
            if part.moves is not None and part.moves not in names:
                raise ValueError(f"action part '{part.name}' moves '{part.moves}', which is no state part of "
                                 f"'{self.name}'; it has {sorted(names)}")  # fmt: skip
            if part.moves is not None:
                part.require_moves(names[part.moves])
            if part.kind == "binary" and part.limits is None:
                raise ValueError(f"binary action part '{part.name}' of embodiment '{self.name}' has no limits; give it "
                                 f"the two values of its command, e.g. limits: [-1, 1]")  # fmt: skip
            self._require_axes(part, names)
        for tool in self.tools:
            for part, width in ((tool.position, 3), (tool.opening, 1)):
                if part is not None and (part not in names or names[part].width != width):
                    raise ValueError(f"a tool of embodiment '{self.name}' names the state part '{part}'; expected one "
                                     f"of {width} entries among {sorted(names)}")  # fmt: skip

    def _require_axes(self, part: Part, states: Mapping[str, Part]) -> None:
        """ValueError unless a displacement along the hand's own axes says what turns them, and no other part does."""
        mine = part.kind == "delta" and part.frame == "tool" and not part.rotation
        if part.turned_by is None and not (mine and part.moves):
            return
        turns = {turn.name: turn for turn in self.action
                 if turn.rotation and (turn.kind, turn.frame) == ("delta", "tool")}  # fmt: skip
        turn = turns.get(part.turned_by or "")
        moved = [getattr(states.get(each.moves or ""), "frame", None) for each in (part, turn) if each is not None]
        if not mine or turn is None or part.width != 3 or moved[0] != moved[1]:
            raise ValueError(f"action part '{part.name}' of embodiment '{self.name}' ({part.kind}, {part.width} entries"
                             f", frame '{part.frame}') has turned_by {part.turned_by!r}; a displacement of 3 entries "
                             f"along the hand's own axes (kind: delta, frame: tool) names the delta rotation of the "
                             f"action with frame: tool that turns these axes, of {sorted(turns)}; both move parts of "
                             f"the state in one frame, or neither does. Other parts have no turned_by")  # fmt: skip

    def turning(self, part: Part) -> tuple[Part, Part | None]:
        """The action part that turns the axes of a displacement, and the rotation of the state that it moves."""
        turn = next(other for other in self.action if other.name == part.turned_by)
        return turn, next((state for state in self.state if state.name == turn.moves), None)

    @property
    def rate(self) -> Fraction:
        """Robot steps a second."""
        return Fraction(self.robot_hz)

    @property
    def action_dim(self) -> int:
        return self.action[-1].stop if self.action else 0

    @property
    def state_dim(self) -> int:
        return self.state[-1].stop if self.state else 0

    @property
    def canvas(self) -> tuple[int, int]:
        """Height and width in pixels of the tiled picture that the models see."""
        view = self.views[0]
        return view.height * len(self.grid), view.width * len(self.grid[0])

    def view(self, name: str) -> View:
        for view in self.views:
            if view.name == name:
                return view
        raise ValueError(f"embodiment '{self.name}' has no view '{name}'; it has {[v.name for v in self.views]}")

    def require_state(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError for an observation whose state is not (d,)."""
        if shape != (self.state_dim,):
            raise ValueError(f"the state of the observation has shape {shape}; embodiment '{self.name}' has "
                             f"({self.state_dim},); fill unknown states with NaN")  # fmt: skip

    def contract(self) -> dict:
        """All that data and its users must agree on, as plain JSON: saved with every dataset and checkpoint."""
        contract = _without(asdict(self), lambda key, value: (key in OPTIONAL and not value)
                            or (key in UNSAID and value == UNSAID[key]))  # fmt: skip
        contract.pop("description")
        return contract

    @classmethod
    def from_contract(cls, contract: dict) -> "Embodiment":
        """The robot that `contract()` describes."""
        known = {**contract, "views": [{"orientation": "", **view} for view in contract["views"]]}
        return cls(**known | {key: [_made(kind, each) for each in known.get(key, ())] for key, kind in MEMBERS.items()})

    def mismatches(self, contract: dict, *, learned: bool = False) -> list[str]:
        """What differs between this robot and a saved `contract`, one sentence each; learned: see `require`."""
        silent = set(OPTIONAL) - (LEARNED if learned else set())
        mine, theirs = _plain(self.contract()), _plain(contract)
        found = []
        for key in sorted(mine.keys() | theirs.keys()):
            left, right = mine.get(key), theirs.get(key)
            if left == right:
                continue
            if key in ("views", "state", "action"):
                a, b = {p["name"]: p for p in left or ()}, {p["name"]: p for p in right or ()}
                for name in list(a) + [n for n in b if n not in a]:
                    if fields := _apart(a.get(name), b.get(name), silent):
                        found.append(f"{key} '{name}': {', '.join(fields)}")
                if list(a) != list(b) and sorted(a) == sorted(b):
                    found.append(f"{key}: order here {list(a)}, saved {list(b)}")
            elif not (key in OPTIONAL and not (left and right)):
                found.append(f"{key}: here {left}, saved {right}")
        return found

    def untold(self, contract: dict) -> list[str]:
        """Orientations, rotations and signs in which this robot is not compared with a saved `contract`: one does not
        tell."""
        mine, found = self.contract(), []
        for key in ("views", "state", "action"):
            saved = {each["name"]: each for each in contract.get(key) or ()}
            for here, there in ((each, saved[each["name"]]) for each in mine[key] if each["name"] in saved):
                both = {name for name in OPTIONAL if here.get(name) and there.get(name)}
                if key == "views" and "orientation" not in both:
                    found.append(f"the orientation of view '{here['name']}'")
                signed = here.get("kind") == "binary" or here.get("positive") or there.get("positive")
                if bool(here.get("rotation")) != bool(there.get("rotation")):
                    found.append(f"the rotation of {key} '{here['name']}'")
                if key == "action" and signed and not both & {"positive", "sets"}:
                    found.append(f"what high values of action '{here['name']}' do (positive)")
        return found

    def require(self, contract: dict, where: str, *, learned: bool = False) -> None:
        """Raise ValueError that names each difference between this robot and the `contract` saved at `where`; warn of
        an orientation, a sign or a rotation that is not compared since only one of them tells it, or since neither
        does and they come from different files. learned: by weights, which know other numbers where such a rotation
        is none: then it is a difference."""
        found = self.mismatches(contract, learned=learned)
        if found:
            raise ValueError(f"{where} was made for another robot than embodiment '{self.name}':\n  "
                             + "\n  ".join(found)
                             + "\nChoose the embodiment it was made with, or make it again.")  # fmt: skip
        if _plain(contract) != _plain(self.contract()) and (untold := self.untold(contract)):
            log.warning("%s and embodiment '%s' do not both tell, so it is not compared: %s", where, self.name,
                        ", ".join(untold))  # fmt: skip

    def require_same(self, part: object, where: str) -> None:
        """As `require`, of a judge, a tracker or a policy; one that names no robot is taken for any."""
        if (own := getattr(part, "robot", None)) is not None:
            self.require(own.contract(), where)
