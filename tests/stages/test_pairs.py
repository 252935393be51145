"""Paired comparison of evaluations, the table of cells."""

import json
from pathlib import Path

import pytest

from dreamgen.core.intervals import difference_interval, pooled, pooled_difference, success_interval
from dreamgen.core.manifest import is_complete, write_json
from dreamgen.stages.pairs import paired, require_comparable
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


def cell(folder: Path, name: str, wins: str, stage: str = "evaluate", config: dict | None = None, **results) -> None:
    rows = episodes(wins)
    write_json(folder / name / "episodes.json", rows)
    success = success_interval(wins.count("1"), len(wins)) if wins else None
    write_json(folder / name / "manifest.json",
               {"id": name, "stage": stage, "config": config or {},
                "results": results or {"success": success}})  # fmt: skip


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


def test_a_cell_of_several_trainings(tmp_path: Path):
    """Rates are of all of them together, differences training by training, each on first states of its own."""
    for name, wins in {"a0": "1100", "a1": "0000", "b0": "1111", "b1": "0001"}.items():
        cell(tmp_path, name, wins)
    cells = {"a": ["a0", "a1", "a2"], "b": ["b0", "b1", "b2"], "single": "a0"}
    options = dict(folder=tmp_path, against={"b": "a"}, record={})
    made = policy_table(cells, out=tmp_path / "t", **options)["results"]
    assert made["missing"] == ["a", "b"]  # not whole
    found = made["cells"]["b"]
    assert found == pooled([success_interval(4, 4), success_interval(1, 4)]) | {
        "against": {"cell": "a"} | pooled_difference([difference_interval(2, 0, 4), difference_interval(1, 0, 4)])
    }
    assert found["against"]["trainings"] == [0.5, 0.25] and "; of 2 trainings [-" in made["table"]
    cell(tmp_path, "a2", "0000")  # which b lacks
    made = policy_table(cells, out=tmp_path / "t", **options)["results"]
    assert made["cells"]["a"]["n"] == 12 and made["cells"]["b"]["against"] == found["against"]
    with pytest.raises(ValueError, match="compares 'a', 3 trainings, with 'single', 1; training k"):
        policy_table(cells, out=tmp_path / "u", folder=tmp_path, against={"a": "single"}, record={})


def test_a_cell_is_a_success_rate(tmp_path: Path):
    cell(tmp_path, "success_a", "1100"), cell(tmp_path, "unknown", "", "evaluate_dreamt")
    cells = {"a": "success_a", "dreamt": "unknown"}
    options = dict(folder=tmp_path, against={"dreamt": "a"}, record={})
    made = policy_table(cells, out=tmp_path / "t", **options)["results"]
    assert made["missing"] == ["dreamt"] and list(made["cells"]) == ["a"]  # its judge abstained throughout
    with pytest.raises(ValueError, match="none of the evaluations .* says how often"):
        policy_table({"dreamt": "unknown"}, out=tmp_path / "u", folder=tmp_path, record={})
    cell(tmp_path, "error", "1", "evaluate_open_loop", open_loop={"mae": 0.1})
    cell(tmp_path, "executed", "1", "evaluate_counterfactuals", success={"auroc": 0.5})
    for step, stage in (("error", "evaluate_open_loop"), ("executed", "evaluate_counterfactuals")):
        with pytest.raises(ValueError, match=f"the cell 'x' is .*{step}, made by the stage '{stage}'; a cell says"):
            policy_table({"a": "success_a", "x": step}, out=tmp_path / "v", folder=tmp_path, record={})


def tabletop(appearance: str = "target", **robot) -> dict:
    return {"_target_": "Tabletop", "appearance": appearance, "robot": {"robot_hz": "20", "views": ["front"], **robot}}


def midway(steps: int = 8, **robot) -> dict:
    return {"_target_": "FromKeyframe", "sim": tabletop(**robot), "steps": steps}


@pytest.mark.parametrize(("mine", "theirs", "told"), [
    ({"sim": midway()}, {"sim": tabletop()}, "sim._target_: 'Tabletop' -> 'FromKeyframe'"),
    ({"sim": midway(9)}, {"sim": midway()}, "sim.steps: 8 -> 9"),
    ({"sim": tabletop("random")}, {"sim": tabletop()}, "sim.appearance: 'target' -> 'random'"),
    ({"sim": midway(robot_hz="10")}, {"sim": midway()}, "sim.sim.robot.robot_hz: '20' -> '10'"),
    ({"steps": 96}, {"steps": 48}, "steps: 48 -> 96"),
    ({"sim": tabletop() | {"instructions": ["go"]}, "execute": 4, "execution": "RealTime", "films": 0},
     {"sim": tabletop(views=["front", "wrist"]), "execute": 8}, ""),
    ({"sim": midway(views=["wrist"])}, {"sim": midway()}, ""),
])  # fmt: skip
def test_only_episodes_of_one_kind_are_compared(tmp_path: Path, mine: dict, theirs: dict, told: str):
    """In one simulator and for as many steps; what a policy sees of it, and how it executes its chunks, is its own."""
    cell(tmp_path, "a", "10", config=theirs), cell(tmp_path, "b", "11", config=mine)
    options = dict(folder=tmp_path, against={"b": "a"}, record={})
    if not told:
        assert policy_table({"a": "a", "b": "b"}, out=tmp_path / "t", **options)["results"]["cells"]["b"]["against"]
        return
    with pytest.raises(ValueError, match=rf"the cell 'a', with which 'b' is compared, is of other settings \({told}"):
        policy_table({"a": "a", "b": "b"}, out=tmp_path / "t", **options)


def test_a_dream_is_not_compared_with_a_simulator():
    one, other = ({"stage": stage, "config": {"steps": 48}} for stage in ("evaluate", "evaluate_dreamt"))
    with pytest.raises(ValueError, match="x is of other settings .stage: 'evaluate' -> 'evaluate_dreamt'"):
        require_comparable(other, one, "x")
    require_comparable(other, other, "x")
