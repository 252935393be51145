"""Columns and videos of other programs that are not in all episodes what they are in the first."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from dreamgen.core.clip import Episode
from dreamgen.data.export import export_dataset
from dreamgen.data.lerobot import Dataset
from dreamgen.data.writer import write_dataset
from tests.data.v2_files import change_info, change_table


def add(root, features: dict, columns: dict, episodes=range(3)) -> None:
    """Columns of 11 rows, cut to the rows of each episode."""
    known = json.loads((root / "meta/info.json").read_text())["features"]
    change_info(root, features=known | features)
    for i in episodes:
        change_table(root, i, lambda t: t | {name: values[: len(t["action"])] for name, values in columns.items()})


def test_a_column_that_a_later_episode_lacks_is_left_out(v2, robot, tmp_path):
    root, _ = v2
    features = {"next.reward": {"dtype": "float32", "shape": [1]}, "label_spread": {"dtype": "float32", "shape": [4]},
                "annotation.kind": {"dtype": "int64", "shape": [1]}}  # fmt: skip
    columns = {"next.reward": [0.5] * 11, "label_spread": [[0.5] * 4] * 11, "annotation.kind": [0] * 11}
    add(root, features, columns, episodes=range(2))
    done = export_dataset(Dataset(root, robot), tmp_path / "out", format="v2.1")
    assert done["episodes"] == 3 and done["left_out"] == list(features)
    add(root, {}, columns, episodes=[2])
    done = export_dataset(Dataset(root, robot), tmp_path / "all", format="v2.1")
    assert done["left_out"] == [] and pq.read_table(tmp_path / "all/data/chunk-000/episode_000002.parquet")[
        "next.reward"].to_pylist() == [0.5] * 11  # fmt: skip


def test_columns_in_which_values_are_missing(v2, robot, tmp_path):
    """A text would become "None", a boolean False, a whole number any; a float is NaN, as it is wherever it is read."""
    root, _ = v2
    features = {"said": {"dtype": "string", "shape": [1]}, "next.done": {"dtype": "bool", "shape": [1]},
                "count": {"dtype": "int64", "shape": [1]}, "counts": {"dtype": "int64", "shape": [2]},
                "force": {"dtype": "float32", "shape": [2]}}  # fmt: skip
    whole = {"said": ["go"] * 11, "next.done": [True] * 11, "count": [7] * 11, "counts": [[7, 8]] * 11,
             "force": [[0.5, None]] * 11}  # fmt: skip
    add(root, features, whole)
    data = Dataset(root, robot)
    assert data.others == ["count", "counts", "force"]
    assert export_dataset(data, tmp_path / "whole", format="v2.1")["left_out"] == []
    assert np.array_equal(Dataset(tmp_path / "whole", robot).extra(1)["force"], [[0.5, np.nan]] * 9, equal_nan=True)
    add(root, {}, {name: [*values[:-1], None if np.ndim(values) == 1 else [7, None]]
                   for name, values in whole.items() if name != "force"}, episodes=[2])  # fmt: skip
    data = Dataset(root, robot)
    assert data.others == ["force"]
    assert export_dataset(data, tmp_path / "out", format="v2.1")["left_out"] == ["said", "next.done", "count", "counts"]


@pytest.mark.parametrize("rate", ["robot", "10"])  # copied, and encoded again
def test_a_video_that_cannot_be_decoded_is_named(v2, robot, tmp_path, rate):
    """It is whole by its packets, so that nothing but decoding it shows it."""
    root, _ = v2
    path = root / "videos/chunk-000/observation.images.side/episode_000001.mp4"
    data = bytearray(path.read_bytes())
    begin, end = data.index(b"mdat") + 4, data.rindex(b"moov") - 4
    data[begin:end] = b"\xff" * (end - begin)
    path.write_bytes(data)
    words = r"episode 1 of .*: its video of 'observation.images.side' cannot be used: .*stage.data.episodes lists those"
    with pytest.raises(ValueError, match=words):
        export_dataset(Dataset(root, robot), tmp_path / "out", rate=rate)
    assert export_dataset(Dataset(root, robot, episodes=[0, 2]), tmp_path / "out", rate=rate)["episodes"] == 2


@pytest.mark.parametrize("names", [["x.pos", "y.pos", "z.pos", "gripper.pos"], {"motors": ["x", "y", "z", "gripper"]}])
def test_entries_keep_the_names_that_others_know_them_by(v2, robot, tmp_path, names):
    root, _ = v2
    features = json.loads((root / "meta/info.json").read_text())["features"]
    features["action"]["names"] = names
    features["observation.state"]["names"] = ["too", "few"]
    change_info(root, features=features)
    export_dataset(Dataset(root, robot), tmp_path / "out")
    found = json.loads((tmp_path / "out/meta/info.json").read_text())["features"]
    assert found["action"]["names"] == (names if isinstance(names, list) else names["motors"])
    assert found["observation.state"]["names"] == ["pose_0", "pose_1", "pose_2", "grip_0", "grip_1"]


def test_states_that_the_robot_does_not_read_come_along(v2, robot, tmp_path):
    root, episodes = v2
    blind = replace(robot, state=(), action=tuple(replace(part, moves=None) for part in robot.action))
    assert export_dataset(Dataset(root, blind), tmp_path / "out")["left_out"] == []
    np.testing.assert_array_equal(Dataset(tmp_path / "out", robot).episode(2).state, episodes[2].state)


def test_states_that_nobody_knows_are_told(make_episode, robot, tmp_path, caplog):
    """Zeros stand in for them, which no statistic of what commands do to states may count."""

    def told(i: int) -> Episode:
        episode = make_episode(i, rows=12)
        known = np.ones((12, 5), np.float32)
        known[:6] = i != 1
        return replace(episode, state=np.where(known != 0, episode.state, 0), extra={"state_known": known})

    robot = replace(robot, action=(replace(robot.action[0], kind="absolute", scale=1.0), robot.action[1]))
    write_dataset(tmp_path / "data", map(told, range(3)), robot)
    done = export_dataset(Dataset(tmp_path / "data", robot), tmp_path / "out", format="groot", horizon=4)
    assert done["unknown_states"] == 1 and "states of 1 of 3 episodes are not known in some rows" in caplog.text
    lists = [(told(i).state[:9], told(i).action[:9]) for i in range(3)]
    moved = np.concatenate([action[6 * (i == 1) :, :3] - state[6 * (i == 1) :, :3]
                            for i, (state, action) in enumerate(lists)])  # fmt: skip
    stats = json.loads((tmp_path / "out/meta/relative_stats.json").read_text())["move"]
    np.testing.assert_allclose(stats["mean"][0], moved.mean(0), rtol=1e-5)
