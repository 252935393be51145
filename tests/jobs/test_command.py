"""The commands as a shell sees them."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_an_error_is_one_line_and_status_2() -> None:
    done = run("-m", "jobs.collect", "+nonsense=1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and not done.stdout


def test_the_console_command_is_the_module() -> None:
    call = "import sys; from jobs.cli import main; sys.argv = ['dreamgen', *sys.argv[1:]]; main()"
    assert run("-c", call, "collect", "nonsense=1").stderr == run("-m", "jobs.collect", "nonsense=1").stderr
    shown = run("-c", call, "collect", "--cfg", "job", "seed=7")
    assert shown.returncode == 0 and "seed: 7" in shown.stdout
    assert "finetune" in run("-c", call, "--help").stdout
    assert run("-c", call, "fly").returncode == 2


def test_help_says_what_a_command_does_and_its_settings() -> None:
    from jobs.cli import commands
    from jobs.help import summary, usage

    assert all(summary(job).endswith((".", "success.", "(ZeroMQ).")) for job in commands())
    told = usage("train_policy", ["stage=train_policy_large"])
    assert "Train `policy` on a real:dream mixture" in told and "stage=train_policy_large" in told and "siglip2" in told
    assert "defaults" not in told and told.index("  steps: 1000\n") < told.index("  steps: 20000\n")
    assert "autoencoder are scored too" in usage("evaluate", ["stage=labels"])
    done = run("-m", "jobs.plan", "--help")
    assert done.returncode == 0 and done.stdout == usage("plan", []) and "gpu: h100 # or" in done.stdout


def test_a_stage_tells_its_first_figures_when_it_ends(caplog) -> None:
    from omegaconf import OmegaConf

    from jobs.running import told

    results = {"mae": {f"part_{k}": k / 3 for k in range(14)}, "episodes": 4, "table": "text", "missing": None}
    with caplog.at_level("INFO", logger="jobs"):
        told(OmegaConf.create({"stage": {"out": "runs/a/score"}}), {"results": results})
        told(OmegaConf.create({}), {"left": 3})  # of shards
    assert len(caplog.records) == 1
    line = caplog.records[0].getMessage()
    assert line.startswith("done: mae.part_0 0, mae.part_1 0.3333, ") and "runs/a/score/manifest.json" in line
    assert ", 3 more" in line and "text" not in line


def test_a_traceback_only_on_demand(tmp_path) -> None:
    quiet = run("-m", "jobs.label", f"out={tmp_path}")
    assert quiet.returncode == 2 and quiet.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in quiet.stderr
    assert "Traceback" in run("-m", "jobs.label", f"out={tmp_path}", "debug=true").stderr
