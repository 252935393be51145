"""What the validator makes of data that is not used: episodes that are left out, columns, cameras."""

import json
import shutil
import threading
import weakref
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dreamgen.core.clip import Episode
from dreamgen.core.embodiment import View
from dreamgen.data import statistics
from dreamgen.data.inspection import excused, inspect
from dreamgen.data.lerobot import Dataset
from dreamgen.data.unit_checks import Units, _Sums
from dreamgen.data.writer import write_dataset
from dreamgen.stages.validate import validate
from dreamgen.video.mp4 import open_mp4
from jobs.recipe import load
from tests.data.video_only import strip
from tests.stages.test_validate import DATA, EYE, STATS, change_table, edit, episodes, good, robot, set_nan, truncate

__all__ = ["good"]
SIDE = "observation.images.side"


@pytest.fixture
def data(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good / "v3", tmp_path / "d"))


def add_column(root: Path, name: str, values: pa.Array, dtype: str, shape: list[int]) -> None:
    table = pq.read_table(root / DATA)
    pq.write_table(table.append_column(name, values), root / DATA)
    feature = {"dtype": dtype, "shape": shape, "names": None}
    edit(root / "meta/info.json", lambda info: info["features"].update({name: feature}))


def test_bad_episodes_that_are_left_out_are_warnings(data: Path, tmp_path: Path) -> None:
    change_table(data / DATA, set_nan)  # in episode 1
    edit(data / STATS, lambda s: s["action"]["mean"].__setitem__(1, float("nan")))  # as whoever wrote it computed it
    arguments = {"robot": robot(), "out": tmp_path / "v", "record": {}}
    results = validate(str(data), **arguments)["results"]
    assert results["errors"] == 1 and results["skipped"] == [] and not (tmp_path / "v/manifest.json").exists()
    results = validate(str(data), skip_bad=True, **arguments)["results"]
    reason = "'action' holds nan at row 1, entry 1 (part 'arm')"
    assert results["skipped"] == [{"dataset": "d", "episode": 1, "reason": reason}]
    assert (results["errors"], results["warnings"], results["episodes"]) == (0, 1, 3)
    assert "3 episodes, 36 rows, 1 left out" in results["table"] and "count is" not in results["table"]
    told = json.loads((tmp_path / "v/manifest.json").read_text())["results"]
    assert told["skipped"] == results["skipped"] and Dataset(data, robot(), skip_bad=True).skipped == {1: reason}


def test_what_the_reader_does_not_leave_out_stays_an_error(data: Path) -> None:
    change_table(data / DATA, set_nan)
    edit(data / STATS, lambda s: s["observation.state"]["mean"].__setitem__(1, 9.0))  # this is of no episode
    found, reader = excused(inspect(data, robot(), pictures=False)[0], data, robot())
    assert [(f.level, f.check, f.episodes) for f in found[:2]] == [
        ("error", "statistics", []),
        ("warning", "numbers", [1]),
    ]
    assert reader is not None and list(reader.skipped) == [1]
    change_table(data / DATA, lambda c: c.update(action=[[float("nan")] * 3] * 36))
    bad = inspect(data, robot(), pictures=False)[0]
    assert excused(bad, data, robot()) == (bad, None)  # nothing would be left


def test_episodes_that_are_asked_for(data: Path) -> None:
    change_table(data / DATA, set_nan)
    found, counts = inspect(data, robot(), episodes=[0, 2])
    assert [f.level for f in found] == ["note"] and "was not compared with the data" in found[0].what
    assert counts == {"episodes": 2, "frames": 11 + 13}
    with pytest.raises(ValueError, match="has no episode 3, 7; it lists 3 episodes"):
        inspect(data, robot(), episodes=[0, 3, 7])


@pytest.mark.parametrize("nested", [False, True])
def test_features_of_several_dimensions(data: Path, nested: bool) -> None:
    values = np.random.default_rng(0).normal(size=(36, 2, 7)).astype(np.float32)
    rows = values if nested else values.reshape(36, 14)
    kind = pa.list_(pa.list_(pa.float32())) if nested else pa.list_(pa.float32())
    add_column(data, "observation.touch", pa.array(rows.tolist(), kind), "float32", [2, 7] if nested else [14])
    true = statistics.of_numbers(values.reshape(36, 14))
    own = {key: np.reshape(value, (2, 7)).tolist() for key, value in true.items() if key != "count"}
    edit(data / STATS, lambda s: s.update({"observation.touch": own}))
    assert not [f for f in inspect(data, robot(), pictures=False)[0] if "its own statistics" not in f.what]
    edit(data / STATS, lambda s: s["observation.touch"]["mean"][1].__setitem__(2, 3.0))
    assert any("entry 9" in f.what for f in inspect(data, robot(), pictures=False)[0])
    ragged = pa.array([[[1.0], [2.0] * (1 + k % 2)] for k in range(36)])
    add_column(data, "observation.points", ragged, "float32", [2, 1])
    assert any("'observation.points' has rows of diff" in f.what for f in inspect(data, robot(), pictures=False)[0])


def test_columns_that_no_step_reads(data: Path) -> None:
    force = pa.array([float("nan") if k == 20 else 0.0 for k in range(36)], pa.float32())
    add_column(data, "observation.force", force, "float32", [1])
    edit(data / "meta/info.json", lambda i: i["features"].update(temperature={"dtype": "float32", "shape": [1]}))
    found, _ = inspect(data, robot(), pictures=False)
    told = [(f.level, f.episodes) for f in found if f.check in ("numbers", "schema")]
    assert told == [("warning", [0, 1, 2]), ("warning", [1])] and len(Dataset(data, robot())) == 3
    assert not any("'action'" in f.what for f in found)  # all else of the episode is looked at
    add_column(data, "label_spread", force, "float32", [1])  # policies weigh by it
    assert [f.what for f in inspect(data, robot(), pictures=False)[0] if f.level == "error"] == [
        "'label_spread' holds nan at row 9, entry 0"
    ]


def test_video_whose_actions_are_not_looked_at(data: Path, tmp_path: Path) -> None:
    bare = strip(data, tmp_path / "bare")
    (bare / "meta/dreamgen.json").unlink()
    found, counts = inspect(bare, robot(), actions=False)
    assert [f.check for f in found if f.level == "error"] == [] and counts["episodes"] == 3
    assert any("has no feature 'action'" in f.what for f in inspect(bare, robot(), pictures=False)[0])
    change_table(data / DATA, set_nan)
    found = {(f.level, f.check, *f.episodes) for f in inspect(data, robot(), pictures=False, actions=False)[0]}
    assert ("warning", "numbers", 1) in found and not [level for level, *_ in found if level == "error"]
    asked = load("validate", ["data=video", f"data.root={data}", "data.revision=null"])[0].stage
    assert asked.actions is False and load("validate", ["data=folder", f"data.root={data}"])[0].stage.actions
    arguments = {"robot": robot(), "out": tmp_path / "v", "record": {}, "actions": asked.actions}
    assert validate(asked.root, skip_bad=True, **arguments)["results"]["skipped"] == []


def test_cameras_by_which_the_robot_does_not_see(tmp_path: Path) -> None:
    views = (View(name="eye", key=EYE, height=16, width=24), View(name="side", key=SIDE, height=16, width=24))
    made = [Episode(**vars(e) | {"video": {"eye": e.video["eye"], "side": e.video["eye"]}}) for e in episodes()]
    write_dataset(tmp_path / "d", made, robot(views=views))
    (tmp_path / "d/meta/dreamgen.json").unlink()
    truncate(tmp_path / f"d/videos/{SIDE}/chunk-000/file-000.mp4")
    for seen, level in ((robot(), "warning"), (robot(views=views), "error")):
        found, _ = inspect(tmp_path / "d", seen, pictures=False)
        assert [(f.level, f.episodes) for f in found if f.check == "video"] == [(level, [0, 1, 2])]
    assert len(Dataset(tmp_path / "d", robot())) == 3


def test_numbers_of_one_episode_are_in_memory_at_a_time(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, add = [], Units.add

    def watched(self: Units, state: np.ndarray, action: np.ndarray) -> None:
        held.append(weakref.ref(action))
        add(self, state, action)
        assert sum(ref() is not None for ref in held) <= 2  # of this episode, and of the one before it

    monkeypatch.setattr(Units, "add", watched)
    found, _ = inspect(good / "v3", robot(), pictures=False)
    assert found == [] and len(held) == 3 and all(ref() is None for ref in held)


def test_threads_find_the_same_in_the_same_order(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, threads = Path(shutil.copytree(good / "v2", tmp_path / "d")), set()
    for i, byte in ((0, b"\xff"), (2, b"\x00")):
        path = root / f"videos/chunk-000/{EYE}/episode_{i:06d}.mp4"
        held = path.read_bytes()
        begin, end = held.index(b"mdat") + 4, held.rindex(b"moov") - 4
        path.write_bytes(held[:begin] + byte * (end - begin) + held[end:])

    def opened(path: Path) -> object:
        threads.add(threading.current_thread().name)
        return open_mp4(path)

    monkeypatch.setattr("dreamgen.data.inspection.open_mp4", opened)
    alone = inspect(root, robot())
    assert [f.episodes for f in alone[0] if "cannot be decoded" in f.what] == [[0], [2]]
    assert inspect(root, robot(), workers=3) == alone and len(threads) > 1
    assert load("validate", ["data=folder", f"data.root={root}", "workers=3"])[0].stage.workers == 3


def test_sums_of_chunks_are_those_of_the_whole() -> None:
    values, sums = np.random.default_rng(0).normal(5, 2, (31, 3)), _Sums(3)
    for chunk in (values[:1], values[1:20], values[20:]):
        sums.add(chunk)
    assert sums.count == 31 and np.allclose(sums.mean, values.mean(0), rtol=1e-12)
    assert np.allclose(sums.covariance(), np.cov(values.T, bias=True), rtol=1e-12)
    assert np.allclose(sums.std(), values.std(0), rtol=1e-12)


@pytest.mark.parametrize("version", ["v2.0", "v2.1"])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_statistics_of_what_does_not_vary(good: Path, tmp_path: Path, version: str, kind: type) -> None:
    """0.7 is another number in float32; whoever wrote the statistics computed them in it, or not."""
    root = Path(shutil.copytree(good / "v2", tmp_path / "d"))
    own, whole = {}, []
    for i, path in enumerate(sorted(root.rglob("*.parquet"))):
        table = pq.read_table(path)
        states = np.array([[*row[:2], 0.7] for row in table["observation.state"].to_pylist()])
        at = table.column_names.index("observation.state")
        pq.write_table(table.set_column(at, "observation.state", pa.array(states.tolist())), path)
        own[i], whole = statistics.of_numbers(states.astype(kind)), [*whole, states.astype(kind)]
    edit(root / "meta/info.json", lambda info: info["features"]["observation.state"].update(dtype="float64"))
    edit(root / "meta/info.json", lambda info: info.update(codebase_version=version))
    path = root / "meta/episodes_stats.jsonl"
    if version == "v2.0":
        path.unlink()
        (root / STATS).write_text(json.dumps({"observation.state": statistics.of_numbers(np.concatenate(whole))}))
    else:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            line["stats"]["observation.state"] = own[line["episode_index"]]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found, _ = inspect(root, robot(), pictures=False)
    assert not [f for f in found if f.check == "statistics" and "has none of" not in f.what], found


def test_statistics_of_columns_that_no_step_reads(data: Path) -> None:
    add_column(data, "observation.force", pa.array(np.arange(36, dtype=np.float32)), "float32", [1])
    for change in ({"max": [3.0], "q99": [3.0]}, {"mean": [99.0]}, {"std": [float("nan")]}, {"min": [0.0, 0.0]}):
        told = {"min": [0.0], "max": [35.0], "mean": [2.0], "std": [1.0]} | change
        edit(data / STATS, lambda s, told=told: s.update({"observation.force": told}))
        found = [f for f in inspect(data, robot(), pictures=False)[0] if "meta/stats.json" in f.what]
        assert [f.level for f in found] == ["warning"] and "'observation.force'" in found[0].what
