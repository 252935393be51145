"""Paired comparison of evaluations, the table of cells."""

import json
from pathlib import Path

import pytest

from dreamgen.core.intervals import difference_interval, success_interval
from dreamgen.core.manifest import is_complete, write_json
from dreamgen.stages.pairs import paired
from dreamgen.stages.policy_table import policy_table


def episodes(wins: str, text: str = "go") -> list[dict]:
    return [{"instruction": text, "seed": k, "success": won == "1", "steps": 3} for k, won in enumerate(wins)]


def test_pairs_are_counted():
    mine, theirs = "1111111100110", "0000000011110"
    assert paired(episodes(mine), episodes(theirs)) == difference_interval(8, 2, 13)
    assert paired(episodes(theirs), episodes(mine)) == difference_interval(2, 8, 13)
    assert paired(episodes(mine), episodes(mine))["p"] == 1


def test_only_shared_episodes_count():
    assert paired(episodes("101"), episodes("0010"))["n"] == 3
    with pytest.raises(ValueError, match="none of these episodes"):
        paired(episodes("101"), episodes("101", "stay"))


def cell(folder: Path, name: str, wins: str) -> None:
    rows = episodes(wins)
    write_json(folder / name / "episodes.json", rows)
    results = {"success": success_interval(wins.count("1"), len(wins))}
    write_json(folder / name / "manifest.json", {"id": name, "stage": "evaluate", "config": {}, "results": results})


def test_the_table_of_cells(tmp_path: Path):
    cell(tmp_path, "success_a", "1100"), cell(tmp_path, "success_b", "1111")
    cells = {"demos": "success_a", "demos + dreams": "success_b", "flare": "success_c"}
    options = dict(folder=tmp_path, against={"demos + dreams": "demos", "flare": "demos"}, record={})
    made = policy_table(cells, out=tmp_path / "t", **options)["results"]
    assert made["missing"] == ["flare"] and is_complete(tmp_path / "t")
    lines = made["table"].splitlines()
    assert lines[1].split()[:2] == ["demos", "50.0%"] and "+50.0 [" in lines[2] and lines[2].endswith("to demos")
    assert made["cells"]["demos + dreams"]["against"]["won"] == 2
    assert (tmp_path / "t/table.txt").read_text().strip() == made["table"].strip()
    cell(tmp_path, "success_c", "0111")
    assert policy_table(cells, out=tmp_path / "t", **options)["results"]["missing"] == []  # once it is there
    with pytest.raises(ValueError, match="compares 'x' with 'demos'"):
        policy_table(cells, out=tmp_path / "u", folder=tmp_path, against={"x": "demos"}, record={})
    with pytest.raises(ValueError, match="none of the evaluations"):
        policy_table(cells, out=tmp_path / "u", folder=tmp_path / "none", record={})
    assert json.loads((tmp_path / "t/manifest.json").read_text())["stage"] == "policy_table"
