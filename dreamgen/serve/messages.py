"""Observations as maps, under the keys that a robot has for them.

The keys of openpi's own clients differ from robot to robot, so they are named: one for each view, one for the state or
for each of its parts, one for the prompt. "a/b" is a key, or the key b of a map under a. A picture may also come as
(3, h, w).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dreamgen.core.clip import Observation
from dreamgen.core.embodiment import Embodiment, View
from dreamgen.serve.asked import instruction_of


def keys(robot: Embodiment) -> dict[str, Any]:
    """Where each part of an observation lies, if nobody names other keys."""
    return {"views": {view.name: f"observation/{view.name}" for view in robot.views},
            "state": "observation/state", "prompt": "prompt"}  # fmt: skip


def require_names(names: Any, robot: Embodiment) -> dict[str, Any]:
    """`names`, a map as of `keys` in which the state may also be a map of its parts; ValueError if it is another."""
    views, parts = [view.name for view in robot.views], [part.name for part in robot.state]
    found = dict(names) if isinstance(names, Mapping) else {}
    groups = [(found.get("views"), views), (found.get("state"), parts)]
    used = [key for node in found.values() for key in (node.values() if isinstance(node, Mapping) else [node])]
    if (
        found.keys() != {"views", "state", "prompt"}
        or not isinstance(found["views"], Mapping)
        or any(isinstance(group, Mapping) and sorted(group) != sorted(wanted) for group, wanted in groups)
        or not all(isinstance(key, str) for key in used)
        or len(set(used)) < len(used)
    ):
        raise ValueError(f"names is {names!r:.200}; expected a key, each another, for the views {views}, for the state "
                         f"or each of {parts}, and for the prompt, such as {keys(robot)}")  # fmt: skip
    return found


def to_message(seen: Observation, names: Mapping[str, Any], robot: Embodiment) -> dict[str, Any]:
    """An observation of `robot` as the map whose keys are `names`."""
    views = {names["views"][name]: picture for name, picture in seen.views.items() if name in names["views"]}
    state, where = np.asarray(seen.state, np.float32), names["state"]
    whole = not isinstance(where, Mapping)
    states = {where: state} if whole else {where[part.name]: state[part.slice] for part in robot.state}
    return {**views, **states, names["prompt"]: seen.instruction}


def from_message(
    message: Any, robot: Embodiment, names: Mapping[str, Any], instruction: str | None = None
) -> Observation:
    """The inverse of `to_message`. instruction: of a message without a prompt.

    Raises ValueError that names what is missing, of another type, or of another shape.
    """
    if not isinstance(message, dict):
        raise ValueError(f"a message of type {type(message).__name__}; expected a map with {names}")
    views, state, prompt = names["views"], names["state"], names["prompt"]
    states = list(state.values()) if isinstance(state, Mapping) else [state] if robot.state_dim else []
    arrays = {key: _under(message, key) for key in (*views.values(), *states)}
    text = _under(message, prompt)
    text = instruction if text is None else text
    if missing := [key for key, value in {**arrays, prompt: text}.items() if value is None]:
        raise ValueError(f"the observation lacks {missing}; expected {[*arrays, prompt]}")
    for key, value in arrays.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)  # np.float64 is sent as a plain number
        if not (number or isinstance(value, np.ndarray | np.number)) or np.asarray(value).dtype.kind not in "biuf":
            raise ValueError(f"'{key}' of the observation is no array of numbers but {type(value).__name__}")
    pictures = {view.name: _upright(np.asarray(arrays[views[view.name]]), view) for view in robot.views}
    return Observation(views=pictures, state=_state(arrays, robot, state),
                       instruction=instruction_of(text, f"'{prompt}' of the observation"))  # fmt: skip


def _under(message: Any, key: str) -> Any:
    """What lies under `key`, or under its pieces in maps inside of each other; None if nothing does."""
    if key in message:
        return message[key]
    for piece in key.split("/"):
        message = message.get(piece) if isinstance(message, dict) else None
    return message


def _upright(picture: np.ndarray, view: View) -> np.ndarray:
    """A picture, of (3, h, w) as (h, w, 3)."""
    if picture.shape == (3, view.height, view.width):
        picture = np.ascontiguousarray(picture.transpose(1, 2, 0))
    view.require(picture)
    return picture


def _state(arrays: Mapping[str, Any], robot: Embodiment, where: str | Mapping[str, str]) -> np.ndarray:
    """The state (d,) float32 that lies under `where`, whole or in parts."""
    if not robot.state_dim:
        return np.zeros(0, np.float32)
    if not isinstance(where, Mapping):
        robot.require_state(np.shape(arrays[where]))
        return np.asarray(arrays[where], np.float32)
    state = np.zeros(robot.state_dim, np.float32)
    for part in robot.state:
        value = np.atleast_1d(arrays[where[part.name]])  # one number may come without an axis
        if value.shape != (part.width,):
            raise ValueError(f"'{where[part.name]}' of the observation is {value.shape}; expected ({part.width},)")
        state[part.slice] = value
    return state
