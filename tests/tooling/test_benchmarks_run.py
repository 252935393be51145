"""Every benchmark opens, and those of world models run at tiny size, find equal results and end with a line of JSON."""

import json
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def path(monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])  # scripts add the root to it


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("*.py")), ids=lambda script: script.stem)
def test_it_opens(script: Path) -> None:
    assert "main" in runpy.run_path(str(script), run_name="opened")


@pytest.mark.parametrize("line", ["dream --tiny --prompts 2 --steps 1 --rounds 1", "finetune --batch 1 --rounds 1"])
def test_the_last_line_is_json(line: str, monkeypatch, capsys) -> None:
    name, *words = line.split()
    monkeypatch.setattr(sys, "argv", [name, *words])
    runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"name", "ratio", "ours", "peer", "settings", "device"} <= told.keys() and told["ratio"] > 0
