"""A drafted embodiment loads as one, opens the dataset that it was drafted from, and says what it guessed."""

import json
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from dreamgen.core.clip import Episode
from dreamgen.core.embodiment import Embodiment, Part, View
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


def test_what_shows_no_robot_is_refused(recorded: Path, tmp_path: Path) -> None:
    path = recorded / "v3/meta/info.json"
    info = json.loads(path.read_text())
    info["features"].pop("action")
    path.write_text(json.dumps(info))
    with pytest.raises(ValueError, match="v3 has no actions to describe a robot by"):
        describe(str(recorded / "v3"), out=tmp_path / "out", record={})


@pytest.mark.skipif(not GR1.is_dir(), reason="the GR-1 recording is not here")
def test_a_humanoid_of_groot(tmp_path: Path, untyped) -> None:  # noqa: F811
    robot = made(describe(str(GR1), out=tmp_path / "out", record={})["results"]["text"])
    assert len(Dataset(GR1, robot)) == 5 and [view.name for view in robot.views] == ["ego_view"]
    assert [part.name for part in robot.action][:2] == ["left_arm", "left_hand"] and robot.action_dim == 44
    assert {part.name for part in robot.action if part.moves} >= {"left_arm", "right_arm"}
