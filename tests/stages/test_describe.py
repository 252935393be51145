"""A drafted embodiment loads as one, opens the dataset that it was drafted from, and says what it guessed."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from scipy.spatial.transform import Rotation

from dreamgen.core import rotations
from dreamgen.core.clip import Episode
from dreamgen.core.embodiment import Embodiment, Part, View
from dreamgen.core.part import ROTATIONS
from dreamgen.data.export import export_dataset
from dreamgen.data.layout import CONTRACT
from dreamgen.data.lerobot import Dataset
from dreamgen.data.writer import write_dataset
from dreamgen.stages.describe import describe
from tests.data.conftest import untyped  # noqa: F401

GR1 = Path(__file__).parents[2].parent / "shared/data/gr1_pick_place"
JOINTS = ["shoulder_pan", "elbow_flex", "gripper"]
CAMERAS = {"front": (64, 96), "wrist": (64, 96)}


def arm() -> Embodiment:
    parts = [Part(name=name, start=k, stop=k + 1) for k, name in enumerate(JOINTS)]
    views = [View(name=n, key=f"observation.images.{n}", height=h, width=w) for n, (h, w) in CAMERAS.items()]
    return Embodiment(name="so100", robot_hz=30, views=views, state=parts, action=parts)


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """v3.0 and v2.0 of an arm whose first joint follows its command, whose second does not, with a gripper command."""
    rng, made = np.random.default_rng(0), []
    for rows in (9, 12):
        swing = np.cumsum(rng.normal(0, 5, (rows + 1, 1)), 0)
        close = np.where(rng.random((rows, 1)) > 0.5, 100, 0)
        state = np.concatenate([swing[:-1], rng.normal(0, 5, (rows, 1)), rng.random((rows, 1))], 1)
        action = np.concatenate([swing[:-1] + 0.1, rng.normal(0, 5, (rows, 1)), close], 1)
        video = {n: rng.integers(0, 255, (rows, *size, 3)).astype(np.uint8) for n, size in CAMERAS.items()}
        made.append(Episode(instruction="go", state=state.astype(np.float32), action=action.astype(np.float32),
                            video=video))  # fmt: skip
    write_dataset(tmp_path / "v3", made, arm())
    export_dataset(Dataset(tmp_path / "v3", arm()), tmp_path / "v2", format="v2.1")
    for root, version in ((tmp_path / "v3", "v3.0"), (tmp_path / "v2", "v2.0")):
        (root / CONTRACT).unlink()
        info = json.loads((root / "meta/info.json").read_text())
        for key in ("observation.state", "action"):
            info["features"][key]["names"] = {"motors": [f"{name}.pos" for name in JOINTS]}
        (root / "meta/info.json").write_text(json.dumps(info | {"codebase_version": version, "robot_type": "SO-100"}))
    return tmp_path


def made(text: str) -> Embodiment:
    return instantiate(OmegaConf.create(text), _convert_="all")


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_a_draft_opens_the_dataset(recorded: Path, tmp_path: Path, version: str, untyped) -> None:  # noqa: F811
    text = describe(str(recorded / version), out=tmp_path / "out", record={})["results"]["text"]
    assert text == (tmp_path / "out" / "embodiment.yaml").read_text()
    robot = made(text)
    data = Dataset(recorded / version, robot)
    assert len(data) == 2 and data.canvas(1, [3]).shape == (1, 64, 192, 3) and robot.name == "so_100"
    assert [view.name for view in robot.views] == ["front", "wrist"] and robot.rate == 30
    assert robot.grid == (("front", "wrist"),) and robot.canvas == (64, 192)
    assert [part.name for part in robot.state] == [part.name for part in robot.action] == JOINTS
    assert [part.moves for part in robot.action] == ["shoulder_pan", None, None]
    assert [part.kind for part in robot.action] == ["absolute", "absolute", "binary"]
    assert robot.action[2].limits == (0, 100)
    assert "does not follow the state of that name" in text and "say what the high one does (positive)" in text
    named = describe(str(recorded / version), out=tmp_path / "named", name="mine", record={})["results"]["text"]
    assert made(named).name == "mine"


def test_entries_without_names_are_one_part_and_numbered_ones_too(recorded: Path, tmp_path: Path, untyped) -> None:  # noqa: F811
    path = recorded / "v3/meta/info.json"
    info = json.loads(path.read_text())
    info["features"]["observation.state"]["names"] = None
    info["features"]["action"]["names"] = ["joint_0", "joint_1", "Gripper 1"]
    path.write_text(json.dumps(info))
    robot = made(describe(str(recorded / "v3"), out=tmp_path / "out", record={})["results"]["text"])
    assert [(part.name, part.width) for part in robot.state] == [("joints", 3)]
    assert [(part.name, part.width) for part in robot.action] == [("joint", 2), ("gripper", 1)]


def test_a_contract_says_it_all(tmp_path: Path, untyped) -> None:  # noqa: F811
    episode = Episode(instruction="go", state=np.zeros((4, 3), np.float32), action=np.zeros((4, 3), np.float32),
                      video={n: np.zeros((4, *size, 3), np.uint8) for n, size in CAMERAS.items()})  # fmt: skip
    write_dataset(tmp_path / "data", [episode], arm())
    text = describe(str(tmp_path / "data"), out=tmp_path / "out", record={})["results"]["text"]
    assert made(text) == arm()
    describe(str(tmp_path / "data"), out=tmp_path / "out", name="so100", record={})
    with pytest.raises(ValueError, match="name is 'mine', and .*dreamgen.json says that the robot is 'so100'"):
        describe(str(tmp_path / "data"), out=tmp_path / "out", name="mine", record={})


def test_what_shows_no_robot_is_refused(recorded: Path, tmp_path: Path) -> None:
    path = recorded / "v3/meta/info.json"
    info = json.loads(path.read_text())
    info["features"].pop("action")
    path.write_text(json.dumps(info))
    with pytest.raises(ValueError, match="v3 has no actions to describe a robot by"):
        describe(str(recorded / "v3"), out=tmp_path / "out", record={})


def turned(tmp_path: Path, states: list[str], actions: list[str], state: np.ndarray, action: np.ndarray) -> str:
    """What is said of a dataset whose entries have these names."""
    parts = [[Part(name=f"e{k}", start=k, stop=k + 1) for k in range(values.shape[1])] for values in (state, action)]
    robot = Embodiment(name="arm", robot_hz=5, views=arm().views[:1], state=parts[0], action=parts[1])
    video = {"front": np.zeros((len(state), 64, 96, 3), np.uint8)}
    episode = Episode(instruction="turn", state=state.astype(np.float32), action=action.astype(np.float32), video=video)
    write_dataset(tmp_path / "turned", [episode], robot)
    (tmp_path / "turned" / CONTRACT).unlink()
    path = tmp_path / "turned/meta/info.json"
    info = json.loads(path.read_text())
    for key, names in (("observation.state", states), ("action", actions)):
        info["features"][key]["names"] = names
    path.write_text(json.dumps(info))
    return describe(str(tmp_path / "turned"), out=tmp_path / "out", record={})["results"]["text"]


PLACE, HAND = ["x", "y", "z"], ["gripper"]
# names of the state, of the action; how they tell the rotation; where the action's is a delta
NAMED = {
    "bridge": ([*PLACE, "roll", "pitch", "yaw", "pad", *HAND], [*PLACE, "roll", "pitch", "yaw", *HAND], "euler_xyz",
               "euler_xyz", True),
    "fractal": ([*PLACE, "rx", "ry", "rz", "rw", *HAND], [*PLACE, "roll", "pitch", "yaw", *HAND], "quaternion_xyzw",
                "euler_xyz", True),
    "libero": ([*PLACE, "axis_angle1", "axis_angle2", "axis_angle3", *HAND], [*PLACE, "rx", "ry", "rz", *HAND],
               "axis_angle", "axis_angle", False),
    "of a hand": (["ee.x", "ee.y", "ee.z", "ee.qw", "ee.qx", "ee.qy", "ee.qz"], [*PLACE, "ee.qw", "ee.qx", "ee.qy",
                  "ee.qz"], "quaternion_wxyz", "quaternion_wxyz", False),
    "two rows": ([*PLACE, *(f"rot6d_{k}" for k in range(6))], [*PLACE, *(f"rot6d_{k}" for k in range(6))], "rot6d",
                 "rot6d", False),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_rotations_are_told_by_their_names(name: str, tmp_path: Path, untyped) -> None:  # noqa: F811
    states, actions, of_state, of_action, delta = NAMED[name]
    rng = np.random.default_rng(0)
    path = Rotation.from_rotvec(rng.normal(0, 0.1, (40, 3)).cumsum(0)) * Rotation.from_rotvec([np.pi, 0, 0])
    turns = Rotation.from_rotvec(rng.normal(0, 0.05, (40, 3))) if delta else path
    rows = []
    for names, kind, rotation in ((states, of_state, path), (actions, of_action, turns)):
        part = Part(name="turn", start=0, stop=ROTATIONS[kind], rotation=kind)
        told = rotations.tell(part, np.roll(rotation.as_quat(), 1, -1))
        rest = rng.normal(size=(40, len(names) - part.width))
        rows.append(np.concatenate([rest[:, :3], told, rest[:, 3:]], 1))
    text = turned(tmp_path, states, actions, *rows)
    robot = made(text)
    (state,), (action,) = ([p for p in parts if p.rotation] for parts in (robot.state, robot.action))
    assert (state.rotation, action.rotation, state.start) == (of_state, of_action, 3)
    assert state.unit == ("rad" if state.width == 3 else "1")
    if delta:
        assert action.moves is None and "a delta? Then add kind: delta and moves: rotation, frame: tool" in text
    else:
        assert action.moves == state.name and "follows the state (" in text and "rad apart)" in text
    assert ("about the turning axes" in text) == (of_action == "euler_xyz")
    assert [p.name for p in robot.state][:3] == [f"ee_{axis}" if name == "of a hand" else axis for axis in "xyz"]
    Dataset(tmp_path / "turned", robot)


def test_joints_called_roll_and_sizes_that_are_none_are_no_rotations(tmp_path: Path, untyped) -> None:  # noqa: F811
    wrist = ["left_wrist_roll", "left_wrist_pitch", "left_wrist_yaw"]
    values = np.random.default_rng(0).normal(size=(9, 7))
    text = turned(tmp_path, [*wrist, "qx", "qy", "qz", "qw"], wrist, values, values[:, :3])
    assert not any(part.rotation for part in (*made(text).state, *made(text).action))


@pytest.mark.skipif(not GR1.is_dir(), reason="the GR-1 recording is not here")
def test_a_humanoid_of_groot(tmp_path: Path, untyped) -> None:  # noqa: F811
    robot = made(describe(str(GR1), out=tmp_path / "out", record={})["results"]["text"])
    assert len(Dataset(GR1, robot)) == 5 and [view.name for view in robot.views] == ["ego_view"]
    assert [part.name for part in robot.action][:2] == ["left_arm", "left_hand"] and robot.action_dim == 44
    assert {part.name for part in robot.action if part.moves} >= {"left_arm", "right_arm"}


def test_a_delta_is_told_from_a_target_by_how_the_state_changes(tmp_path: Path, untyped) -> None:  # noqa: F811
    rng, recorded = np.random.default_rng(1), []
    for rows in (60, 70):
        step = rng.normal(0, 1, (rows, 2))
        place = 5 + np.cumsum(0.04 * step, 0) - 0.04 * step
        state, action = (np.concatenate([x, np.linspace(0, 1, rows)[:, None]], 1) for x in (place, step))
        video = {"front": np.zeros((rows, 64, 96, 3), np.uint8)}
        recorded.append(Episode(instruction="go", state=state.astype(np.float32), action=action.astype(np.float32),
                            video=video))  # fmt: skip
    names = [("place", 0, 2), ("door", 2, 3)]
    state = [Part(name=name, start=a, stop=b) for name, a, b in names]
    action = [Part(name="delta_place", start=0, stop=2), state[1]]
    front = View(name="front", key="observation.images.front", height=64, width=96)
    write_dataset(
        tmp_path / "d", recorded, Embodiment(name="arm", robot_hz=10, views=[front], state=state, action=action)
    )
    (tmp_path / "d" / CONTRACT).unlink()
    info = json.loads((tmp_path / "d/meta/info.json").read_text())
    info["features"]["observation.state"]["names"] = ["place_0", "place_1", "door"]
    info["features"]["action"]["names"] = ["delta_place_0", "delta_place_1", "door"]
    (tmp_path / "d/meta/info.json").write_text(json.dumps(info))
    text = describe(str(tmp_path / "d"), out=tmp_path / "out", record={})["results"]["text"]
    moved, door = made(text).action
    assert (moved.name, moved.kind, moved.moves, moved.scale) == ("delta_place", "delta", "place", 0.04)
    assert (door.kind, door.moves) == ("absolute", "door")
    again = describe(str(tmp_path / "d"), out=tmp_path / "out", name="other", record={"name": "other"})
    assert again["results"]["text"].startswith("# other")  # a draft is drawn anew


@pytest.mark.parametrize(("count", "grid", "canvas"), [
    (3, (("a", "b"), ("c", None)), (480, 640)), (5, (("a", "b"), ("c", "d"), ("e", None)), (672, 640)),
])  # fmt: skip
def test_many_cameras_share_a_canvas(tmp_path, count, grid, canvas, untyped):  # noqa: F811
    views = [View(name=name, key=f"observation.images.{name}", height=480, width=640) for name in "abcde"[:count]]
    part = (Part(name="joint", start=0, stop=1),)
    robot = Embodiment(name="wide", robot_hz=30, views=views, state=part, action=part)
    values = np.linspace(0, 1, 3, dtype=np.float32)[:, None]
    video = {view.name: np.zeros((3, 480, 640, 3), np.uint8) for view in views}
    write_dataset(tmp_path / "d", [Episode(instruction="go", state=values, action=values, video=video)], robot)
    (tmp_path / "d" / CONTRACT).unlink()
    drafted = made(describe(str(tmp_path / "d"), out=tmp_path / "out", record={})["results"]["text"])
    assert drafted.grid == grid and drafted.canvas == canvas


def test_entries_that_modality_leaves_out_and_depths(recorded: Path, tmp_path: Path, untyped) -> None:  # noqa: F811
    root = recorded / "v2"
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["observation.images.wrist"]["info"] = {"video.is_depth_map": True}
    (root / "meta/info.json").write_text(json.dumps(info))
    (root / "meta/modality.json").write_text(json.dumps({
        "state": {"elbow": {"start": 1, "end": 2}}, "action": {"arm": {"start": 0, "end": 2}},
        "video": {"front": {"original_key": "observation.images.front"}}}))  # fmt: skip
    text = describe(str(root), out=tmp_path / "out", record={})["results"]["text"]
    robot = made(text)
    assert [(p.name, p.start, p.stop) for p in robot.state] == [("rest_0", 0, 1), ("elbow", 1, 2), ("rest_2", 2, 3)]
    assert [(p.name, p.start, p.stop) for p in robot.action] == [("arm", 0, 2), ("rest_2", 2, 3)]
    assert [view.name for view in robot.views] == ["front"]
    assert "# 'observation.images.wrist' shows depths: it is no view." in text
    assert len(Dataset(root, robot)) == 2
    with pytest.raises(ValueError, match="view 'wrist' of embodiment 'so100' is .* whose pictures are depths"):
        Dataset(root, replace(arm(), state=robot.state, action=robot.action))
