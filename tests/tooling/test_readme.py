"""What the README says can be done."""

import re
import shlex
from pathlib import Path

import pytest

from jobs.cli import commands
from jobs.recipe import load

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
TEXTS = {path.name: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
BLOCKS = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINES = [line for text in TEXTS.values() for language, block in BLOCKS.findall(text) if language in ("", "bash")
         for line in re.sub(r"\\\n", " ", block).splitlines()
         if re.match(r"(dreamgen|make|python -m jobs\.)", line)]  # fmt: skip

JOINED = re.sub(r"\\\n", " ", "\n".join(TEXTS.values()))
SCRIPTS = sorted({line.strip() for line in re.findall(r"(?:python|bash) benchmarks/[^`\n]+", JOINED)})


@pytest.mark.parametrize("line", LINES)
def test_every_command_composes(line: str) -> None:
    program, *words = shlex.split(re.sub(r"^python -m jobs\.", "dreamgen ", line).partition(" > ")[0], comments=True)
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    words = [word.replace("embodiment=mine", "embodiment=gr1") for word in words]  # the reader's own file
    assert program == "dreamgen" and words[0] in commands()
    cfg, _ = load(words[0], words[1:])
    assert cfg.stage is not None or cfg.steps


def test_the_first_screen_has_both_commands() -> None:
    first = README.splitlines()[:25]
    assert any("make demo" in line for line in first) and any("make test" in line for line in first)


def test_every_command_and_linked_file_is_there() -> None:
    assert set(re.findall(r"`dreamgen (\w+)", README)) <= set(commands())
    local = [target for target in re.findall(r"\]\(([^)]+)\)", README) if not target.startswith("http")]
    assert [target for target in local if not (ROOT / target.partition("#")[0]).exists()] == []


def test_settings_in_the_text_are_known() -> None:
    for word in re.findall(r"`([\w.]+=[^`\s]+)`", README):
        if word != "a=b":
            load("finetune", [word])


@pytest.mark.parametrize("line", SCRIPTS)
def test_every_script_is_there_and_knows_its_options(line: str) -> None:
    program, script, *words = shlex.split(line, comments=True)
    text = (ROOT / script).read_text()
    assert Path(script).suffix == {"python": ".py", "bash": ".sh"}[program]
    assert [word for word in words if word.startswith("-") and f'"{word.split("=")[0]}"' not in text] == []


def test_every_stage_that_reads_recordings_says_what_it_left_out() -> None:
    texts = {path.name: path.read_text() for path in (ROOT / "dreamgen" / "stages").glob("*.py")}
    readers = {name for name, text in texts.items() if "import Dataset\n" in text and "run.finish(" in text}
    assert len(readers) > 12 and {name for name in readers if "noted(" not in texts[name]} == set()


def test_the_makefile_needs_nothing_but_python() -> None:
    text = (ROOT / "Makefile").read_text()
    assert "constraints.txt" in text and "demo: check" in text and "test: check" in text
    assert "make test" in (ROOT / ".ci" / "run").read_text()
