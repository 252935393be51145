"""Recordings of one robot, joined: each episode is that of its own dataset."""

import sys
from pathlib import Path

import numpy as np
import pytest

from dreamgen.core.clip import Episode
from dreamgen.core.embodiment import Embodiment, Part, View
from dreamgen.core.manifest import fingerprint
from dreamgen.data.joined import Joined
from dreamgen.data.lerobot import Dataset
from dreamgen.data.writer import write_dataset
from dreamgen.stages.train_labeler import train_labeler

sys.path.insert(0, str(Path(__file__).parents[1] / "idm"))
from moving_square import CLOCK, ROBOT, Squares  # noqa: E402


def recorded(root: Path, count: int, seed: int) -> Dataset:
    episodes = [Episode(instruction="move", state=e.state, action=e.action, video=e.video)
                for e in Squares(count, rows=24, seed=seed).episodes]  # fmt: skip
    write_dataset(root, episodes, ROBOT)
    return Dataset(root, ROBOT)


def test_episodes_keep_their_rows_and_pictures(tmp_path: Path) -> None:
    first, second = recorded(tmp_path / "a", 3, 1), recorded(tmp_path / "b", 2, 2)
    both = Joined([first, second])
    assert len(both) == 5 and both.root == first.root and both.robot == ROBOT
    for i, (dataset, k) in enumerate([(first, 0), (first, 1), (first, 2), (second, 0), (second, 1)]):
        assert both.length(i) == dataset.length(k)
        np.testing.assert_array_equal(both.episode(i).action, dataset.episode(k).action)
        np.testing.assert_array_equal(both.canvas(i, [0, 5]), dataset.canvas(k, [0, 5]))
    other = Embodiment(name="other", robot_hz=10, views=(View(name="a", key="a", height=8, width=8),),
                       action=(Part(name="x", start=0, stop=1),))  # fmt: skip
    first.robot, kept = other, first.robot
    with pytest.raises(ValueError, match="the dataset .*b"):
        Joined([first, second])
    first.robot = kept


def test_a_labeler_learns_from_play_too_and_is_scored_on_demonstrations(tmp_path: Path) -> None:
    model = pytest.importorskip("idm.model")
    demos, play = recorded(tmp_path / "demos", 4, 1), recorded(tmp_path / "play", 3, 2)
    seen: list[list[int]] = []

    class Watched(model.FlowIDM):
        def fit(self, dataset: object, episodes: list[int]) -> None:
            seen.append(list(episodes))
            super().fit(dataset, episodes)

    labeler = Watched(robot=ROBOT, clock=CLOCK, frames=2, train_frames=3, width=32, layers=2, heads=2,
                      vision={"channels": [8, 16], "points": 4}, precision="fp32")  # fmt: skip
    done = train_labeler(labeler, demos, out=tmp_path / "labeler", steps=1, batch_size=2, more=[play],
                         precision="fp32", record={})  # fmt: skip
    assert done["results"]["episodes"] == 6 and done["results"]["held_out"] == 1
    assert done["parents"]["more_0"] == fingerprint(play.root)
    assert set(seen[0]) > {4, 5, 6} and len(seen[0]) == 6  # all play, and the demonstrations that are not held out
