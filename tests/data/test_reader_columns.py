"""What a reader takes of a table and of the episode list: columns that stay on disk, unknown states, plain texts."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dreamgen.core.clip import Episode, read_prompts
from dreamgen.core.clock import Clock
from dreamgen.data.export import export_dataset
from dreamgen.data.inspection import inspect
from dreamgen.data.lerobot import Dataset
from dreamgen.data.prompts import DatasetPrompts
from dreamgen.data.recordings import recorded_clip
from dreamgen.data.writer import write_dataset
from dreamgen.stages.candidates import Candidates
from tests.data.v2_files import change_info, change_table, write_lines


def test_a_plain_text_is_one_task(v2, robot):
    root, _ = v2
    listed = [{"episode_index": i, "tasks": f"do {i}", "length": 7 + 2 * i} for i in range(3)]
    write_lines(root / "meta/episodes.jsonl", listed)
    for i in range(3):
        change_table(root, i, lambda t: {k: v for k, v in t.items() if k != "task_index"})
    assert [Dataset(root, robot).instruction(i) for i in range(3)] == ["do 0", "do 1", "do 2"]
    episodes = root / "meta/episodes/chunk-000/file-000.parquet"
    episodes.parent.mkdir(parents=True)
    pq.write_table(pa.table({"task_index": [0], "task": ["do 1"]}), root / "meta/tasks.parquet")
    change_info(root, codebase_version="v3.0", data_path="data/chunk-000/episode_{file_index:06d}.parquet",
                video_path="videos/chunk-000/{video_key}/episode_{file_index:06d}.mp4")  # fmt: skip
    place = {"chunk_index": [0], "file_index": [1], "from_timestamp": [0.0], "to_timestamp": [9 / 20]}
    pq.write_table(pa.table({
        "episode_index": [1], "tasks": ["do 1"], "dataset_from_index": [0], "dataset_to_index": [9],
        "data/chunk_index": [0], "data/file_index": [1],
        **{f"videos/observation.images.{view}/{k}": v for view in ("front", "side") for k, v in place.items()},
    }), episodes)  # fmt: skip
    assert Dataset(root, robot).instruction(0) == "do 1"


def test_what_is_not_used_stays_on_disk(v2, robot, tmp_path, monkeypatch):
    """Columns of other programs: ragged ones, lerobot's `language`, pictures of a camera that nobody looks through."""
    root, episodes = v2
    features = json.loads((root / "meta/info.json").read_text())["features"] | {
        "force": {"dtype": "float64", "shape": [2]}, "label_spread": {"dtype": "float32", "shape": [4]},
        "grid": {"dtype": "float32", "shape": [2, 3]}, "points": {"dtype": "float32", "shape": [1]},
        "language_events": {"dtype": "language", "shape": [1]}, "wrist": {"dtype": "image", "shape": [8, 9, 3]},
    }  # fmt: skip
    change_info(root, features=features)
    more = {
        "force": [[0.5, k] for k in range(11)], "label_spread": [[0.1, 0.2, 0.3, 0.4]] * 11,
        "grid": [[[1.0, 2, 3], [4, 5, 6]]] * 11, "points": [[0.0] * (k % 3) for k in range(11)],
        "language_events": [[{"role": "user", "at": 0.5}] * (k % 2) for k in range(11)],
        "wrist": [{"bytes": b"png", "path": None}] * 11,
    }  # fmt: skip
    for i in range(3):
        change_table(root, i, lambda t: t | {name: rows[: len(t["action"])] for name, rows in more.items()})
    asked, read = [], pq.read_table
    monkeypatch.setattr(pq, "read_table", lambda path, columns: asked.append(columns) or read(path, columns=columns))
    data = Dataset(root, robot)
    assert len(asked) == 3 and not {name for names in asked for name in names} & (more.keys() - {"label_spread"})
    assert np.array_equal(data.actions()[7:16], episodes[1].action) and data.mended == []
    assert data.episode(1).extra.keys() == {"label_spread"} and "points" in data.columns(1)
    assert data.others == ["force"] and list(data.extra(1)) == ["force", "label_spread"]
    assert np.array_equal(data.extra(1)["force"], [[0.5, k] for k in range(9)])
    done = export_dataset(data, tmp_path / "out", format="v2.1")
    assert done["left_out"] == ["grid", "points", "language_events", "wrist"]
    assert np.array_equal(Dataset(tmp_path / "out", robot).extra(2)["force"], data.extra(2)["force"])
    assert np.array_equal(Candidates(data, None).episode(2, {}).extra["force"], data.extra(2)["force"])


def test_the_time_of_day_survives_in_columns_of_others(v2, robot, tmp_path):
    """Float32 knows it to two minutes. What stages compute with is float32, whoever wrote it."""
    root, _ = v2
    features = json.loads((root / "meta/info.json").read_text())["features"] | {
        "clock": {"dtype": "float64", "shape": [1]}, "label_spread": {"dtype": "float64", "shape": [4]}
    }  # fmt: skip
    change_info(root, features=features)
    clock = 1.7e9 + np.arange(11) // 8 * 128.0
    for i, kind in enumerate((pa.float64(), pa.float32(), pa.float64())):  # one recorder has stored it otherwise
        change_table(root, i, lambda t, kind=kind: t | {
            "clock": pa.array(clock[: len(t["action"])], kind), "label_spread": [[0.1] * 4] * len(t["action"])
        })  # fmt: skip
    data = Dataset(root, robot)
    assert data.episode(0).extra["label_spread"].dtype == data.episode(0).action.dtype == np.float32
    export_dataset(data, tmp_path / "exported")
    write_dataset(tmp_path / "curated", (Candidates(data, None).episode(i, {}) for i in range(3)), robot)
    for name in ("exported", "curated"):
        again = Dataset(tmp_path / name, robot)
        assert again.info["features"]["clock"]["dtype"] == "float64"
        assert all(np.array_equal(again.extra(i)["clock"][:, 0], clock[: again.length(i)]) for i in range(3))
        write_dataset(tmp_path / "more" / name, (Candidates(again, None).episode(i, {}) for i in range(3)), robot)
        assert np.array_equal(Dataset(tmp_path / "more" / name, robot).extra(2)["clock"][:, 0], clock)
        assert not [f for f in inspect(tmp_path / name, robot)[0] if f.level != "note"]


def test_states_that_nobody_knows_are_not_where_an_episode_begins(tmp_path, robot, make_episode):
    """`label` writes zeros and `state_known` 0 where a clip brings no proprioception."""

    def told(i: int) -> Episode:
        known = np.zeros((7, 5), np.float32)
        known[i:] = 1
        known[4, 2] = 0
        return make_episode(i, rows=7, extra={"state_known": known})

    write_dataset(tmp_path, (told(i) for i in range(3)), robot)
    data = Dataset(tmp_path, robot)
    assert [data.first_state(i).size for i in range(3)] == [5, 0, 0] and data.first_state(2).shape == (0,)
    assert [[data.state(i, row).size for row in (1, 2, 4)] for i in range(3)] == [[5, 5, 0], [5, 5, 0], [0, 5, 0]]
    prompts = read_prompts(DatasetPrompts(dataset=data, keyframes=[0, 0.3])())  # rows 0 and 2
    assert [p.state.size for p in prompts] == [5, 5, 0, 5, 0, 5]
    assert np.array_equal(prompts[3].state, told(1).state[2])
    assert [Candidates(data, None).clip(i).state.size for i in range(3)] == [5, 0, 0]
    clock = Clock(robot_hz="20", video_hz="10", frames=2)
    assert [recorded_clip(data, i, clock)[0].state.size for i in range(3)] == [5, 0, 0]


def test_an_annotation_that_says_nothing_leaves_the_word_to_the_tasks(v2, robot):
    root, episodes = v2
    lines = (root / "meta/tasks.jsonl").read_text() + json.dumps({"task_index": 3, "task": ""}) + "\n"
    (root / "meta/tasks.jsonl").write_text(lines)
    key = "annotation.human.action.task_description"
    features = json.loads((root / "meta/info.json").read_text())["features"]
    change_info(root, features=features | {key: {"dtype": "int64", "shape": [1]}})
    for i in range(3):
        change_table(root, i, lambda t: t | {key: [3] * len(t["action"])})
    assert [Dataset(root, robot).instruction(i) for i in range(3)] == [e.instruction for e in episodes]
    tasks = [f for f in inspect(root, robot)[0] if f.check == "tasks"]
    assert tasks and {f.level for f in tasks} == {"warning"}  # nothing reads the empty text


def test_repeated_pictures_are_not_read_as_rest(tmp_path, robot, make_episode):
    """Labelled video of 5 Hz in rows of 20 Hz: at 10 Hz every second frame would show the one before."""
    fresh = (np.arange(13) % 4 == 0).astype(np.float32)[:, None]
    write_dataset(tmp_path, [make_episode(0, rows=13, extra={"frame_fresh": fresh}, meta={"video_hz": "5"})], robot)
    data = Dataset(tmp_path, robot)
    for rate, frames in (("5", 4), ("5/2", 2)):
        assert len(recorded_clip(data, 0, Clock(robot_hz="20", video_hz=rate, frames=2))[0].video) == frames
    words = "episode 0 of .* has new pictures at 5 Hz and repeats them between .*; at 10 Hz"
    with pytest.raises(ValueError, match=words):
        recorded_clip(data, 0, Clock(robot_hz="20", video_hz="10", frames=2))
