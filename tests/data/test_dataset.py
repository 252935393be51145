"""Writer and reader against each other, and the files against the format as written down."""

import errno
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dreamgen.core.embodiment import Embodiment
from dreamgen.core.manifest import tree_digest
from dreamgen.data.lerobot import Dataset
from dreamgen.data.writer import write_dataset
from dreamgen.video.mp4 import read_mp4
from dreamgen.video.remux import Joined

N = 5


def test_a_dataset_is_finished_when_its_files_are_on_the_disk(tmp_path, robot, make_episodes, monkeypatch):
    seen, fsync = set(), os.fsync

    def synced(handle: int) -> None:
        if not (tmp_path / "d/meta/info.json").exists():
            seen.add(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    write_dataset(tmp_path / "d", make_episodes(2), robot)
    files = {str(path) for path in (tmp_path / "d").rglob("*") if path.name != "info.json"}
    assert len(files) > 12 and files <= seen


def test_what_is_written_comes_back(tmp_path, robot, make_episodes):
    result = write_dataset(tmp_path / "d", make_episodes(N), robot)
    assert result == {"episodes": N, "frames": sum(7 + 2 * i for i in range(N)), "skipped": {}}
    dataset = Dataset(tmp_path / "d", robot)
    assert len(dataset) == N and not dataset.mended and not dataset.skipped and dataset.rate == 20
    for i, given in enumerate(make_episodes(N)):
        back = dataset.episode(i)
        assert dataset.length(i) == 7 + 2 * i and dataset.instruction(i) == given.instruction == back.instruction
        assert np.array_equal(back.state, given.state) and np.array_equal(back.action, given.action)
        assert back.state.dtype == back.action.dtype == np.float32
        assert back.meta == given.meta and not back.video
        assert back.extra.keys() == given.extra.keys()
        for name, values in given.extra.items():
            assert np.array_equal(back.extra[name], values) and back.extra[name].dtype == values.dtype
        views = dataset.views(i)
        for name, frames in given.video.items():
            assert views[name].shape == frames.shape
            assert np.abs(views[name].astype(int) - frames).max() <= 3
        rows = [4, 0, 6]
        canvas = dataset.canvas(i, rows)
        assert np.array_equal(canvas, np.concatenate([views["front"][rows], views["side"][rows]], axis=2))
    assert dataset.actions().shape == (result["frames"], 4) and dataset.states().shape == (result["frames"], 5)


def test_reading_without_memory_is_the_same(tmp_path, robot, make_episodes):
    write_dataset(tmp_path / "d", make_episodes(3), robot)
    kept, lazy = Dataset(tmp_path / "d", robot), Dataset(tmp_path / "d", robot, cache_mb=0)
    for i, rows in ((2, [9, 1, 1]), (0, [6]), (2, [0])):
        assert np.array_equal(kept.canvas(i, rows), lazy.canvas(i, rows))
    with pytest.raises(ValueError, match="episode 0 .* has 7 rows"):
        lazy.canvas(0, [7])


def test_files_beyond_those_that_stay_open_read_the_same(tmp_path, robot, make_episodes, monkeypatch):
    import pickle

    from dreamgen.data import decoders

    write_dataset(tmp_path / "d", make_episodes(N), robot, video_mb=1e-6)
    windows = [(i, rows) for _ in range(2) for i in range(N) for rows in ([6, 0, 3], [2], [1, 1, 5, 6], [])]
    expected = [Dataset(tmp_path / "d", robot, cache_mb=0).views(i, rows) for i, rows in windows]
    monkeypatch.setattr(decoders, "OPEN_FILES", 3)
    dataset = Dataset(tmp_path / "d", robot, cache_mb=0)
    for data in (dataset, pickle.loads(pickle.dumps(dataset))):
        for (i, rows), views in zip(windows, expected, strict=True):
            found = data.views(i, rows)
            assert all(np.array_equal(found[name], frames) for name, frames in views.items())
        assert len(data._videos._open) == 3 and len(data._videos._even) == 2 * N
    monkeypatch.setattr(decoders, "is_even", lambda path: False)
    uneven = Dataset(tmp_path / "d", robot, cache_mb=0)
    assert all(np.array_equal(uneven.views(i, rows)["side"], views["side"])
               for (i, rows), views in zip(windows, expected, strict=True))  # fmt: skip
    assert len(uneven._videos._open) == 3


def test_bytes_do_not_depend_on_workers(tmp_path, robot, make_episodes):
    for workers in (1, 2):
        write_dataset(tmp_path / str(workers), make_episodes(N), robot, workers=workers)
    assert tree_digest(tmp_path / "1") == tree_digest(tmp_path / "2")


def test_files_split_by_size(tmp_path, robot, make_episodes):
    write_dataset(tmp_path / "d", make_episodes(N), robot, data_mb=0.003, video_mb=0.004, chunks_size=2)
    assert len(list((tmp_path / "d/data").rglob("*.parquet"))) > 2
    assert (tmp_path / "d/videos/observation.images.side/chunk-001").is_dir()
    dataset = Dataset(tmp_path / "d", robot)
    for i, given in enumerate(make_episodes(N)):
        assert np.array_equal(dataset.episode(i).action, given.action)
        assert np.abs(dataset.views(i)["side"].astype(int) - given.video["side"]).max() <= 3


def test_the_episode_table_is_written_in_parts(tmp_path, robot, make_episodes, monkeypatch):
    write_dataset(tmp_path / "whole", make_episodes(N), robot)
    monkeypatch.setattr("dreamgen.data.files_v3.HELD", 2)
    write_dataset(tmp_path / "parts", make_episodes(N), robot)
    whole, parts = (tmp_path / name / "meta/episodes/chunk-000/file-000.parquet" for name in ("whole", "parts"))
    assert pq.read_table(parts).equals(pq.read_table(whole)) and pq.ParquetFile(parts).num_row_groups == 3
    parts.write_bytes(whole.read_bytes())
    assert tree_digest(tmp_path / "parts") == tree_digest(tmp_path / "whole")


def test_layout_is_that_of_lerobot_v3(tmp_path, robot, make_episodes):
    write_dataset(tmp_path, make_episodes(3), robot)
    info = json.loads((tmp_path / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0" and info["fps"] == 20 and isinstance(info["fps"], int)
    assert info["splits"] == {"train": "0:3"} and info["total_frames"] == 7 + 9 + 11 and info["total_tasks"] == 3
    feature = info["features"]["observation.images.front"]
    assert feature["dtype"] == "video" and feature["shape"] == [40, 56, 3]
    assert feature["info"]["video.codec"] == "h264" and feature["info"]["video.fps"] == 20
    assert info["features"]["action"]["names"] == ["move_0", "move_1", "move_2", "close"]
    assert info["features"]["label_spread"] == {"dtype": "float32", "shape": [4], "names": None}

    data = tmp_path / info["data_path"].format(chunk_index=0, file_index=0)
    file = pq.ParquetFile(data)
    assert file.num_row_groups == 3 and file.metadata.row_group(0).column(0).compression == "SNAPPY"
    schema = file.schema_arrow
    assert schema.names[:5] == ["timestamp", "frame_index", "episode_index", "index", "task_index"]
    assert schema.field("timestamp").type == pa.float32() and schema.field("flag").type == pa.bool_()
    assert schema.field("action").type == pa.list_(pa.float32(), 4)
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features["index"] == {"dtype": "int64", "_type": "Value"} and features["action"]["length"] == 4
    table = file.read()
    assert table["index"].to_pylist() == list(range(27))
    assert table["episode_index"].to_pylist() == [0] * 7 + [1] * 9 + [2] * 11
    seconds = np.concatenate([np.arange(n) / 20 for n in (7, 9, 11)])
    assert np.allclose(table["timestamp"].to_numpy(), seconds, atol=1e-6)

    tasks = pq.read_table(tmp_path / "meta/tasks.parquet")
    assert tasks["task"].to_pylist() == [f"push the block {i}" for i in range(3)]
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]
    rows = pq.read_table(tmp_path / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [(r["dataset_from_index"], r["dataset_to_index"]) for r in rows] == [(0, 7), (7, 16), (16, 27)]
    assert rows[2]["tasks"] == ["push the block 2"] and rows[2]["length"] == 11
    for row, level in zip(rows, (0, 30, 60), strict=True):
        first = round(row["videos/observation.images.front/from_timestamp"] * 20)
        assert round(row["videos/observation.images.front/to_timestamp"] * 20) - first == row["length"]
        path = tmp_path / info["video_path"].format(
            video_key="observation.images.front", chunk_index=0, file_index=row["data/file_index"]
        )
        assert abs(read_mp4(path, [first]).mean() - level) < 3


def test_statistics_are_those_of_the_data(tmp_path, robot, make_episodes):
    write_dataset(tmp_path, make_episodes(N), robot)
    stats = json.loads((tmp_path / "meta/stats.json").read_text())
    given = list(make_episodes(N))
    columns = {
        "action": np.concatenate([e.action for e in given]),
        "observation.state": np.concatenate([e.state for e in given]),
        "label_spread": np.concatenate([e.extra["label_spread"] for e in given]),
        "frame_index": np.concatenate([np.arange(len(e.action)) for e in given])[:, None],
    }
    for name, values in columns.items():
        total = len(values)
        assert stats[name]["count"] == [total]
        assert np.allclose(stats[name]["mean"], values.sum(0) / total, atol=1e-6)
        variance = (values.astype(float) ** 2).mean(0) - values.astype(float).mean(0) ** 2
        assert np.allclose(stats[name]["std"], np.sqrt(variance), atol=1e-5)
        assert np.allclose(stats[name]["min"], np.sort(values, axis=0)[0])
        for q, level in {"q01": 1, "q50": 50, "q90": 90}.items():
            assert np.allclose(stats[name][q], np.percentile(values, level, axis=0), atol=1e-6)
    pixels = np.concatenate([e.video["side"].reshape(-1, 3) for e in given]) / 255
    found = stats["observation.images.side"]
    assert np.shape(found["mean"]) == (3, 1, 1) and found["count"] == [len(columns["action"])]
    assert np.allclose(np.ravel(found["mean"]), pixels.mean(0)) and np.allclose(np.ravel(found["std"]), pixels.std(0))
    for name, level in {"min": 0, "q01": 1, "q10": 10, "q50": 50, "q99": 99, "max": 100}.items():
        assert np.allclose(np.ravel(found[name]), np.percentile(pixels, level, axis=0))
    row = pq.read_table(tmp_path / "meta/episodes/chunk-000/file-000.parquet").to_pylist()[3]
    assert np.allclose(row["stats/action/q99"], np.percentile(given[3].action, 99, axis=0), atol=1e-6)
    assert np.allclose(np.ravel(row["stats/observation.images.front/max"]), given[3].video["front"].max() / 255)


def test_interrupted_write_is_unfinished_and_is_written_anew(tmp_path, robot, make_episode, make_episodes):
    def interrupted():
        yield make_episode(0)
        yield make_episode(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "d", interrupted(), robot)
    with pytest.raises(ValueError, match="no finished LeRobot dataset"):
        Dataset(tmp_path / "d", robot)
    write_dataset(tmp_path / "d", make_episodes(2), robot)
    write_dataset(tmp_path / "e", make_episodes(2), robot)
    assert tree_digest(tmp_path / "d") == tree_digest(tmp_path / "e")
    with pytest.raises(ValueError, match="already holds a dataset"):
        write_dataset(tmp_path / "d", make_episodes(2), robot)


def test_full_disk(tmp_path, robot, make_episodes, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Joined, "add", full)
    with pytest.raises(OSError, match="disk is full.*run it again.*there") as caught:
        write_dataset(tmp_path / "there", make_episodes(2), robot)
    assert caught.value.errno == errno.ENOSPC and not (tmp_path / "there/meta/info.json").exists()


BAD = {
    "NaN|nan": lambda e: {"action": np.where(np.arange(len(e.action))[:, None] == 3, np.nan, e.action)},
    r"\(11, 3\).*expected \(11, 4\)": lambda e: {"action": e.action[:, :3]},
    r"\(10, 5\).*expected \(11, 5\)": lambda e: {"state": e.state[:10]},
    "11 rows and 8 frames of view 'side'": lambda e: {"video": e.video | {"side": e.video["side"][:8]}},
    "view 'side' is missing": lambda e: {"video": {"front": e.video["front"]}},
    "expected uint8": lambda e: {"video": {k: v[:, :20] for k, v in e.video.items()}},
    "instruction is '  '": lambda e: {"instruction": "  "},
    "instruction is 5": lambda e: {"instruction": 5},
    "zero length": lambda e: {"action": e.action[:0], "state": e.state[:0]},
    "extra columns": lambda e: {"extra": {}},
    "name of a standard": lambda e: {"extra": {"index": e.extra["flag"]}},
}


@pytest.mark.parametrize("words", BAD)
@pytest.mark.usefixtures("untyped")
def test_bad_episode(tmp_path, robot, make_episode, words):
    bad = make_episode(2)
    bad = make_episode(2, **BAD[words](bad))
    episodes = [make_episode(0), make_episode(1), bad, make_episode(3)]
    with pytest.raises(ValueError, match=f"(?s)episode 2 .*({words}).*skip_bad=true"):
        write_dataset(tmp_path / "d", iter(episodes), robot, workers=2)
    assert not (tmp_path / "d/meta/info.json").exists()
    result = write_dataset(tmp_path / "d", iter(episodes), robot, skip_bad=True)
    assert result["episodes"] == 3 and list(result["skipped"]) == [2]
    assert [e.meta["seed"] for e in map(Dataset(tmp_path / "d", robot).episode, range(3))] == [0, 1, 3]


def test_nothing_to_write(tmp_path, robot, make_episode):
    with pytest.raises(ValueError, match="no episode to write"):
        write_dataset(tmp_path / "d", [], robot)
    with pytest.raises(ValueError, match="no episode to write.*zero length"):
        write_dataset(tmp_path / "d", [make_episode(0, rows=0)], robot, skip_bad=True)
    assert not (tmp_path / "d/meta/info.json").exists()


def test_dataset_of_another_robot(tmp_path, robot, make_episodes):
    write_dataset(tmp_path, make_episodes(2), robot)
    values = {k: getattr(robot, k) for k in ("name", "views", "state", "action")}
    with pytest.raises(ValueError, match="robot_hz"):
        Dataset(tmp_path, Embodiment(**values, robot_hz=10))
    (tmp_path / "meta/dreamgen.json").unlink()
    with pytest.raises(ValueError, match="20 Hz.*robot_hz 10"):
        Dataset(tmp_path, Embodiment(**values, robot_hz=10))
    with pytest.raises(ValueError, match=r"'action' of .* is \[4\].*expects \[3\]"):
        Dataset(tmp_path, Embodiment(**values | {"action": robot.action[:1]}, robot_hz=20))
    with pytest.raises(ValueError, match="no feature 'actions'.*action"):
        Dataset(tmp_path, Embodiment(**values, robot_hz=20, action_key="actions"))
    assert len(Dataset(tmp_path, Embodiment(**values | {"views": robot.views[1:]}, robot_hz=20))) == 2


def test_rates_that_are_no_whole_number(tmp_path, robot, make_episodes):
    values = {k: getattr(robot, k) for k in ("name", "views", "state", "action")}
    odd = Embodiment(**values, robot_hz="50/3")
    write_dataset(tmp_path, make_episodes(4), odd)
    dataset = Dataset(tmp_path, odd)
    assert not dataset.mended and dataset.rate == odd.rate
    assert abs(dataset.views(3, [5])["front"].mean() - (90 + 15)) < 3


def test_av1(tmp_path, robot, make_episodes):
    write_dataset(tmp_path, make_episodes(2), robot, codec="av1")
    dataset = Dataset(tmp_path, robot)
    assert dataset.info["features"]["observation.images.front"]["info"]["video.codec"] == "av1"
    assert abs(dataset.views(1, [6])["front"].mean() - (30 + 18)) < 4
