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


def test_a_traceback_only_on_demand(tmp_path) -> None:
    quiet = run("-m", "jobs.label", f"out={tmp_path}")
    assert quiet.returncode == 2 and quiet.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in quiet.stderr
    assert "Traceback" in run("-m", "jobs.label", f"out={tmp_path}", "debug=true").stderr
