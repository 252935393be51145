"""The habits of the house, checked: tools pass, files are short, paths are relative, imports are light."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for room in ("dreamgen", "idm", "jobs", "conf", "tests") for path in (ROOT / room).rglob("*.py"))
LIBRARY = [path for path in SOURCES if path.parts[len(ROOT.parts)] in ("dreamgen", "idm")]


def tool(*words: str) -> str:
    """What a tool says against the tree, "" if nothing."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_ruff() -> None:
    assert tool("-m", "ruff", "check", ".") == ""


def test_types() -> None:
    assert tool("-m", "ty", "check") == ""


def test_arrows_between_rooms() -> None:
    run = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    assert tool("-c", run) == ""


def test_files_fit_in_the_head() -> None:
    long = {str(path.relative_to(ROOT)): n for path in SOURCES if (n := len(path.read_text().splitlines())) > 320}
    assert long == {}


def test_jobs_are_short() -> None:
    from jobs.cli import commands

    for name in commands():
        assert len((ROOT / "jobs" / f"{name}.py").read_text().splitlines()) <= 15, name


def test_files_are_nouns() -> None:
    assert [
        path for path in SOURCES if path.stem in ("utils", "util", "helpers", "helper", "base", "common", "misc")
    ] == []


def test_every_file_states_its_idea() -> None:
    assert [str(path) for path in LIBRARY if not path.read_text().startswith('"""')] == []


def test_no_absolute_paths() -> None:
    start = re.compile(r"""["'\s=:](/(home|work|root|tmp|data|mnt|Users|workspace|opt|var)/)""")
    texts = [*SOURCES, *(ROOT / "conf").rglob("*.yaml"), ROOT / "README.md", ROOT / "Makefile", ROOT / "pyproject.toml"]
    mine = Path(__file__)
    assert [str(path) for path in texts if path != mine and start.search(path.read_text())] == []


def test_the_library_does_not_print() -> None:
    assert [str(path) for path in LIBRARY if re.search(r"^\s*print\(", path.read_text(), re.MULTILINE)] == []


def test_importing_is_light() -> None:
    code = "import time; t = time.perf_counter(); import dreamgen; print(time.perf_counter() - t)"
    times = [float(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT)) for _ in range(3)]
    assert min(times) < 0.3


def test_constraints_pin_what_is_asked_for() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert pins["torch"] == "2.13.0" and not any("+" in version for version in pins.values())
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
    packaging = pytest.importorskip("packaging.requirements")
    names = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    for line in asked:
        wanted = packaging.Requirement(line)
        assert names[wanted.name.lower().replace("_", "-")] in wanted.specifier, line
