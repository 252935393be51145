"""The label stages on a robot small enough to know all answers: a square on a plane."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dreamgen.core.clip import Clip, Episode, Labels
from dreamgen.core.clock import Clock
from dreamgen.core.manifest import Stage, fingerprint
from dreamgen.data.clips import ClipFolder
from dreamgen.data.lerobot import Dataset
from dreamgen.data.recordings import recorded_clip
from dreamgen.data.writer import write_dataset
from dreamgen.stages.label import label, pseudo_states
from dreamgen.stages.train_labeler import held_out, train_labeler

sys.path.insert(0, str(Path(__file__).parents[1] / "idm"))
from moving_square import CLOCK, ROBOT, Squares  # noqa: E402

ROWS = 19


class Oracle:
    """A perfect labeler of clips whose id is the episode's number."""

    robot, path = ROBOT, None

    def __init__(self, dataset: Dataset, clock: Clock = CLOCK) -> None:
        self.dataset, self.clock = dataset, clock

    def label(self, clips: list[Clip]) -> list[Labels]:
        found = []
        for clip in clips:
            steps = self.clock.with_frames(len(clip.video)).steps
            action = self.dataset.episode(int(clip.id.split("_")[1])).action[:steps]
            found.append(Labels(value=action, spread=np.full_like(action, 0.25)))
        return found


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    root = tmp_path_factory.mktemp("squares")
    squares = Squares(6, rows=ROWS, seed=3)
    episodes = [Episode(instruction=f"move {i % 2}", state=e.state, action=e.action, video=e.video,
                        meta={"seed": 40 + i}) for i, e in enumerate(squares.episodes)]  # fmt: skip
    write_dataset(root, episodes, ROBOT)
    return Dataset(root, ROBOT)


def dreams_of(dataset: Dataset, out: Path) -> Path:
    with Stage(out, "dream", config={}) as run:
        folder = ClipFolder(out / "clips")
        for i in range(3):
            episode = dataset.episode(i)
            folder.write(Clip(id=f"dream_{i}", video=dataset.canvas(i, CLOCK.rows), video_hz="10", seed=i, pair="p",
                              instruction=episode.instruction, state=episode.state[0],
                              origin={"instruction": episode.instruction, "seed": 40 + i}))  # fmt: skip
        run.finish(clips=3)
    return out


def test_held_out_episodes_are_apart_and_fixed_by_the_seed():
    training, apart = held_out(23, 0.2, 5)
    assert len(apart) == 5 and sorted(training + apart) == list(range(23))
    assert held_out(23, 0.2, 5) == (training, apart) != held_out(23, 0.2, 6)
    assert held_out(2, 0.01, 0)[1]


def test_recorded_clip_spans_its_actions(dataset):
    clip, action = recorded_clip(dataset, 4, CLOCK)
    assert len(clip.video) == 10 and len(action) == 18
    np.testing.assert_array_equal(clip.video, dataset.canvas(4, np.arange(0, 19, 2)))


def test_states_that_follow_from_the_first_are_the_recorded_ones(dataset):
    episode, (clip, _) = dataset.episode(0), recorded_clip(dataset, 0, CLOCK)
    labels = [Labels(value=episode.action, spread=episode.action)]
    state, known = pseudo_states(ROBOT, [clip], labels, None)[0]
    np.testing.assert_allclose(state, episode.state, atol=1e-3)
    assert known.shape == state.shape and known.all()
    opened = replace(ROBOT.state[0], name="opening", start=2, stop=3)
    light = replace(ROBOT.action[1], moves="opening", sets=(1.0, 0.0))  # what a command does within a step is known too
    robot = replace(ROBOT, state=(*ROBOT.state, opened), action=(ROBOT.action[0], light))
    clip = replace(clip, state=np.array([*clip.state, 1.0], np.float32))
    state, known = pseudo_states(robot, [clip], labels, None)[0]
    np.testing.assert_array_equal(state[1:, 2], (episode.action[:-1, 2] < 0).astype(np.float32))
    assert known.all()


def test_labelled_dreams_are_a_dataset_with_provenance(dataset, tmp_path):
    dreams = dreams_of(dataset, tmp_path / "dreams")
    out = tmp_path / "labels"
    manifest = label(Oracle(dataset), dreams, out=out, robot=ROBOT, batch_size=2, record={})
    assert manifest["results"]["episodes"] == 3 and manifest["results"]["spread"]["move"] == 0.25
    made = Dataset(out, ROBOT)
    for i in range(3):
        episode, source = made.episode(i), dataset.episode(i)
        np.testing.assert_allclose(episode.action, source.action[:16], atol=1e-6)
        np.testing.assert_allclose(episode.state, source.state[:16], atol=1e-2)
        assert episode.meta["source"] == "dream" and episode.meta["prompt"] == f"dream_{i}"
        assert episode.meta["origin"]["seed"] == 40 + i and episode.meta["frame_rows"] == list(range(0, 16, 2))
        np.testing.assert_array_equal(episode.extra["frame_fresh"].ravel(), np.arange(16) % 2 == 0)
        np.testing.assert_allclose(episode.extra["label_spread"], 0.25)
        assert np.all(episode.extra["state_known"] == 1)
        shown = made.canvas(i, [4, 5]).astype(int)
        assert np.abs(shown[0] - shown[1]).mean() < 1.5  # one frame, held for two rows
        assert np.abs(shown[0] - dataset.canvas(i, [4])[0].astype(int)).mean() < 4
    assert label(Oracle(dataset), dreams, out=out, robot=ROBOT, batch_size=2, record={}) == manifest


def test_recordings_are_labelled_as_dreams_are(dataset, tmp_path):
    found = label(Oracle(dataset), dataset.root, out=tmp_path / "l", robot=ROBOT, batch_size=4, record={})
    assert found["results"]["episodes"] == 6 and found["parents"]["recordings"] == fingerprint(dataset.root)
    made = Dataset(tmp_path / "l", ROBOT)
    for i in range(6):
        episode, source = made.episode(i), dataset.episode(i)
        assert episode.instruction == source.instruction and episode.meta["source"] == "recording"
        assert episode.meta["seed"] == 40 + i and episode.meta["origin"] == {
            "seed": 40 + i, "dataset": fingerprint(dataset.root), "episode": i, "row": 0}  # fmt: skip
        np.testing.assert_allclose(episode.action, source.action[:18], atol=1e-6)
        assert np.abs(made.canvas(i, [4])[0].astype(int) - dataset.canvas(i, [4])[0].astype(int)).mean() < 4


def test_a_recording_of_a_robot_has_no_seed(dataset, tmp_path):
    """As none has that no simulator made."""
    real = [replace(dataset.episode(i), video=dataset.views(i), meta={}) for i in range(2)]
    write_dataset(tmp_path / "real", real, ROBOT)
    label(Oracle(dataset), tmp_path / "real", out=tmp_path / "l", robot=ROBOT, record={})
    meta = Dataset(tmp_path / "l", ROBOT).episode(1).meta
    assert "seed" not in meta
    assert meta["origin"] == {"dataset": fingerprint(tmp_path / "real"), "episode": 1, "row": 0}


def test_labels_killed_between_dataset_and_manifest(dataset, tmp_path, monkeypatch):
    dreams = dreams_of(dataset, tmp_path / "dreams")
    (tmp_path / "l" / "data").mkdir(parents=True)
    options = {"out": tmp_path / "l", "robot": ROBOT, "record": {}}
    with pytest.raises(ValueError, match="holds data, which no unfinished run wrote"):
        label(Oracle(dataset), dreams, **options)
    (tmp_path / "l" / "data").rmdir()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Stage, "finish", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        label(Oracle(dataset), dreams, **options)
    assert (tmp_path / "l" / "meta" / "info.json").is_file()
    assert label(Oracle(dataset), dreams, **options)["results"]["episodes"] == len(Dataset(tmp_path / "l", ROBOT)) == 3
    assert not (tmp_path / "l" / ".writing").exists()


def test_label_refuses_unfinished_dreams_and_other_settings(dataset, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        label(Oracle(dataset), tmp_path / "none", out=tmp_path / "l", robot=ROBOT, record={})
    dreams = dreams_of(dataset, tmp_path / "dreams")
    label(Oracle(dataset), dreams, out=tmp_path / "l", robot=ROBOT, record={"rule": "mean"})
    with pytest.raises(ValueError, match="another configuration.*rule"):
        label(Oracle(dataset), dreams, out=tmp_path / "l", robot=ROBOT, record={"rule": "median"})
    (dreams / "manifest.json").unlink()
    with pytest.raises(ValueError, match="unfinished"):
        label(Oracle(dataset), dreams, out=tmp_path / "m", robot=ROBOT, record={})


class Plane:
    """A simulator in which an episode succeeds if the recorded actions are carried out, to 0.1 of each."""

    robot = ROBOT
    instructions = ("move 0", "move 1")

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def reset(self, instruction: str, seed: int) -> None:
        episode = self.dataset.episode(seed - 40)
        self.first, self.wanted, self.at, self.good = episode.state[0], episode.action, 0, True

    def observe(self) -> None:
        raise AssertionError("a replay draws no pictures")

    def state(self) -> np.ndarray:
        return self.first

    def step(self, action: np.ndarray) -> bool:
        if self.at < 16:
            self.good &= bool(np.abs(self.wanted[self.at] - action).max() < 0.1)
        self.at += 1
        return self.good and self.at >= 16

    def expert(self) -> None: ...

    def close(self) -> None: ...


def test_evaluation_of_a_perfect_labeler_is_perfect(dataset, tmp_path):
    stage = pytest.importorskip("dreamgen.stages.evaluate_labels")
    labels = tmp_path / "labels"
    label(Oracle(dataset), dreams_of(dataset, tmp_path / "dreams"), out=labels, robot=ROBOT, record={})
    manifest = stage.evaluate_labels(Oracle(dataset), dataset, lambda: Plane(dataset), out=tmp_path / "scores",
                                     dreams=labels, record={})  # fmt: skip
    found = manifest["results"]
    assert found["idm"]["r2"] == {"move": 1.0, "light": 1.0} and found["idm"]["lag"] == {"move": 0, "light": 0}
    assert found["idm"]["state"]["integrated"]["place"] < 1e-3
    for name, n in (("recorded", 6), ("idm_real", 6), ("idm_dream", 3)):
        assert found["replay"][name]["successes"] == found["replay"][name]["n"] == n
        assert 0 < found["replay"][name]["low"] < found["replay"][name]["high"] <= 1
    assert set(found["replay"]["recorded"]["by_instruction"]) == {"move 0", "move 1"}


@pytest.mark.parametrize(("video_hz", "frames"), [("20", 17), ("10", 9), ("5", 5), ("40/3", 12)])
def test_law_a_perfect_labeler_of_recorded_video_replays_at_every_stride(dataset, tmp_path, video_hz, frames):
    stage = pytest.importorskip("dreamgen.stages.evaluate_labels")
    oracle = Oracle(dataset, Clock(robot_hz="20", video_hz=video_hz, frames=frames))
    done = stage.evaluate_labels(oracle, dataset, lambda: Plane(dataset), out=tmp_path / "scores", record={})
    found = done["results"]
    assert found["idm"]["mae"] == {"move": 0.0, "light": 0.0} and found["idm"]["lag"] == {"move": 0, "light": 0}
    assert found["replay"]["idm_real"]["successes"] == found["replay"]["idm_real"]["n"] == 6


class Darker:
    """A world model whose autoencoder halves the light."""

    def encode(self, video):  # noqa: ANN001, ANN201
        return video // 2

    def decode(self, latents):  # noqa: ANN001, ANN201
        return latents


class Wary(Oracle):
    """Labels what is dark as rest."""

    def label(self, clips: list[Clip]) -> list[Labels]:
        return [Labels(value=label.value * np.float32(clip.video.mean() > 80), spread=label.spread)
                for clip, label in zip(clips, super().label(clips), strict=True)]  # fmt: skip


def test_decoded_and_dreamt_video_and_the_control_without_motion_are_scored(dataset, tmp_path):
    stage = pytest.importorskip("dreamgen.stages.evaluate_labels")
    labels = tmp_path / "labels"
    label(Oracle(dataset), dreams_of(dataset, tmp_path / "dreams"), out=labels, robot=ROBOT, record={})
    found = stage.evaluate_labels(Wary(dataset), dataset, out=tmp_path / "scores", dreams=labels, world_model=Darker(),
                                  decoded_clips=4, record={})["results"]["idm"]  # fmt: skip
    assert found["r2"]["move"] == 1.0 and found["decoded"]["n"] == 4 and found["decoded"]["r2"]["move"] < 0.1
    assert found["dreamt"]["n"] == 3 and found["dreamt"]["r2"] == {"move": 1.0, "light": 1.0}
    assert found["previous_frame"]["linear"]["move"] < 0.9
    assert found["state"]["pseudo_state"]["place"] < 1e-3


def test_labeler_and_world_model_are_placed_and_the_dreams_labeler_is_the_one_that_is_scored(dataset, tmp_path):
    stage, placed = pytest.importorskip("dreamgen.stages.evaluate_labels"), []
    made, other, world = Oracle(dataset), Oracle(dataset), Darker()
    for name, part in (("made", made), ("other", other), ("world", world)):
        part.path, part.place = tmp_path / name, lambda name=name: placed.append(name)
    for part in (made, other):
        part.path.mkdir()
        (part.path / "weights").write_text(part.path.name)
    label(made, dreams_of(dataset, tmp_path / "dreams"), out=tmp_path / "labels", robot=ROBOT, record={})
    assert placed == ["made"]
    with pytest.raises(ValueError, match="labels were labelled by labeler .*other. is scored; label them with it"):
        stage.evaluate_labels(other, dataset, out=tmp_path / "scores", dreams=tmp_path / "labels", record={})
    placed.clear()
    stage.evaluate_labels(made, dataset, out=tmp_path / "scores", dreams=tmp_path / "labels", world_model=world,
                          record={})  # fmt: skip
    assert placed == ["made", "world"]


def test_training_on_few_episodes_remembers_the_world_model_whose_look_it_learned(dataset, tmp_path):
    model, world = pytest.importorskip("idm.model"), Darker()
    world.folder = tmp_path / "world"
    world.folder.mkdir()
    (world.folder / "weights").write_text("seven")
    labeler = model.FlowIDM(robot=ROBOT, clock=CLOCK, frames=2, train_frames=3, width=32, layers=2, heads=2,
                            vision={"channels": [8, 16], "points": 4}, precision="fp32")  # fmt: skip
    manifest = train_labeler(labeler, dataset, out=tmp_path / "labeler", steps=1, batch_size=2, episodes=2,
                             world_model=world, degraded_clips=2, precision="fp32", record={})  # fmt: skip
    assert manifest["parents"]["world_model"] == fingerprint(world.folder)
    assert manifest["results"]["episodes"] == 2 and manifest["results"]["held_out"] == 1


def test_dreams_may_be_longer_than_all_recordings(dataset, tmp_path):
    """What is drawn again is then as long as these, and as many clips as were asked for."""
    model, world, shown = pytest.importorskip("idm.model"), Darker(), []
    world.encode = lambda video: [video, shown.extend([video.shape[1]] * len(video))][0]
    labeler = model.FlowIDM(robot=ROBOT, clock=CLOCK.with_frames(81), frames=2, train_frames=3, width=32, layers=2,
                            heads=2, vision={"channels": [8, 16], "points": 4}, precision="fp32")  # fmt: skip
    train_labeler(labeler, dataset, out=tmp_path / "labeler", steps=1, batch_size=2, world_model=world,
                  degraded_clips=4, precision="fp32", record={})  # fmt: skip
    assert shown == [max(CLOCK.frames_in(dataset.length(i)) for i in range(len(dataset)))] * 4


def test_training_killed_and_continued_saves_the_same_labeler(dataset, tmp_path, monkeypatch):
    model = pytest.importorskip("idm.model")

    def make() -> object:
        return model.FlowIDM(robot=ROBOT, clock=CLOCK, frames=3, train_frames=4, width=32, layers=2, heads=2,
                             vision={"channels": [8, 16, 16], "points": 8}, precision="fp32")  # fmt: skip

    options = {"steps": 4, "batch_size": 2, "warmup": 1, "checkpoint_every": 2, "log_every": 1, "precision": "fp32",
               "seed": 3, "record": {}}  # fmt: skip
    whole = train_labeler(make(), dataset, out=tmp_path / "whole", **options)
    killed, loss = make(), model.FlowIDM.loss

    def dies(self, batch):  # noqa: ANN001, ANN202
        dies.count += 1
        if dies.count == 4:
            raise KeyboardInterrupt
        return loss(self, batch)

    dies.count = 0
    monkeypatch.setattr(model.FlowIDM, "loss", dies)
    with pytest.raises(KeyboardInterrupt):
        train_labeler(killed, dataset, out=tmp_path / "killed", **options)
    monkeypatch.setattr(model.FlowIDM, "loss", loss)
    again = train_labeler(make(), dataset, out=tmp_path / "killed", **options)
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "killed/model.safetensors").read_bytes()
    assert whole["results"]["held_out_scores"] == again["results"]["held_out_scores"]
    assert not (tmp_path / "killed/training").exists() and whole["results"]["episodes"] == 5
