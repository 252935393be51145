"""The benchmarks of labels run, find equal labels, and end with one line of JSON."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from moving_square import CLOCK, ROBOT, Squares

from dreamgen.core.clock import Clock
from dreamgen.data.lerobot import Dataset
from dreamgen.data.recordings import recorded_clip
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


def test_rules_are_compared_in_one_precision(made):
    """A labeler in bf16 that does not correct drift follows the plain mean: the same rule, the same labels."""
    rules = runpy.run_path(str(BENCHMARKS / "label_rule.py"))
    model = FlowIDM.load(made / "labeler", precision="bf16", correct=0.0, rule="mean")
    clip = recorded_clip(Dataset(made / "heldout", ROBOT), 1, CLOCK)[0]
    labels, misplaced = rules["under"](model, clip, order=False, clock=False)
    np.testing.assert_allclose(labels.value, model.label([clip])[0].value, atol=1e-6)
    frames = torch.rand(3, 9, 32, 48, generator=torch.Generator().manual_seed(0))
    tokens, _ = rules["as_they_complete"](model, frames, 1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        encoded = model.vision(frames).float()
    assert misplaced == 0
    assert ((tokens[:, None] - encoded).abs().amax((2, 3)).amin(1) < 1e-6).all()  # in whatever order


@pytest.mark.parametrize("stride", [2, 4, 6])
def test_windows_half_as_far_apart_are_written_from_their_own_row_on(stride):
    written = runpy.run_path(str(BENCHMARKS / "label_rule.py"))["written"]
    clock = Clock(robot_hz="12", video_hz=str(24 // stride), frames=7)  # twice the rate of a model at 12 / stride
    windows, horizon = clock.frames - 2, 2 * stride  # of three frames
    value = clock.rows[:windows, None, None] + np.arange(horizon)[:, None] + np.zeros(3)
    labels = written(value[None], clock, FlowIDM(robot=ROBOT, clock=CLOCK, frames=3)).value
    np.testing.assert_allclose(labels[:, :2], np.arange(clock.steps)[:, None] + np.zeros(2), atol=1e-6)
