"""Shards on processes, Slurm and Ray: what composes, what is refused, and that nobody's death changes a clip."""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dreamgen.core.manifest import read_json, tree_digest
from jobs.recipe import load
from jobs.running import check, idle, keep_to, shareable, walk
from tests.jobs.shared_dream import CLIPS, allow, build, clips, shard_of

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cluster.md").read_text()
LINES = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
MINE = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0",
        # patience, where the machine is busy
        "RAY_raylet_start_wait_time_s": "300", "RAY_worker_register_timeout_seconds": "300",
        "RAY_health_check_timeout_ms": "100000"}  # fmt: skip


def parsed(line: str) -> tuple[str, list[str]]:
    """The job of a command, and its overrides."""
    program, job, *words = shlex.split(line.replace("embodiment=mine", "embodiment=gr1"))
    if program == "torchrun":
        program, (job, *words) = "dreamgen", words[words.index("-m") + 1 :]
    assert program == "dreamgen"
    return job.removeprefix("jobs."), words


@pytest.mark.parametrize("line", LINES)
def test_every_command_of_the_page_on_clusters_composes(line: str) -> None:
    job, words = parsed(line)
    cfg, _ = load(job, words)
    if job == "pipeline":
        assert "world" in cfg.steps
        return
    assert job in ("finetune", "train_labeler") or {"shard", "num_shards"} <= set(cfg.stage)
    shareable(cfg)
    check(cfg.stage)


def test_what_a_command_of_the_sequence_reads_an_earlier_one_has_made() -> None:
    made: list[str] = []
    *steps, last = [parsed(line) for line in LINES if "experiment=robot" in line]
    for job, words in steps:
        cfg, _ = load(job, words)
        texts = [Path(text) for key, text in walk(OmegaConf.to_container(cfg.stage, resolve=True)) if key != "out"]
        assert {path.relative_to(cfg.out).parts[0] for path in texts if path.is_relative_to(cfg.out)} <= {*made}
        made.append(cfg.step)
    assert made == ["world", "dreams", "labeler", "labels"] and last[0] == "pipeline"


def test_what_is_not_made_of_items_is_not_shared_out() -> None:
    for job, words in (("collect", ["num_shards=2"]), ("train_policy", ["launcher=ray"])):
        with pytest.raises(ValueError, match=f"stage '{job}' cannot be shared out.*dream, label and curate can"):
            shareable(load(job, words)[0])
    shareable(load("finetune", ["launcher=slurm"])[0])  # one job on the cluster
    with pytest.raises(ValueError, match="give the launcher to a step"):
        shareable(load("pipeline", ["experiment=smoke", "launcher=procs"])[0])


@pytest.mark.parametrize(("launcher", "said"), [("procs", 1), ("ray", 1), ("slurm", 0), ("local", 0)])
def test_gpus_that_stay_idle_are_told_of(launcher, said, monkeypatch, caplog) -> None:
    cfg, _ = load("dream", ["experiment=smoke", f"launcher={launcher}"])
    idle(cfg)
    assert not caplog.records
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    idle(cfg)
    assert [record.message.count("launcher.gpus is 0") for record in caplog.records] == [1] * said
    idle(load("dream", ["experiment=smoke", f"launcher={launcher}", "launcher.gpus=2"])[0] if said else cfg)
    assert len(caplog.records) == said


SHARD = """
import os, pathlib
from jobs.running import entry
def run(cfg):
    pathlib.Path(cfg.out, f"gpus_{cfg.shard}").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
entry("dream", run)()
"""


@pytest.mark.slow
def test_processes_of_this_machine_keep_to_the_gpus_that_the_command_was_given(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5f,7,2")
    line = [sys.executable, "-c", SHARD, "step=dreams", "launcher=procs", "num_shards=2", "launcher.gpus=2"]
    done = subprocess.run([*line, f"out={tmp_path}"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [(tmp_path / f"gpus_{shard}").read_text() for shard in range(2)] == ["GPU-5f,7"] * 2


@pytest.mark.parametrize(
    ("given", "asked", "left"), [("4,5", "", ""), ("4,5", "0,1,2", "4,5"), ("", "0", ""), (None, "0,1", "0,1")]
)
def test_of_the_gpus_that_were_given_as_many_are_taken_as_the_launcher_asks_for(
    given, asked, left, monkeypatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", asked)
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    keep_to(given)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == asked  # Slurm's, or one's own
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    keep_to(given)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left


def test_what_a_launcher_lacks_is_named(monkeypatch, tmp_path) -> None:
    from jobs.cluster import Ray

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"launcher=ray needs Ray: pip install -e '\.\[ray\]' in dreamgen's folder"):
        Ray(workers=1).run(lambda: lambda shard, num_shards: {}, 1)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The dreams of one process."""
    out = tmp_path_factory.mktemp("alone")
    allow(out, CLIPS)
    assert build(str(out))()["results"]["clips"] == CLIPS
    return out / "dreams"


def until(true, seconds: float = 600) -> None:  # noqa: ANN001
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def require_same(out: Path, alone: Path) -> None:
    assert tree_digest(out / "dreams" / "clips") == tree_digest(alone / "clips")
    left, expected = (read_json(path / "manifest.json") for path in (out / "dreams", alone))
    assert (left["id"], left["results"]) == (expected["id"], expected["results"])


@pytest.mark.slow
def test_a_process_of_submitit_is_killed_and_the_next_call_completes(tmp_path, alone, monkeypatch) -> None:
    submitit = pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    executor = submitit.LocalExecutor(tmp_path / "jobs")
    executor.update_parameters(timeout_min=10)

    def submit() -> list:
        return [executor.submit(shard_of, str(tmp_path), shard) for shard in range(2)]

    allow(tmp_path, 2)
    jobs = submit()
    try:
        until(lambda: clips(tmp_path) >= 2 and len(list((tmp_path / "built").glob("*"))) == 2)
        os.kill(int(next((tmp_path / "built").iterdir()).name), signal.SIGKILL)
        allow(tmp_path, CLIPS)
        for job in jobs:
            job.wait()
        assert [job.exception() is None for job in jobs].count(False) == 1 and clips(tmp_path) < CLIPS
        jobs = submit()
        assert all(job.result() for job in jobs)
    finally:
        for job in jobs:
            job.cancel()
    require_same(tmp_path, alone)


def node() -> dict[str, int]:
    """A node of one processor. Its agents' ports are given: Ray waits but seconds for them to choose their own."""
    names = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in names]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return {"num_cpus": 1} | {name: one.getsockname()[1] for name, one in zip(names, sockets, strict=True)}


@pytest.mark.slow
def test_workers_of_ray_die_join_and_lose_their_head(tmp_path, alone, monkeypatch) -> None:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    get_node = ray._private.services.get_node

    def patient(*given: object) -> dict:
        """Ray waits 30 s for a node; on a busy machine that is not enough."""
        end = time.monotonic() + 120
        while True:
            try:
                return get_node(*given)
            except RuntimeError:
                if time.monotonic() > end:  # its own agents have seconds to start, too
                    pytest.skip("Ray does not start on this machine: too busy")
                time.sleep(3)

    monkeypatch.setattr(ray._private.services, "get_node", patient)
    for name, value in MINE.items():
        monkeypatch.setenv(name, value)
    driver = [sys.executable, "-m", "tests.jobs.shared_dream"]

    def workers() -> set[int]:
        return {int(path.name) for path in (tmp_path / "built").glob("*")}

    allow(tmp_path, 2)
    head = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
    cluster = Cluster(initialize_head=True, head_node_args=head | node())
    with (tmp_path / "first.log").open("w") as log:
        first = subprocess.Popen([*driver, cluster.address, str(tmp_path)], cwd=ROOT, stderr=log)
    try:
        until(lambda: clips(tmp_path) == 2)
        (one,) = workers()  # there is room for one
        os.kill(one, signal.SIGKILL)
        until(lambda: len(workers()) == 2)  # its successor
        cluster.add_node(**node())
        until(lambda: len(workers()) == 3)
        allow(tmp_path, 7)
        until(lambda: clips(tmp_path) >= 7)
    finally:
        cluster.shutdown()  # the head goes, and all with it
        first.kill()
        first.wait()
    seen = clips(tmp_path)
    assert 7 <= seen < CLIPS and not (tmp_path / "dreams" / "manifest.json").exists()
    allow(tmp_path, CLIPS)
    cluster = Cluster(initialize_head=True, head_node_args=head | node())
    try:
        line = [*driver, cluster.address, str(tmp_path)]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    finally:
        cluster.shutdown()
    assert done.returncode == 0 and done.stdout == read_json(alone / "manifest.json")["id"], done.stderr[-2000:]
    assert all((tmp_path / "built" / str(pid)).read_text() == "built\n" for pid in workers())  # once a worker
    require_same(tmp_path, alone)
