"""The benchmarks of labels run, find equal labels, and end with one line of JSON."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from moving_square import CLOCK, ROBOT, Squares

from dreamgen.data.lerobot import Dataset
from dreamgen.data.writer import write_dataset
from idm.model import FlowIDM

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A labeler and four recordings, which nothing can replay."""
    root = tmp_path_factory.mktemp("labels")
    squares = Squares(4, seed=3)
    write_dataset(root / "heldout", squares.episodes, ROBOT)
    model = FlowIDM(robot=ROBOT, clock=CLOCK, frames=3, train_frames=4, width=32, layers=2, heads=2,
                    vision={"channels": [8, 16], "points": 4})  # fmt: skip
    model.fit(Dataset(root / "heldout", ROBOT), range(4))
    model.calibrate(squares, [3])
    model.save(root / "labeler")
    return root


def told(name: str, made: Path, monkeypatch, capsys, *words: str) -> dict:
    monkeypatch.setattr(sys, "argv", [name, "--labeler", str(made / "labeler"), "--dataset", str(made / "heldout"),
                                      *words])  # fmt: skip
    runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_speed_is_of_equal_labels(made, monkeypatch, capsys):
    found = told("label", made, monkeypatch, capsys, "--clips", "2", "--rounds", "1")
    assert found["ratio"] > 0 and found["ratio_two_frames"] > 0 and found["settings"]["trained"]
    assert found["max_difference"]["equal_settings"] < 1e-3 and found["settings"]["window"] == 3


def test_the_published_rule_is_scored_beside_ours(made, monkeypatch, capsys):
    found = told("label_rule", made, monkeypatch, capsys, "--episodes", "3")
    assert set(found["rules"]) == {"recorded", "ours", "mean", "order", "clock", "published"}
    assert found["rules"]["recorded"]["mae"][0] == 0 and found["ratio"] > 0 and found["ours"]["replay"] is None
