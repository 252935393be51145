"""All stages on the smallest recipe: killed and continued, or shared out, they leave the same artefacts."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dreamgen.core.manifest import is_complete
from jobs import steps
from jobs.recipe import load
from jobs.running import run_stage
from jobs.steps import complete, run_job, run_steps

ROOT = Path(__file__).parents[2]
TIMED = ("seconds", "peak_mb", "versions", "data_wait", "tflops", "of_peak")


def artefacts(out: Path) -> dict[str, bytes | list]:
    """What a run leaves, by file: bytes, and JSON without what was measured with a clock."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if not path.is_file() or path.suffix == ".log" or "tfevents" in name or name.startswith("report/"):
            continue
        if path.name == "manifest.json":
            manifest = json.loads(path.read_text())
            found[name] = [manifest["id"], manifest["config"], manifest["parents"]]
        elif path.name == "losses.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{key: value for key, value in row.items() if key not in TIMED} for row in rows]
        else:
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from start to end."""
    out = tmp_path_factory.mktemp("whole")
    overrides = ["experiment=smoke", f"out={out}"]
    run_steps(load("pipeline", overrides)[0], overrides)
    return out


def test_the_run_ends_in_figures_and_a_report(whole: Path) -> None:
    results = json.loads((whole / "report" / "results.json").read_text())
    assert set(results["idm"]["r2"]) == {"translation", "gripper"}
    assert set(results["replay"]) == {"recorded", "idm_real", "idm_dream"}
    assert set(results["policy"]) == {"real", "real_dreams"}
    for success in [*results["replay"].values(), *results["policy"].values()]:
        assert success["n"] == 3 and 0 <= success["low"] <= success["rate"] <= success["high"] <= 1
    assert results["replay"]["recorded"]["successes"] == 3
    assert all(stage["seconds"] >= 0 and stage["peak_mb"] > 0 for stage in results["stages"].values())
    assert len(results["stages"]) == 14
    assert "data:video/mp4" in (whole / "report" / "report.html").read_text()


def test_what_is_complete_is_not_run_again(whole: Path) -> None:
    recipe = load("pipeline", ["experiment=smoke", f"out={whole}"])[0]
    for name, line in recipe.steps.items():
        step = load(line.split()[0], ["experiment=smoke", f"out={whole}", f"step={name}"])[0]
        assert complete(step.stage), name
    other = load("finetune", ["experiment=smoke", f"out={whole}", "step=world", "stage.steps=7"])[0]
    assert not complete(other.stage)
    with pytest.raises(ValueError, match="another configuration.*steps: 6 -> 7"):
        run_stage(other)


def test_three_shards_make_what_one_makes(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "world", tmp_path / "world")
    for shard in (2, 0, 1):
        overrides = ["experiment=smoke", f"out={tmp_path}", "step=dreams", "num_shards=3", f"shard={shard}"]
        run_stage(load("dream", overrides)[0])
    assert artefacts(tmp_path / "dreams") == artefacts(whole / "dreams")


@pytest.mark.parametrize("gpu", [False, True])
def test_a_job_in_its_own_process_tells_how_it_ended(gpu, tmp_path: Path, capfd, monkeypatch) -> None:
    """Where there is a GPU it is no fork of a process that has looked for it, in which CUDA refuses to run."""
    chosen, get_context = [], multiprocessing.get_context
    monkeypatch.setattr(multiprocessing, "get_context", lambda how: chosen.append(how) or get_context(how))
    monkeypatch.setattr(steps, "GPUS", (str(tmp_path / "no"), str(tmp_path)) if gpu else ())
    assert run_job("collect", ["+nonsense=1"]) == 2
    assert "nonsense" in capfd.readouterr().err
    made = ["experiment=smoke", "step=demos", f"out={tmp_path}", "stage.episodes=2", "workers=1"]
    assert run_job("collect", made) == 0 and is_complete(tmp_path / "demos")
    assert set(chosen) == {"spawn" if gpu else "forkserver"}


def test_a_killed_pipeline_leaves_no_process_behind(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "jobs.pipeline", "experiment=smoke", "apart=true", f"out={tmp_path}"]
    with (tmp_path / "run.log").open("w") as log:
        process = subprocess.Popen(line, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        until = time.monotonic() + 120
        while not (tmp_path / "demos").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        assert len(session(process.pid)) > 1  # the pipeline, the server of processes, the step
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        while session(process.pid) and time.monotonic() < until:
            time.sleep(0.1)
    assert not session(process.pid) and not is_complete(tmp_path / "demos")


def session(number: int) -> list[int]:
    """Living processes of a session (Linux)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, *fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z" and int(fields[2]) == number:
            found.append(int(path.parent.name))
    return found


def test_killed_at_any_point_and_continued_it_leaves_the_same(whole: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "jobs.pipeline", "experiment=smoke", f"out={tmp_path}"]
    with (tmp_path / "run.log").open("w") as log:
        for sign in ("dreams/clips/*.json", "labeler/training/latest.json"):
            process = subprocess.Popen(line, cwd=ROOT, stdout=log, stderr=log)
            until = time.monotonic() + 240
            while not list(tmp_path.glob(sign)) and process.poll() is None and time.monotonic() < until:
                time.sleep(0.02)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            assert not (tmp_path / "report" / "manifest.json").exists()
        done = subprocess.run(line, cwd=ROOT, stdout=log, stderr=log, timeout=300)
    text = (tmp_path / "run.log").read_text()
    assert done.returncode == 0, text[-2000:]
    left, expected = artefacts(tmp_path), artefacts(whole)
    assert set(left) == set(expected)
    assert [name for name in expected if left[name] != expected[name]] == []
