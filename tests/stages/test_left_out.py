"""What a labeler cannot read is left out, named and counted; what is held out is read a part at a time."""
# ruff: noqa: F401, F811 (fixtures come by import)

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from dreamgen.core.clip import Clip, Episode
from dreamgen.core.manifest import fingerprint, write_json
from dreamgen.data.clips import ClipFolder
from dreamgen.data.lerobot import Dataset
from dreamgen.data.recordings import recorded_clip
from dreamgen.data.writer import write_dataset
from dreamgen.sims.keyframes import FromKeyframe
from dreamgen.sims.rollout import can_begin
from dreamgen.stages.evaluate_filters import evaluate_filters
from dreamgen.stages.label import label
from dreamgen.stages.train_labeler import train_labeler
from tests.stages.test_labels import CLOCK, ROBOT, ROWS, Oracle, Plane, Squares, dataset, dreams_of


def test_dreams_that_cannot_be_read_are_left_out_and_named(dataset, tmp_path):
    dreams = dreams_of(dataset, tmp_path / "dreams")
    video = dreams / "clips" / "dream_1.mp4"
    video.write_bytes(video.read_bytes()[:99])
    with pytest.raises(ValueError, match="dream_1.mp4.*truncated.*skip_bad=true"):
        label(Oracle(dataset), dreams, out=tmp_path / "l", robot=ROBOT, batch_size=2, record={})
    for size in (1, 2):
        found = label(Oracle(dataset), dreams, out=tmp_path / str(size), robot=ROBOT, batch_size=size, skip_bad=True,
                      record={})["results"]  # fmt: skip
        assert found["episodes"] == 2 and [one["episode"] for one in found["skipped"]] == ["dream_1"]
        assert found["skipped"][0]["dataset"] == "dreams" and "truncated" in found["skipped"][0]["reason"]
        made = Dataset(tmp_path / str(size), ROBOT)
        assert [made.episode(i).meta["prompt"] for i in range(2)] == ["dream_0", "dream_2"]
        np.testing.assert_allclose(made.episode(1).action, dataset.episode(2).action[:16], atol=1e-6)


class Long(Oracle):
    """Labels clips of ten frames and more."""

    window = 10

    def check(self, clip: Clip) -> None:
        if len(clip.video) < self.window:
            raise ValueError(f"clip '{clip.id}' has {len(clip.video)} frames")


def test_dreams_that_the_labeler_cannot_read_are_left_out_and_named(dataset, tmp_path):
    dreams = dreams_of(dataset, tmp_path / "dreams")  # of nine frames
    ClipFolder(dreams / "clips").write(recorded_clip(dataset, 4, CLOCK)[0])  # of ten
    with pytest.raises(ValueError, match="'dream_0' has 9 frames"):
        label(Long(dataset), dreams, out=tmp_path / "l", robot=ROBOT, record={})
    found = label(Long(dataset), dreams, out=tmp_path / "l", robot=ROBOT, skip_bad=True, record={})["results"]
    assert found["episodes"] == 1 and [one["episode"] for one in found["skipped"]] == [f"dream_{i}" for i in range(3)]
    assert found["skipped"][2]["reason"] == "clip 'dream_2' has 9 frames"
    np.testing.assert_allclose(
        Dataset(tmp_path / "l", ROBOT).episode(0).action, dataset.episode(4).action[:18], atol=1e-6
    )


def test_episodes_shorter_than_a_window_are_left_out_and_counted(dataset, tmp_path):
    model, root = pytest.importorskip("idm.model"), tmp_path / "data"
    stage = pytest.importorskip("dreamgen.stages.evaluate_labels")
    lengths = (4, 19, 4, 19, 19, 1)
    write_dataset(root, [Episode(instruction="move", state=e.state[:rows], action=e.action[:rows],
                                 video={"top": e.video["top"][:rows]}, meta={"seed": 40 + i})
                         for i, (e, rows) in enumerate(zip(Squares(6, rows=ROWS, seed=3).episodes, lengths,
                                                           strict=True))], ROBOT)  # fmt: skip
    mixed = Dataset(root, ROBOT)

    def make(frames: int) -> object:
        return model.FlowIDM(robot=ROBOT, clock=CLOCK, frames=frames, train_frames=frames, width=32, layers=2, heads=2,
                             vision={"channels": [8, 16], "points": 4}, precision="fp32")  # fmt: skip

    options = {"steps": 1, "batch_size": 2, "precision": "fp32", "record": {}}
    for seed in range(2):
        done = train_labeler(make(3), mixed, out=tmp_path / f"l{seed}", held_out_share=0.5, seed=seed, **options)
        assert done["results"]["too_short"] == 3 and done["results"]["episodes"] + done["results"]["held_out"] == 3
    with pytest.raises(ValueError, match="of 6 episodes of .* 0 have the 21 rows that 11 frames at 10 Hz"):
        train_labeler(make(11), mixed, out=tmp_path / "long", **options)
    assert not list((tmp_path / "long").glob("*.safetensors")) and not (tmp_path / "long/training").exists()
    labeler, scores = model.FlowIDM.load(tmp_path / "l0"), tmp_path / "scores"
    found = stage.evaluate_labels(labeler, mixed, lambda: Plane(dataset), out=scores, record={})["results"]
    assert found["episodes"] == 3 and found["too_short"] == 3 and found["replay"]["recorded"]["n"] == 3
    assert found["replay"]["recorded"]["successes"] == 3


def test_scores_during_training_are_of_some_that_are_held_out_and_those_after_it_of_all(dataset, tmp_path):
    class Counting(Oracle):
        label_batch, seen = 2, []

        def label(self, clips):  # noqa: ANN001, ANN202
            self.seen.append([clip.id for clip in clips])
            return super().label(clips)

    model = pytest.importorskip("idm.model")
    labeler = model.FlowIDM(robot=ROBOT, clock=CLOCK, frames=2, train_frames=3, width=32, layers=2, heads=2,
                            vision={"channels": [8, 16], "points": 4}, precision="fp32", label_batch=2)  # fmt: skip
    counting = Counting(dataset)
    labeler.label = counting.label
    done = train_labeler(labeler, dataset, out=tmp_path / "l", held_out_share=0.5, held_out_clips=2, steps=1,
                         batch_size=2, precision="fp32", record={})  # fmt: skip
    assert [len(ids) for ids in counting.seen] == [2, 2, 1] and done["results"]["held_out"] == 3
    assert counting.seen[0] == [(counting.seen[1] + counting.seen[2])[k] for k in (0, 2)]
    assert done["results"]["held_out_scores"]["r2"]["move"] == 1.0
    with pytest.raises(ValueError, match="held_out_clips is 0"):
        train_labeler(labeler, dataset, out=tmp_path / "none", held_out_clips=0, record={})


def test_dreams_that_the_simulator_cannot_lay_out_are_left_out_and_counted(dataset, tmp_path, caplog):
    """Under an instruction that it does not know, and under another than that of its scene where it has but one."""
    stage = pytest.importorskip("dreamgen.stages.evaluate_labels")
    dreams = dreams_of(dataset, tmp_path / "dreams")
    folder = ClipFolder(dreams / "clips")
    for number, text in ((1, "wave at the camera"), (2, "move 1")):
        folder.write(replace(folder.read(f"dream_{number}"), instruction=text))
    label(Oracle(dataset), dreams, out=tmp_path / "labels", robot=ROBOT, record={})
    labels = Dataset(tmp_path / "labels", ROBOT)
    found = stage.evaluate_labels(Oracle(dataset), dataset, lambda: Plane(dataset), out=tmp_path / "scores",
                                  dreams=labels.root, record={})["results"]["replay"]  # fmt: skip
    assert found["idm_dream"]["successes"] == found["idm_dream"]["n"] == 1 and found["recorded"]["n"] == 6
    assert caplog.text.count("2 of 3 dreams are not replayed") == 1
    rows = [{"id": f"dream_{k}", "episode": k, "instruction": labels.instruction(k), "pair": "p",
             "origin": labels.episode(k).meta["origin"], "scores": {"good": 0.5}} for k in range(3)]  # fmt: skip
    for name, known in (("some", rows), ("none", rows[1:])):
        write_json(tmp_path / name / "scores.json", known)
        parents = {"dataset": fingerprint(labels.root)}
        write_json(
            tmp_path / name / "manifest.json",
            {"id": name, "stage": "curate", "config": {}, "parents": parents, "results": {"yields": {}}},
        )
    options = dict(draws=20, record={})
    worth = evaluate_filters(tmp_path / "some", labels, lambda: Plane(dataset), out=tmp_path / "worth", **options)
    assert (worth["results"]["clips"], worth["results"]["left_out"]) == (1, 2)
    with pytest.raises(ValueError, match="none of the 2 clips of .* an instruction that it knows"):
        evaluate_filters(tmp_path / "none", labels, lambda: Plane(dataset), out=tmp_path / "worthless", **options)


class Scenes(Plane):
    def reset(self, instruction: str, seed: int, *, scene_of: str | None = None) -> None:
        super().reset(instruction, seed)


def test_what_a_simulator_can_lay_out_one_that_begins_in_the_middle_can(dataset):
    for kind, other in ((Plane, False), (Scenes, True)):
        for sim in (
            kind(dataset),
            FromKeyframe(sim=partial(FromKeyframe, sim=partial(kind, dataset), steps=1), steps=1),
        ):
            assert can_begin(sim, "move 1", "move 1") and can_begin(sim, "move 1", "move 0") is other
            assert not can_begin(sim, "wave", "move 1") and not can_begin(sim, "move 1", "wave")
