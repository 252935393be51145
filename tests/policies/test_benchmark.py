"""The benchmark runs, finds equal actions, and ends with one line of JSON."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from dreamgen.engine.compiling import missing

ROOT = Path(__file__).parents[2]


def test_the_last_line_is_json() -> None:
    line = [sys.executable, "benchmarks/policy.py", "--sizes", "toy", "--rounds", "2"]
    if not missing():  # a compiler is there: compiled actions are compared as well
        line.append("--compile")
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert {"name", "ratio", "ours", "peer", "settings", "device"} <= told.keys() and told["ratio"] > 0
    assert told["device"] == (torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
