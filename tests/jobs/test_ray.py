"""`launcher=ray` as a command runs it: a stage that its workers build of the configuration, on a cluster of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dreamgen.core.manifest import read_json, tree_digest
from jobs.recipe import load
from jobs.running import run_stage
from tests.jobs.test_launchers import MINE

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_dream_on_a_local_cluster_is_that_of_one_process(tmp_path) -> None:
    pytest.importorskip("ray")

    def words(step: str, out: Path) -> list[str]:
        return ["experiment=smoke", f"step={step}", f"out={out}"]

    alone, shared = tmp_path / "alone", tmp_path / "shared"
    run_stage(load("collect", [*words("demos", alone), "stage.episodes=2"])[0])
    run_stage(load("finetune", [*words("world", alone), "stage.steps=1", "stage.samples=0", "stage.validation=0"])[0])
    run_stage(load("dream", words("dreams", alone))[0])
    shared.mkdir()
    (shared / "world").symlink_to(alone / "world")
    line = [sys.executable, "-m", "jobs.dream", *words("dreams", shared), "launcher=ray", "launcher.address=local",
            "launcher.workers=2"]  # fmt: skip
    done = subprocess.run(line, cwd=ROOT, env={**os.environ, **MINE}, capture_output=True, text=True, timeout=600)
    if "Failed to register worker to Raylet" in done.stderr:  # its own agents have seconds to start
        pytest.skip("Ray does not start on this machine: too busy")
    assert done.returncode == 0, done.stderr[-3000:]
    assert tree_digest(alone / "dreams") == tree_digest(shared / "dreams")
    one, two = (read_json(out / "dreams" / "manifest.json") for out in (alone, shared))
    assert (one["id"], one["results"]) == (two["id"], two["results"])
    logs = sorted(path.name for path in (shared / "dreams").glob("dream_*.log"))
    assert logs == [f"dream_{shard}_of_8.log" for shard in range(8)]  # four shards a worker
