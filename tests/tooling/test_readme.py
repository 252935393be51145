"""What the README says can be done."""

import re
import shlex
from pathlib import Path

import pytest

from jobs.cli import commands
from jobs.recipe import load

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
LINES = [line.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
         for line in block.splitlines() if line.split("#")[0].strip()]  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_every_command_composes(line: str) -> None:
    program, *words = shlex.split(line)
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    assert program == "dreamgen" and words[0] in commands()
    cfg, _ = load(words[0], words[1:])
    assert cfg.stage is not None or cfg.steps


def test_the_first_screen_has_both_commands() -> None:
    first = README.splitlines()[:25]
    assert any("make demo" in line for line in first) and any("make test" in line for line in first)


def test_every_command_and_linked_file_is_there() -> None:
    assert set(re.findall(r"`dreamgen (\w+)", README)) <= set(commands())
    local = [target for target in re.findall(r"\]\(([^)]+)\)", README) if not target.startswith("http")]
    assert [target for target in local if not (ROOT / target).exists()] == []


def test_settings_in_the_text_are_known() -> None:
    for word in re.findall(r"`([\w.]+=[^`\s]+)`", README):
        if word != "a=b":
            load("finetune", [word])


def test_the_makefile_needs_nothing_but_python() -> None:
    text = (ROOT / "Makefile").read_text()
    assert "constraints.txt" in text and "demo: check" in text and "test: check" in text
    assert "make test" in (ROOT / ".ci" / "run").read_text()
