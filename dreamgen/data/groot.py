"""What the GR00T flavour of LeRobot v2.1 adds: where the parts lie, annotation columns, and its own statistics.

`meta/modality.json` and `meta/stats.json` are what `LeRobotSingleDataset` (N1, N1.5) and `LeRobotEpisodeLoader` (N1.6)
of NVIDIA/Isaac-GR00T read; `meta/relative_stats.json` is what its `gr00t/data/stats.py` would compute for actions that
are taken relative to the state.
"""

from collections.abc import Sequence

import numpy as np

from dreamgen.core.embodiment import Embodiment, Part
from dreamgen.data import statistics

DESCRIPTION, VALIDITY = "annotation.human.action.task_description", "annotation.human.validity"
VALID = "valid"  # the text that NVIDIA's own files name as the validity of a good episode
# those that GR00T turns by PyTorch3D; it has no name for the others
ROTATION_TYPES = {"axis_angle": "axis_angle", "quaternion_wxyz": "quaternion", "rot6d": "rotation_6d",
                  "euler_xyz_intrinsic": "euler_angles_rpy"}  # fmt: skip
STATS = ("mean", "std", "min", "max", "q01", "q99")  # one value per entry each: GR00T slices all that it finds


def modality(robot: Embodiment, cameras: Sequence[str], annotations: Sequence[str]) -> dict:
    """`modality.json`: parts by name, views by name (other cameras by the end of their key, or all of it where another
    has that name), annotation columns."""
    names = {view.key: view.name for view in robot.views}
    for key in cameras:
        short = key.rpartition(".")[2]
        names.setdefault(key, key if short in names.values() else short)
    return {
        "state": {part.name: _part(part, robot.state_key) for part in robot.state},
        "action": {part.name: _part(part, robot.action_key) for part in robot.action},
        "video": {names[key]: {"original_key": key} for key in cameras},
        "annotation": {name.removeprefix("annotation."): {"original_key": name} for name in annotations},
    }


def _part(part: Part, key: str) -> dict:
    found = {"start": part.start, "end": part.stop, "original_key": key, "absolute": part.kind != "delta",
             "dtype": "float32"}  # fmt: skip
    if part.rotation in ROTATION_TYPES and part.radians == 1:
        found["rotation_type"] = ROTATION_TYPES[part.rotation]
    return found | ({"range": list(part.limits)} if part.limits is not None else {})


def stats(numbers: dict[str, dict]) -> dict[str, dict]:
    """`stats.json` from the statistics of all columns."""
    return {name: {key: found[key] for key in STATS} for name, found in numbers.items()}


def relative_stats(robot: Embodiment, states: Sequence[np.ndarray], actions: Sequence[np.ndarray],
                   horizon: int) -> dict[str, dict]:  # fmt: skip
    """Per part that sets a state part by value: statistics (horizon, width) of `action[t + h] - state[t]`.

    states (s d; nan where not known) and actions (s a) of each episode; rows without `horizon` rows after them are left
    out, as there, and those whose state is not known. Empty where no part is absolute or no episode is long enough.
    Rotations are left out: they have no difference.
    """
    where, found = {part.name: part.slice for part in robot.state}, {}
    usable = [(state, action) for state, action in zip(states, actions, strict=True) if len(action) >= horizon]
    for part in robot.action:
        if part.kind != "absolute" or part.moves is None or part.rotation or not usable:
            continue
        rows = []
        for h in range(horizon):
            moved = [action[h : len(action) - horizon + 1 + h, part.slice]
                     - state[: len(state) - horizon + 1, where[part.moves]] for state, action in usable]  # fmt: skip
            rows.append(np.concatenate(moved))
        told = np.isfinite(rows[0]).all(1)
        if told.any():
            stats = [statistics.of_numbers(row[told]) for row in rows]
            found[part.name] = {key: [one[key] for one in stats] for key in STATS}
    return found
