"""A recorded robot whose wrist is turned: errors of its policies, its labels by a perfect labeler, its export."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from dreamgen.core import rotations
from dreamgen.core.clip import Episode
from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment, View
from dreamgen.core.part import ROTATIONS, Part
from dreamgen.data.export import export_dataset
from dreamgen.data.inspection import inspect
from dreamgen.data.lerobot import Dataset
from dreamgen.data.recordings import recorded_clip
from dreamgen.data.writer import write_dataset
from dreamgen.stages.evaluate_open_loop import evaluate_open_loop
from dreamgen.stages.label import pseudo_states
from dreamgen.stages.open_loop import open_loop_error
from idm.merge import RULES, Windows, merge

ROWS, HORIZON = 13, 4


def robot(rotation: str) -> Embodiment:
    wide = ROTATIONS[rotation]
    return Embodiment(
        name="arm", robot_hz=10, views=(View(name="eye", key="observation.images.eye", height=16, width=24),),
        state=(Part(name="wrist", start=0, stop=wide, rotation=rotation),
               Part(name="elbow", start=wide, stop=2 * wide, rotation=rotation)),
        action=(Part(name="aim", start=0, stop=wide, rotation=rotation, moves="wrist"),
                Part(name="turn", start=wide, stop=wide + 3, rotation="axis_angle", kind="delta", frame="tool",
                     moves="elbow")),
    )  # fmt: skip


def recorded(folder: Path, rotation: str) -> Dataset:
    """Two episodes of a wrist that swings about pointing down, one row behind its command, and of an elbow."""
    arm, made, rng = robot(rotation), [], np.random.default_rng(0)
    down = Rotation.from_rotvec([np.pi, 0, 0])
    for _ in range(2):
        path = Rotation.from_rotvec(rng.normal(0, 0.2, (ROWS + 1, 3)).cumsum(0)) * down
        turns, elbow = Rotation.from_rotvec(rng.normal(0, 0.2, (ROWS, 3))), [down]
        for turn in turns:
            elbow.append(elbow[-1] * turn)
        path, elbow = (rotations.tell(arm.state[0], np.roll(r.as_quat(), 1, -1))
                       for r in (path, Rotation.concatenate(elbow)))  # fmt: skip
        made.append(Episode(instruction="turn", state=np.concatenate([path, elbow], 1)[:-1].astype(np.float32),
                            action=np.concatenate([path[1:], turns.as_rotvec()], 1).astype(np.float32),
                            video={"eye": rng.integers(0, 255, (ROWS, 16, 24, 3)).astype(np.uint8)}))  # fmt: skip
    write_dataset(folder, made, arm)
    return Dataset(folder, arm)


class Oracle:
    """Says what was recorded next, turned by a tenth of a radian."""

    horizon = HORIZON

    def __init__(self, data: Dataset) -> None:
        self.robot, self.data = data.robot, data
        self.known = {data.episode(i).state[row].tobytes(): (i, row) for i in range(2) for row in range(ROWS)}

    def act(self, observations, seeds) -> np.ndarray:
        aim, chunks = self.robot.action[0], []
        for seen in observations:
            i, row = self.known[seen.state.tobytes()]
            chunk = np.zeros((HORIZON, self.robot.action_dim), np.float32)
            rest = self.data.episode(i).action[row : row + HORIZON].copy()
            off = rotations.exp(np.tile([0.0, 0.1, 0.0], (len(rest), 1)))
            rest[:, aim.slice] = rotations.tell(aim, rotations.product(rotations.read(aim, rest[:, aim.slice]), off))
            chunk[: len(rest)] = rest
            chunks.append(chunk)
        return np.stack(chunks)


@pytest.mark.parametrize("rotation", ["axis_angle", "euler_xyz", "quaternion_xyzw", "rot6d"])
def test_errors_of_policies_are_angles(rotation, tmp_path):
    data = recorded(tmp_path / "data", rotation)
    made = evaluate_open_loop(Oracle(data), data, out=tmp_path / "o", every=2, record={})["results"]["open_loop"]
    aim, turn = made["by_part"]["aim"], made["by_part"]["turn"]
    assert aim["mae"] == pytest.approx(0.1, abs=1e-5) and aim["mse"] == pytest.approx(0.01, abs=1e-6)
    assert turn["mae"] < 1e-5 and 0.1 < turn["control_mae"] < 1 and 0.1 < aim["control_mae"] < 1.5
    assert made["mae"] == pytest.approx(0.05, abs=1e-5)
    told = rotations.read(data.robot.action[0], data.actions()[:, data.robot.action[0].slice])
    size = (rotations.angle(rotations.mean(told), told) ** 2).mean()
    assert open_loop_error(Oracle(data), data, every=2) == pytest.approx(0.01 / size / 2, rel=1e-3)


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("hz", ["5", "10", "20/3"])
def test_a_perfect_labeler_returns_what_was_recorded(rotation, hz, tmp_path):
    """And the states that follow of its labels are those that were recorded, across half a turn."""
    data = recorded(tmp_path / "data", rotation)
    clip, action = recorded_clip(data, 0, Clock(robot_hz="10", video_hz=hz, frames=3))
    clock = Clock(robot_hz="10", video_hz=hz, frames=len(clip.video))
    windows = Windows.of(clock, 3)
    for rule in RULES:
        chunks = np.where(windows.mask[..., None], action[windows.steps], 1e6)[None].astype(np.float32)
        label = merge(chunks, windows, data.robot, rule)
        np.testing.assert_array_equal(label.value, action[: clock.steps])
        assert label.spread.max() < 1e-6
        ((state, known),) = pseudo_states(data.robot, [clip], [label], None)
        true = data.episode(0).state[: clock.steps]
        assert known.all()
        for part in data.robot.state:
            assert rotations.apart(part, state[:, part.slice], true[:, part.slice]).max() < 1e-5
            if part.width != 4:
                np.testing.assert_allclose(state[:, part.slice], true[:, part.slice], atol=1e-4)


def test_a_recording_of_rotations_is_sound_and_exported(tmp_path):
    data = recorded(tmp_path / "data", "quaternion_wxyz")
    assert [f.what for f in inspect(tmp_path / "data", data.robot, pictures=False)[0] if f.level != "note"] == []
    export_dataset(data, tmp_path / "groot", format="groot")
    told = json.loads((tmp_path / "groot/meta/modality.json").read_text())
    assert told["state"]["wrist"]["rotation_type"] == "quaternion"
    assert told["action"]["turn"]["rotation_type"] == "axis_angle" and told["action"]["turn"]["absolute"] is False
    other = replace(data.robot, state=(replace(data.robot.state[0], rotation="quaternion_xyzw"), data.robot.state[1]))
    with pytest.raises(ValueError, match="state 'wrist': rotation here 'quaternion_xyzw', saved 'quaternion_wxyz'"):
        Dataset(tmp_path / "data", other)
