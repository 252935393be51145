"""Recorded datasets depend on the seed alone: not on the number of processes, nor on a kill on the way."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest

from dreamgen.core.manifest import Stage, is_complete, read_json
from dreamgen.data.lerobot import Dataset
from dreamgen.sims.rollout import replay
from dreamgen.stages import collect as room
from dreamgen.stages.collect import collect
from dreamgen.stages.export import export

sys.path.insert(0, str(Path(__file__).parents[1] / "sims"))
from point import ROBOT, Deadly, Point, Walker  # noqa: E402

ROWS = 9


def files(root: Path) -> dict[str, str]:
    """Name and hash of every file of a dataset but the run's own notes."""
    found = [p for p in sorted(root.rglob("*")) if p.is_file() and p.suffix != ".log" and p.name != "manifest.json"]
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def test_same_files_for_any_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "PART", 4)
    options = {"episodes": 11, "rows": ROWS, "seed": 3, "record": {}}
    first = collect(Point, out=tmp_path / "one", workers=1, **options)
    collect(Point, out=tmp_path / "two", workers=2, **options)
    assert files(tmp_path / "one") == files(tmp_path / "two") and not (tmp_path / "one" / "parts").exists()

    dataset = Dataset(tmp_path / "one", ROBOT)
    assert len(dataset) == 11 and {dataset.length(i) for i in range(11)} == {ROWS}
    assert [dataset.instruction(i) for i in range(11)] == ["home"] * 6 + ["away"] * 5
    assert first["results"]["failed_seeds"] > 0  # the expert fails on a fifth of all seeds
    for i in range(0, 11, 3):
        episode = dataset.episode(i)
        assert episode.meta["success"] and episode.meta["source"] == "expert" and episode.meta["sim"] == "point"
        assert replay(Point(), episode.meta["instruction"], episode.meta["seed"], episode.action)
        assert np.allclose(episode.state[1:] - episode.state[:-1], episode.action[:-1])


def test_a_killed_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "PART", 3)
    options = {"episodes": 7, "rows": ROWS, "seed": 4, "source": "play", "record": {}}
    collect(Point, out=tmp_path / "whole", **options)
    record, calls = room._record, []

    def dies(*args: object, **kwargs: object) -> object:
        calls.append(args[1])
        if len(calls) == 5:
            raise KeyboardInterrupt
        return record(*args, **kwargs)

    monkeypatch.setattr(room, "_record", dies)
    with pytest.raises(KeyboardInterrupt):
        collect(Point, out=tmp_path / "killed", **options)
    assert not is_complete(tmp_path / "killed")
    collect(Point, out=tmp_path / "killed", **options)
    assert calls[5:] == list(range(3, 7)), "the first part was recorded again"
    assert files(tmp_path / "whole") == files(tmp_path / "killed")
    assert collect(Point, out=tmp_path / "killed", **options) == read_json(tmp_path / "killed" / "manifest.json")


def test_killed_between_dataset_and_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    def copy(out: Path) -> dict:
        return export(Dataset(tmp_path / "collected" / "whole", ROBOT), out=out, format="v2.1", record={})

    def record(out: Path) -> dict:
        return collect(Point, out=out, episodes=4, rows=ROWS, seed=4, record={})

    for name, make in (("collected", record), ("copied", copy)):
        whole = make(tmp_path / name / "whole")
        out = tmp_path / name / "killed"
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Stage, "finish", dies)
            make(out)
        assert (out / "meta" / "info.json").is_file() and not is_complete(out)
        assert make(out)["results"] == whole["results"]
        assert files(out) == files(tmp_path / name / "whole"), "what the kill left is not cleared"


def test_nothing_of_others_is_erased(tmp_path: Path) -> None:
    collect(Point, out=tmp_path / "made", episodes=1, rows=ROWS, record={})
    made = Dataset(tmp_path / "made", ROBOT)
    (tmp_path / "mine" / "data").mkdir(parents=True)
    (tmp_path / "mine" / "data" / "recording.bag").write_text("a week of work")
    (tmp_path / "theirs" / "meta").mkdir(parents=True)
    (tmp_path / "theirs" / "meta" / "info.json").write_text("{}")
    for name, words in (("mine", "holds data, which no unfinished run wrote"), ("theirs", "already holds a dataset")):
        before = files(tmp_path / name)
        with pytest.raises(ValueError, match=words):
            export(made, out=tmp_path / name, record={})
        with pytest.raises(ValueError, match=words):
            collect(Point, out=tmp_path / name, episodes=1, rows=ROWS, record={})
        assert files(tmp_path / name) == before


def test_a_worker_that_is_killed_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "PART", 1)
    with pytest.raises(ValueError, match="a worker process was killed, perhaps for memory.*fewer `workers`"):
        collect(Deadly, out=tmp_path / "x", episodes=2, rows=ROWS, workers=2, record={})


def test_policy_and_play_keep_failures(tmp_path: Path) -> None:
    options = {"episodes": 6, "rows": ROWS, "seed": 5, "record": {}}
    collect(Point, out=tmp_path / "policy", source="policy", policy=Walker(), execute=2, **options)
    dataset = Dataset(tmp_path / "policy", ROBOT)
    assert {dataset.instruction(i): dataset.episode(i).meta["success"] for i in range(6)} == {
        "home": True,
        "away": False,
    }
    assert dataset.episode(5).meta["source"] == "policy" and dataset.length(5) == ROWS


def test_bad_requests(tmp_path: Path) -> None:
    options = {"out": tmp_path / "x", "rows": ROWS, "record": {}}
    with pytest.raises(ValueError, match="does not know"):
        collect(Point, episodes=2, instructions=["fly"], **options)
    with pytest.raises(ValueError, match="expected one of"):
        collect(Point, episodes=2, source="policy", **options)
    with pytest.raises(ValueError, match="failed at 'away' on 20 seeds"):
        collect(Point, out=tmp_path / "y", episodes=1, instructions=["away"], rows=2, record={})
    collect(Point, episodes=2, **options)
    with pytest.raises(ValueError, match="another configuration"):
        collect(Point, out=tmp_path / "x", episodes=2, rows=ROWS, record={"episodes": 3})
