"""Scores outlive a choice that fails: what was scored for hours is chosen from anew."""

import numpy as np
import pytest

from dreamgen.core.clip import Clip, Labels
from dreamgen.core.embodiment import Embodiment, Part, View
from dreamgen.core.manifest import Stage, fingerprint, is_complete, read_json, write_json
from dreamgen.data.clips import ClipFolder
from dreamgen.data.lerobot import Dataset
from dreamgen.stages.curate import curate
from dreamgen.stages.label import label

COUNT = 7
ROBOT = Embodiment(name="arm", robot_hz="20", views=(View(name="eye", key="eye", height=16, width=24),), state=(),
                   action=(Part(name="move", start=0, stop=2),))  # fmt: skip


class Counting:
    """Rates clips by their number, and counts how many it was asked."""

    needs_labels, asked = False, 0

    def __init__(self, name: str) -> None:
        self.name = name

    def score(self, clips, labels):  # noqa: ANN001, ANN201
        self.asked += len(clips)
        return np.array([int(clip.id) / COUNT for clip in clips])


@pytest.fixture
def dreams(tmp_path):
    (tmp_path / "world").write_text("weights")
    with Stage(tmp_path / "dreams", "dream", config={}, parents={"world_model": tmp_path / "world"}) as run:
        folder = ClipFolder(tmp_path / "dreams" / "clips")
        for k in range(COUNT):
            folder.write(Clip(id=str(k), video=np.full((3, 16, 24, 3), 9 * k, np.uint8), video_hz="10",
                              instruction="move", seed=k))  # fmt: skip
        run.finish(clips=COUNT)
    return tmp_path / "dreams"


def choose(dreams, out, filters=(), **options):
    settings = {key: value for key, value in options.items() if key != "scored"}
    return curate({one.name: one for one in filters}, None, clips=dreams, out=out, batch_size=3,
                  record={"filters": [one.name for one in filters], **settings}, **options)["results"]  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "told"),
    [(dict(least={"good": 0.5}, keep=5), "keep asks for 5 clips, 3 of 7 pass"),
      (dict(least={"good": 1.0}), "keep none of 7")],
)  # fmt: skip
def test_scores_of_a_choice_that_failed_are_chosen_from(dreams, tmp_path, wanted, told):
    one, first = Counting("good"), tmp_path / "first"
    with pytest.raises(ValueError, match=rf"{told}.*stage.filters={{}} stage.scored={first} in another out"):
        choose(dreams, first, [one], **wanted)
    assert one.asked == COUNT and not is_complete(first)
    options = dict(least={"good": 0.5}, keep=2, scored=first)
    found = choose(dreams, tmp_path / "second", [], **options)
    assert choose(dreams, tmp_path / "second", [], **options) == found  # it is complete
    assert found["kept"] == 2 and ClipFolder(tmp_path / "second" / "clips").ids() == ["5", "6"] and one.asked == COUNT
    more = choose(dreams, tmp_path / "third", [Counting("other")], keep=3, scored=first)
    assert set(more["yields"]) == {"good", "other"} and more["kept"] == 3
    whole = choose(dreams, tmp_path / "whole", [Counting("good")], least={"good": 0.5}, keep=2)
    assert whole == found and read_json(tmp_path / "whole" / "scores.json") == read_json(
        tmp_path / "second" / "scores.json"
    )


def test_a_choice_from_scores_that_fails_is_made_again_in_its_folder(dreams, tmp_path):
    choose(dreams, tmp_path / "first", [Counting("good")])
    with pytest.raises(ValueError, match="lower drop and least$"):
        choose(dreams, tmp_path / "second", least={"good": 0.5}, keep=5, scored=tmp_path / "first")
    assert choose(dreams, tmp_path / "second", least={"good": 0.5}, keep=3, scored=tmp_path / "first")["kept"] == 3


def test_half_scored_and_other_scores_are_refused(dreams, tmp_path, monkeypatch):
    class Dying(Counting):
        def score(self, clips, labels):  # noqa: ANN001, ANN202
            if self.asked:
                raise KeyboardInterrupt
            return super().score(clips, labels)

    with pytest.raises(KeyboardInterrupt):
        choose(dreams, tmp_path / "half", [Dying("good")])
    with pytest.raises(ValueError, match="the scores .*half is unfinished"):
        choose(dreams, tmp_path / "x", scored=tmp_path / "half")
    with pytest.raises(ValueError, match="keep none"):
        choose(dreams, tmp_path / "first", [Counting("good")], least={"good": 1.0})
    told = read_json(tmp_path / "first" / "run.json")
    write_json(tmp_path / "first" / "run.json", {**told, "parents": {"dreams": "0"}})
    with pytest.raises(ValueError, match="`scored` is .*first, which read dreams 0, but this run reads dreams"):
        choose(dreams, tmp_path / "y", scored=tmp_path / "first")


class Still:
    """A labeler of a robot that rests."""

    robot, path = ROBOT, None

    def label(self, clips):  # noqa: ANN001, ANN201
        rest = np.zeros((4, ROBOT.action_dim), np.float32)
        return [Labels(value=rest, spread=rest) for _ in clips]


def test_labels_of_chosen_dreams_know_the_world_model_that_dreamt_them(dreams, tmp_path):
    choose(dreams, tmp_path / "some", [Counting("good")], keep=4)
    choose(tmp_path / "some", tmp_path / "few", [Counting("good")], keep=2)  # of these again
    wanted = fingerprint(tmp_path / "world")
    for name, count in (("dreams", COUNT), ("some", 4), ("few", 2)):
        label(Still(), tmp_path / name, out=tmp_path / f"{name}_labels", robot=ROBOT, record={})
        made = Dataset(tmp_path / f"{name}_labels", ROBOT)
        assert [made.episode(i).meta["world_model"] for i in range(len(made))] == [wanted] * count
