"""Datasets with one fault each: the validator finds that one, says where and how to mend it, and nothing else."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jaxtyping
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dreamgen.core.clip import Episode
from dreamgen.core.embodiment import Embodiment, Part, View
from dreamgen.data.export import export_dataset
from dreamgen.data.inspection import inspect
from dreamgen.data.lerobot import Dataset
from dreamgen.data.writer import write_dataset
from dreamgen.stages.export import export
from dreamgen.stages.validate import validate

ROOT = Path(__file__).parents[2]
EYE = "observation.images.eye"
VIDEO = f"videos/{EYE}/chunk-000/file-000.mp4"
DATA = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
STATE = (Part(name="arm", start=0, stop=2, unit="rad"), Part(name="grip", start=2, stop=3))
ACTION = (
    Part(name="arm", start=0, stop=2, unit="rad", moves="arm", limits=(-3, 3)),
    Part(name="close", start=2, stop=3, kind="binary", moves="grip", limits=(-1, 1)),
)


def robot(**change) -> Embodiment:
    values = {"name": "arm", "robot_hz": 10, "views": (View(name="eye", key=EYE, height=16, width=24),),
              "state": STATE, "action": ACTION}  # fmt: skip
    return Embodiment(**values | change)


def episodes(scale: float = 1.0, close: float = 1.0, state: float = 1.0) -> list[Episode]:
    """An arm that swings as it is told, one row late."""
    made = []
    for i in range(3):
        rows, rng = 11 + i, np.random.default_rng(i)
        angle = np.cumsum(rng.normal(0, 0.3, (rows + 1, 2)), 0).clip(-2, 2)
        grip = np.sign(rng.normal(size=(rows, 1)))
        action = np.concatenate([scale * angle[1:], close * grip], 1).astype(np.float32)
        seen = np.concatenate([state * angle[:-1], grip], 1).astype(np.float32)
        video = rng.integers(0, 255, (rows, 16, 24, 3)).astype(np.uint8)
        made.append(Episode(instruction="swing", state=seen, action=action, video={"eye": video}))
    return made


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("good")
    write_dataset(root / "v3", episodes(), robot())
    export_dataset(Dataset(root / "v3", robot()), root / "v2", format="v2.1")
    return root


def edit(path: Path, change: Callable[[dict], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def change_table(path: Path, change: Callable[[dict], None]) -> None:
    table = pq.read_table(path)
    columns = table.to_pydict()
    change(columns)
    fields = {field.name: field for field in table.schema}
    pq.write_table(pa.table(columns, pa.schema([fields[name] for name in columns], table.schema.metadata)), path)


def set_nan(columns: dict) -> None:
    columns["action"][12][1] = float("nan")


def late(columns: dict) -> None:
    columns["timestamp"] = [t + 0.1 for t in columns["timestamp"]]


def as_lists(path: Path, name: str) -> None:
    table = pq.read_table(path)
    at = table.column_names.index(name)
    pq.write_table(table.set_column(at, name, pa.array([[v] for v in table[name].to_pylist()])), path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


STATS = "meta/stats.json"
FAULTS = {
    ("error", "schema", "no finished LeRobot dataset"): lambda r: (r / "meta/info.json").unlink(),
    ("error", "schema", "feature 'observation.state' has no column"): lambda r: change_table(
        r / DATA, lambda c: c.pop("observation.state")
    ),
    ("error", "schema", "file-000.parquet cannot be read"): lambda r: (r / DATA).write_text("no"),
    ("error", "tasks", "task 0 is '  '"): lambda r: pq.write_table(
        pa.table({"task_index": [0], "task": ["  "]}), r / "meta/tasks.parquet"
    ),
    ("error", "tasks", "'task_index' is 7, which no task has"): lambda r: change_table(
        r / DATA, lambda c: c.update(task_index=[7] * 36)
    ),
    ("error", "video", "truncated"): lambda r: truncate(r / VIDEO),
    ("error", "video", f"camera '{EYE}', by which 'arm' sees, has no video"): lambda r: (r / VIDEO).unlink(),
    ("error", "video", "frames of .* are also those of another episode"): lambda r: change_table(
        r / EPISODES, lambda c: c.update({f"videos/{EYE}/{edge}_timestamp": [t - c[f"videos/{EYE}/from_timestamp"][i]
                                          for i, t in enumerate(c[f"videos/{EYE}/{edge}_timestamp"])]
                                          for edge in ("to", "from")})
    ),
    ("error", "counts", "rows of file-000.parquet are those of another episode"): lambda r: change_table(
        r / DATA, lambda c: c.update(episode_index=[5] * 36)
    ),
    ("error", "tasks", "instruction is None"): lambda r: (
        change_table(r / DATA, lambda c: c.pop("task_index")),
        change_table(r / EPISODES, lambda c: c.update(tasks=[[]] * 3)),
    ),
    ("error", "counts", "names no episode"): lambda r: pq.write_table(pq.read_table(r / EPISODES)[:0], r / EPISODES),
    ("error", "schema", "'timestamp' is stored as list"): lambda r: as_lists(r / DATA, "timestamp"),
    ("error", "numbers", "'action' holds nan at row 1, entry 1"): lambda r: change_table(r / DATA, set_nan),
    ("warning", "statistics", "min of entry 1 is -1e.06.*GR00T scales by"): lambda r: edit(
        r / STATS, lambda s: s["action"]["min"].__setitem__(1, -1e6)
    ),
    ("warning", "statistics", "max of entry 0 is 1e.06.*GR00T scales by"): lambda r: edit(
        r / STATS, lambda s: s["action"]["max"].__setitem__(0, 1e6)
    ),
    ("error", "statistics", "'action' holds what are no lists of numbers"): lambda r: edit(
        r / STATS, lambda s: s["action"].update(mean=["a", None, 3])
    ),
    ("error", "statistics", "max of entry 0 is 0.5, that of the data .*beyond what was said"): lambda r: edit(
        r / STATS, lambda s: s["action"].update(max=[0.5, 2.5, 1.0], q90=[0.5] * 3, q99=[0.5, 1.5, 1.0], q50=[0.1] * 3,
                                                q10=[-0.5] * 3, mean=[0.1] * 3, std=[0.2] * 3)
    ),
    ("error", "statistics", "contradicts itself: 'action' entry 1: mean 9 is outside"): lambda r: edit(
        r / STATS, lambda s: s["action"]["mean"].__setitem__(1, 9.0)
    ),
    ("error", "statistics", "contradicts itself: 'action' entry 0: q01 .* is above q10"): lambda r: edit(
        r / STATS, lambda s: s["action"]["q01"].__setitem__(0, s["action"]["max"][0])
    ),
    ("error", "statistics", "'std' of 'action' has 2 entries, the data 3"): lambda r: edit(
        r / STATS, lambda s: s["action"].update(std=[1.0, 1.0])
    ),
    ("error", "statistics", "'mean' of 'action' is nan at entry 1"): lambda r: edit(
        r / STATS, lambda s: s["action"]["mean"].__setitem__(1, float("nan"))
    ),
    ("error", "statistics", f"'std' of '{EYE}' is inf at entry 2"): lambda r: edit(
        r / STATS, lambda s: s[EYE]["std"].__setitem__(2, [[float("inf")]])
    ),
    ("error", "schema", "lacks video_path"): lambda r: edit(r / "meta/info.json", lambda i: i.pop("video_path")),
    ("error", "schema", "lacks the columns data/chunk_index"): lambda r: change_table(
        r / EPISODES, lambda c: c.pop("data/chunk_index")
    ),
    ("warning", "statistics", "std of entry 2"): lambda r: edit(
        r / STATS, lambda s: s["action"]["std"].__setitem__(2, 0.5)
    ),
    ("warning", "statistics", "mean of entry 0 is 0.9"): lambda r: edit(
        r / STATS, lambda s: s[EYE].update(mean=[[[0.9]], [[0.9]], [[0.9]]])
    ),
    ("warning", "time", "timestamps start at 0.1 s"): lambda r: change_table(r / DATA, late),
    ("warning", "counts", "frame_index does not count"): lambda r: change_table(
        r / DATA, lambda c: c.update(frame_index=[0] * 36)
    ),
    ("warning", "counts", "total_frames 99, found 36"): lambda r: edit(
        r / "meta/info.json", lambda i: i.update(total_frames=99)
    ),
    ("warning", "schema", "column 'extra' is no feature"): lambda r: edit(
        r / "meta/info.json", lambda i: i["features"].pop("frame_index")
    ),
    ("warning", "video", "are 16x24, info.json says"): lambda r: edit(
        r / "meta/info.json", lambda i: i["features"][EYE].update(shape=[32, 48, 3])
    ),
}  # fmt: skip


def test_a_good_dataset(good: Path) -> None:
    for name in ("v3", "v2"):
        found, counts = inspect(good / name, robot())
        assert found == [] and counts == {"episodes": 3, "frames": 36}, found


@pytest.mark.parametrize("fault", FAULTS, ids=[f"{check}-{words[:24]}" for _, check, words in FAULTS])
def test_one_fault(good: Path, tmp_path: Path, fault: tuple[str, str, str]) -> None:
    import re

    level, check, words = fault
    shutil.copytree(good / "v3", tmp_path / "d")
    FAULTS[fault](tmp_path / "d")
    found, _ = inspect(tmp_path / "d", robot(), pictures=check in ("video", "statistics"))
    words = words.replace("'extra'", "'frame_index'")
    assert any(f.level == level and f.check == check and re.search(words, f.what) and f.mend for f in found), found
    assert level == "error" or not any(f.level == "error" for f in found), found


UNITS = {
    "arm' is in rad and reaches .*looks like degrees": (episodes(scale=57.3), {}),
    "varies .* times as much as 'arm'": (episodes(scale=57.3), {}),
    r"beyond its limits \[-1, 1\]": (episodes(), {"action": (Part(name="arm", start=0, stop=2, moves="arm",
                                                                  limits=(-1, 1)), ACTION[1])}),
    "'close' is binary and takes": (episodes(), {"action": (Part(name="close", start=0, stop=3, kind="binary",
                                                                  limits=(-3, 3)),)}),
    "'arm' has the unit 'rads', by which nothing": (episodes(), {"state": (Part(name="arm", start=0, stop=2,
                                                                                unit="rads"), STATE[1])}),
    "is a delta and follows 'arm' itself": (episodes(), {"action": (Part(name="arm", start=0, stop=2, kind="delta",
                                                                         moves="arm"), ACTION[1])}),
    r"part 'grip' \(0\) never varies": ([Episode(**vars(e) | {"state": e.state * np.float32([1, 1, 0])})
                                  for e in episodes()], {}),
    "is in deg and stays within .*looks like radians": (episodes(), {"state": (Part(name="arm", start=0, stop=2,
                                                                                    unit="deg"), STATE[1])}),
}  # fmt: skip


@pytest.mark.parametrize("words", UNITS)
def test_units_that_look_wrong(words: str) -> None:
    import re

    from dreamgen.data.findings import Findings
    from dreamgen.data.unit_checks import Units

    made, change = UNITS[words]
    found, units = Findings(), Units(robot(**change))
    for episode in made:
        units.add(episode.state, episode.action)
    units.check(found)
    assert any(re.search(words, f.what) for f in found.list()), found.list()


def test_another_robot_names_the_part(good: Path) -> None:
    other = robot(action=(ACTION[0], Part(name="close", start=2, stop=3)))
    words = [f.what for f in inspect(good / "v3", other, pictures=False)[0] if f.check == "contract"]
    assert len(words) == 1 and "action 'close'" in words[0]
    wider = robot(action=(*ACTION, Part(name="waist", start=3, stop=5)))
    said = " ".join(f.what for f in inspect(good / "v2", wider, pictures=False)[0] if f.check == "contract")
    assert "action part 'waist' covers [3, 5), the dataset ends at 3" in said


def test_modality_names_the_part(good: Path, tmp_path: Path) -> None:
    export_dataset(Dataset(good / "v3", robot()), tmp_path / "g", format="groot")
    (tmp_path / "g/meta/dreamgen.json").unlink()
    swapped = robot(state=(Part(name="grip", start=0, stop=1), Part(name="arm", start=1, stop=3, unit="rad")))
    with pytest.raises(ValueError, match=r"state part 'grip' is \[0, 1\) here and \[2, 3\) in its meta/modality.json"):
        Dataset(tmp_path / "g", swapped)


def test_the_stage_tells_people_and_programs(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good / "v3", tmp_path / "d")
    arguments = {"robot": robot(), "out": tmp_path / "v", "pictures": False, "record": {}}
    edit(tmp_path / "d" / STATS, lambda s: s["action"]["mean"].__setitem__(1, 9.0))
    results = validate(str(tmp_path / "d"), **arguments)["results"]
    assert results["errors"] == 1 and not (tmp_path / "v/manifest.json").exists()
    told = json.loads((tmp_path / "v/findings.json").read_text())
    assert told["findings"][0]["check"] == "statistics" and told["findings"][0]["mend"]
    assert "1 error" in results["table"] and "contradicts itself" in results["table"] and "->" in results["table"]
    shutil.copy(good / "v3" / STATS, tmp_path / "d" / STATS)  # mended: the same call looks again
    assert validate(str(tmp_path / "d"), **arguments)["results"]["errors"] == 0
    assert (tmp_path / "v/manifest.json").exists()
    with pytest.raises(ValueError, match="does not exist"):
        validate(str(tmp_path / "nowhere"), **arguments)


def test_the_export_stage_resumes_and_says_what_it_did(good: Path, tmp_path: Path) -> None:
    data = Dataset(good / "v3", robot())
    first = export(data, out=tmp_path / "e", format="groot", record={"format": "groot"})
    assert first["results"]["episodes"] == 3 and first["results"]["mended"] == []
    assert export(data, out=tmp_path / "e", format="groot", record={"format": "groot"}) == first
    jaxtyping.config.update("jaxtyping_disable", True)
    with pytest.raises(ValueError, match="format: 'groot' -> 'v2.1'"):
        export(data, out=tmp_path / "e", format="v2.1", record={"format": "v2.1"})
    jaxtyping.config.update("jaxtyping_disable", False)


def test_the_job_ends_with_status_1(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    words = ["data=folder", f"data.root={tmp_path / 'empty'}", f"out={tmp_path / 'v'}"]
    done = subprocess.run([sys.executable, "-m", "jobs.validate", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "1 error" in done.stdout and "Traceback" not in done.stderr


def test_what_differs_in_numbers_alone_is_one_line_of_the_table() -> None:
    from dreamgen.data.findings import Findings, table

    found = Findings()
    for episode in range(9):
        found.add("warning", "time", f"'t' is off by {episode / 7:.3g} s", "export it", episode)
        found.add("warning", "time", f"'u' is off by {episode} s", "export it", episode)
    found.add("note", "units", "part 'a' (0) never varies", "leave it out")
    lines = table(found.list(), "mine").splitlines()
    assert lines[0] == "mine: 18 warnings, 1 note" and len(lines) == 7
    assert lines[1].endswith("episodes 0, 1, 2, 3 and 5 more: 't' is off by 0 s (8 more like it)")


def test_a_delta_called_absolute_is_told_by_its_name_alone() -> None:
    from dreamgen.data.findings import Findings
    from dreamgen.data.unit_checks import Units

    place, found = np.cumsum(np.random.default_rng(0).normal(size=(400, 2)), 0), Findings()
    step = np.diff(place, axis=0)
    parts = [Part(name="arm", start=0, stop=2)]
    units = Units(robot(state=parts, action=parts))
    units.add(place[:-1], step)
    units.check(found)
    assert [f.what.endswith("it looks like a delta") for f in found.list()] == [True]
    units, found = Units(robot(state=parts, action=parts)), Findings()
    units.add(place[:-1], 100 * place[1:])  # names no part that it moves, so its unit may be another
    units.check(found)
    assert found.list() == []
