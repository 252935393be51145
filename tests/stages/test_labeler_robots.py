"""One labeler of two robots through the stages: trained together, scored, labelled and begun with, each by its own."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dreamgen.core.clip import Clip, Episode
from dreamgen.core.clock import Clock
from dreamgen.core.manifest import Stage, fingerprint
from dreamgen.data.clips import ClipFolder
from dreamgen.data.lerobot import Dataset
from dreamgen.data.writer import write_dataset
from dreamgen.stages.evaluate_labels import evaluate_labels
from dreamgen.stages.label import label
from dreamgen.stages.train_labeler import train_labeler
from idm.latent.model import LatentActions
from idm.model import FlowIDM

sys.path.insert(0, str(Path(__file__).parents[1] / "idm"))
from two_squares import OTHER, SMALL, VIDEO, Others, Small  # noqa: E402

OPTIONS = {"steps": 5, "batch_size": 2, "warmup": 1, "checkpoint_every": 2, "log_every": 1, "precision": "fp32",
           "seed": 3, "own_share": 0.5, "record": {}}  # fmt: skip


def recorded(root: Path, world: Small) -> Dataset:
    episodes = [replace(world.episode(i), instruction="move", meta={"seed": i}) for i in range(len(world))]
    write_dataset(root, episodes, world.robot)
    return Dataset(root, world.robot)


def make(robot=SMALL, **changes) -> FlowIDM:  # noqa: ANN001
    options = {"clock": VIDEO, "frames": 3, "train_frames": 4, "width": 32, "layers": 2, "heads": 2,
               "vision": {"channels": [8, 16], "points": 4}, "precision": "fp32"} | changes  # fmt: skip
    return FlowIDM(robot=robot, **options)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Dataset]:
    root = tmp_path_factory.mktemp("data")
    return {"own": recorded(root / "own", Small(5, seed=1)), "one": recorded(root / "one", Others(4, seed=2)),
            "two": recorded(root / "two", Others(3, seed=3))}  # fmt: skip


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("trained") / "labeler"
    done = train_labeler(make(), data["own"], others={"a": data["one"], "b": data["two"]}, out=out, validate_every=5,
                         **OPTIONS)  # fmt: skip
    return out, done


def test_each_robot_is_scored_on_episodes_of_its_own(data, trained):
    out, done = trained
    found = done["results"]
    assert (
        found["episodes"] == 4 and found["held_out"] == 1 and set(found["held_out_scores"]["r2"]) == {"move", "light"}
    )
    other = found["others"].pop("other")
    assert not found["others"] and other["episodes"] == 6 and other["held_out"] == 1 and other["too_short"] == 0
    assert set(other["held_out_scores"]["r2"]) == {"dark", "pull", "aim"}
    assert set(other["calibration"]) == {"sigma_action_dark", "sigma_action_pull", "sigma_action_aim",
                                         "sigma_state_place"}  # fmt: skip
    assert done["parents"] == {"dataset": fingerprint(data["own"].root), "other_a": fingerprint(data["one"].root),
                               "other_b": fingerprint(data["two"].root)}  # fmt: skip
    rows = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    assert {key for key in rows[-1] if "val_" in key and "r2" in key} == {
        "val_r2_move", "val_r2_light", "val_other_r2_dark", "val_other_r2_pull", "val_other_r2_aim"}  # fmt: skip
    model = FlowIDM.load(out, OTHER)
    apart = [e.action for e in Others(4, seed=2).episodes] + [e.action for e in Others(3, seed=3).episodes]
    scales = [np.concatenate(apart[:k] + apart[k + 1 :]).std(0)[1:] for k in range(7)]  # one is held out
    assert any(np.allclose(model.head.action.scale.numpy()[1:], scale, rtol=1e-4) for scale in scales)


def test_training_of_several_robots_killed_and_continued_saves_the_same(data, trained, tmp_path, monkeypatch):
    loss, calls = FlowIDM.loss, []

    def dies(self, batch):  # noqa: ANN001, ANN202
        calls.append(batch["robot"])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(FlowIDM, "loss", dies)
        with pytest.raises(KeyboardInterrupt):
            train_labeler(make(), data["own"], others={"a": data["one"], "b": data["two"]}, out=tmp_path / "killed",
                          validate_every=5, **OPTIONS)  # fmt: skip
    assert set(calls) == {"square", "other"}
    train_labeler(make(), data["own"], others={"a": data["one"], "b": data["two"]}, out=tmp_path / "killed",
                  validate_every=5, **OPTIONS)  # fmt: skip
    for file in ("model.safetensors", "config.json", "contract.json", "others.json"):
        assert (tmp_path / "killed" / file).read_bytes() == (trained[0] / file).read_bytes()


class Shown:
    """A world model that draws all as it is, and tells what passed."""

    clip_tokens, clock = 30, Clock(robot_hz="20", video_hz="10", frames=2)

    def __init__(self) -> None:
        self.passed: list[np.ndarray] = []

    def encode(self, frames):  # noqa: ANN001, ANN201
        self.passed += list(frames.numpy())
        return frames

    def decode(self, latents):  # noqa: ANN001, ANN201
        return latents


def test_clips_of_other_robots_pass_the_autoencoder_alone(data, tmp_path, monkeypatch):
    """A world model dreams the robot that it knows; what its autoencoder does to pictures holds for all."""
    world, again = Shown(), []
    monkeypatch.setattr("dreamgen.stages.drawn.redream", lambda _, v, *a, **o: again.extend(v.numpy()) or v)
    options = OPTIONS | {"steps": 2, "degraded_clips": 3, "redream_up_to": 0.9}
    train_labeler(make(), data["own"], others={"a": data["one"]}, world_model=world, out=tmp_path, **options)
    assert len(world.passed) == len(again) == 3 and not (tmp_path / "drawn").exists()
    for clips, name, count in ((again, "own", 5), (world.passed, "one", 4)):
        whole = [data[name].canvas(i, np.arange(21)) for i in range(count)]
        assert all(any(clip[0].tobytes() in episode.tobytes() for episode in whole) for clip in clips), name


def test_dreams_of_the_other_robot_are_labelled_as_its_actions(data, trained, tmp_path):
    with Stage(tmp_path / "dreams", "dream", config={}) as run:
        for i in range(2):
            video = data["one"].canvas(i, np.arange(9))
            ClipFolder(tmp_path / "dreams/clips").write(Clip(id=f"d{i}", video=video, video_hz="10", instruction="move",
                                                             state=data["one"].first_state(i)))  # fmt: skip
        run.finish(clips=2)
    labeler = FlowIDM.load(trained[0], OTHER)
    label(labeler, tmp_path / "dreams", out=tmp_path / "labels", robot=OTHER, record={})
    made = Dataset(tmp_path / "labels", OTHER)
    assert made.episode(0).action.shape == (8, 4)
    assert made.episode(0).meta["labeler"] == fingerprint(trained[0])
    scores = evaluate_labels(labeler, data["two"], out=tmp_path / "scores", dreams=tmp_path / "labels", record={})
    assert set(scores["results"]["idm"]["r2"]) == {"dark", "pull", "aim"}
    with pytest.raises(ValueError, match="the dreams' robot was made for another robot"):
        label(FlowIDM.load(trained[0]), tmp_path / "dreams", out=tmp_path / "no", robot=OTHER, record={})


def test_a_new_robot_begins_with_a_labeler_of_others(data, trained, tmp_path):
    third = replace(OTHER, name="third")
    episodes = [data["one"].episode(i) for i in range(3)]
    write_dataset(tmp_path / "third", [Episode(instruction="move", state=e.state, action=e.action, video={
        "front": data["one"].canvas(i, np.arange(21))}) for i, e in enumerate(episodes)], third)  # fmt: skip
    options = OPTIONS | {"steps": 1, "own_share": None, "lr": 0.0, "ema": None, "start": trained[0]}
    labeler = make(third, clock=replace(VIDEO, robot_hz="10", video_hz="10"), seed=5)
    done = train_labeler(labeler, Dataset(tmp_path / "third", third), out=tmp_path / "labeler", **options)
    assert done["parents"]["start"] == fingerprint(trained[0]) and "others" not in done["results"]
    made, began = FlowIDM.load(tmp_path / "labeler", third).state_dict(), FlowIDM.load(trained[0]).state_dict()
    shared = [name for name in made if not name.startswith("heads.")]
    assert shared and all((made[name] == began[name][: len(made[name])]).all() for name in shared)
    assert (made["heads.third.decoder.weight"] != began["heads.other.decoder.weight"]).any()
    wide = make(third, clock=replace(VIDEO, robot_hz="10", video_hz="10"), width=48)
    with pytest.raises(ValueError, match="is no beginning for this one .width: 32 -> 48"):
        train_labeler(wide, Dataset(tmp_path / "third", third), out=tmp_path / "wide", **options)


def test_robots_that_cannot_learn_together_are_refused(data, tmp_path):
    def attempt(what: str, labeler: object = None, **options) -> None:
        with pytest.raises(ValueError, match=what):
            train_labeler(labeler or make(), data["own"], out=tmp_path / "no", **{**OPTIONS, **options})

    attempt("own_share is 0.5, and there are no other robots")
    attempt("a robot 'square' already.*stage.more", others={"again": data["own"]})
    attempt("own_share is 1.5; expected a share", others={"a": data["one"]}, own_share=1.5)
    latent = LatentActions(robot=SMALL, clock=VIDEO, frames=4, latent=4, width=32, layers=1, decoder_layers=1, heads=2,
                           labelled=0.5, precision="fp32")  # fmt: skip
    attempt("a LatentActions learns from one robot; set stage.others={}", latent, others={"a": data["one"]})
    attempt("a LatentActions cannot begin with another; set stage.start=null", latent, own_share=None, start=tmp_path)
    attempt("'front' is listed|config.json is missing", own_share=None, start=data["one"].root)
    seen = Dataset(data["one"].root, OTHER, actions=False)
    attempt("stage.others.a of a labeler of actions reads actions", others={"a": seen})
    hidden = Dataset(data["one"].root, OTHER)
    hidden.robot = replace(OTHER, views=(replace(OTHER.views[0], width=48),))
    attempt("canvas of robot 'other' is .16, 48.", others={"a": hidden})
