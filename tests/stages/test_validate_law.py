"""What the reader refuses, the validator calls an error; and it never stumbles over what it is to judge."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dreamgen.data.inspection import inspect
from dreamgen.data.lerobot import Dataset
from tests.stages.test_validate import EYE, FAULTS, change_table, edit, good, robot, truncate

__all__ = ["good"]
META, TABLE, VIDEO = "meta", "data/chunk-000/episode_000001.parquet", f"videos/chunk-000/{EYE}/episode_000001.mp4"


def without(name: str):
    return lambda r: change_table(r / TABLE, lambda c: c.pop(name))


def no_line(path: Path, number: int) -> None:
    lines = path.read_text().splitlines()
    path.write_text("".join(f"{line}\n" for k, line in enumerate(lines) if k != number))


def set_nan(columns: dict) -> None:
    columns["action"][4][1] = float("nan")


# of v2.1, by episode 1; whether the reader refuses it
CORRUPTIONS = {
    "nothing": (lambda r: None, False),
    "no action column": (without("action"), True),
    "no state column": (without("observation.state"), True),
    "no frame_index": (without("frame_index"), False),
    "no task_index": (without("task_index"), False),
    "NaN": (lambda r: change_table(r / TABLE, set_nan), True),
    "no rows": (lambda r: pq.write_table(pq.read_table(r / TABLE)[:0], r / TABLE), True),
    "a row too few": (lambda r: pq.write_table(pq.read_table(r / TABLE)[1:], r / TABLE), True),
    "no table": (lambda r: (r / TABLE).unlink(), True),
    "no parquet": (lambda r: (r / TABLE).write_text("no"), True),
    "ragged action": (lambda r: ragged(r / TABLE), True),
    "timestamps in lists": (lambda r: listed(r / TABLE), True),
    "no video": (lambda r: (r / VIDEO).unlink(), True),
    "no video at all": (lambda r: shutil.rmtree(r / "videos"), True),
    "half a video": (lambda r: truncate(r / VIDEO), True),
    "another video": (lambda r: shutil.copy(r / VIDEO.replace("1.mp4", "0.mp4"), r / VIDEO), True),
    "no text": (lambda r: (r / META / "tasks.jsonl").write_text('{"task_index": 0, "task": " "}\n'), True),
    "no tasks": (lambda r: ((r / META / "tasks.jsonl").write_text(""), no_tasks(r)), True),
    "no list of tasks": (lambda r: (r / META / "tasks.jsonl").unlink(), True),
    "no episodes": (lambda r: (r / META / "episodes.jsonl").write_text(""), True),
    "a line that is no JSON": (lambda r: (r / META / "episodes.jsonl").write_text("{\n"), True),
    "provenance that is no JSON": (lambda r: (r / META / "provenance.jsonl").write_text("{\n"), True),
    "provenance of no episode": (lambda r: (r / META / "provenance.jsonl").write_text("{}\n"), True),
    "modality that is no JSON": (lambda r: (r / META / "modality.json").write_text("{"), True),
    "another rate": (lambda r: edit(r / META / "info.json", lambda i: i.update(fps=30)), True),
    "another width": (
        lambda r: edit(r / META / "info.json", lambda i: i["features"]["action"].update(shape=[4])),
        True,
    ),
    "no camera": (lambda r: edit(r / META / "info.json", lambda i: i["features"].pop(EYE)), True),
    "another version": (lambda r: edit(r / META / "info.json", lambda i: i.update(codebase_version="v1.6")), True),
    "statistics that are no JSON": (lambda r: (r / META / "episodes_stats.jsonl").write_text("{\n"), False),
    "statistics of all but one": (lambda r: no_line(r / META / "episodes_stats.jsonl", 1), False),
}


def ragged(path: Path) -> None:
    table = pq.read_table(path)
    rows = [row[: 2 + k % 2] for k, row in enumerate(table["action"].to_pylist())]
    pq.write_table(table.set_column(table.column_names.index("action"), "action", pa.array(rows)), path)


def listed(path: Path) -> None:
    table = pq.read_table(path)
    rows = pa.array([[value] for value in table["timestamp"].to_pylist()])
    pq.write_table(table.set_column(table.column_names.index("timestamp"), "timestamp", rows), path)


def no_tasks(root: Path) -> None:
    path = root / META / "episodes.jsonl"
    path.write_text(path.read_text().replace('["swing"]', "[]"))


def refused(root: Path) -> bool:
    try:
        Dataset(root, robot())
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_v21(good: Path, tmp_path: Path, name: str) -> None:
    corrupt, expected = CORRUPTIONS[name]
    shutil.copytree(good / "v2", tmp_path / "d")
    corrupt(tmp_path / "d")
    assert refused(tmp_path / "d") == expected
    found, _ = inspect(tmp_path / "d", robot(), pictures=False)
    assert not expected or any(f.level == "error" for f in found)


@pytest.mark.parametrize("fault", FAULTS, ids=[words[:24] for _, _, words in FAULTS])
def test_v3(good: Path, tmp_path: Path, fault: tuple[str, str, str]) -> None:
    shutil.copytree(good / "v3", tmp_path / "d")
    FAULTS[fault](tmp_path / "d")
    found, _ = inspect(tmp_path / "d", robot(), pictures=False)
    assert not refused(tmp_path / "d") or any(f.level == "error" for f in found)


def test_an_episode_without_actions_is_not_paired_with_the_next(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good / "v2", tmp_path / "d")
    without("action")(tmp_path / "d")
    found, counts = inspect(tmp_path / "d", robot(), pictures=False)
    assert [f.what for f in found] == ["feature 'action' has no column"] and found[0].episodes == [1]
    assert counts == {"episodes": 3, "frames": 36}


def test_statistics_of_an_episode_that_are_missing(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good / "v2", tmp_path / "d")
    path = tmp_path / "d/meta/episodes_stats.jsonl"
    path.write_text(path.read_text().splitlines()[0].replace('"action"', '"acted"') + "\n")
    found, _ = inspect(tmp_path / "d", robot(), pictures=False)
    assert {(f.level, f.what, *f.episodes) for f in found} == {
        ("warning", "its own statistics has none of 'action'", 0),
        ("warning", "it has no statistics of its own", 1, 2),
    }


def test_nan_raises_no_alarm_in_later_episodes(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good / "v2", tmp_path / "d")
    change_table(tmp_path / "d" / TABLE, set_nan)
    found, counts = inspect(tmp_path / "d", robot(), pictures=False)
    assert [f.what for f in found] == ["'action' holds nan at row 4, entry 1"] and counts["frames"] == 36
