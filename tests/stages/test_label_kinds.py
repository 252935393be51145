"""The label stages with every kind of labeler and of robot: more views, latent actions, no state, unread states."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dreamgen.core.clip import Clip, Episode
from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment, View
from dreamgen.core.manifest import Stage
from dreamgen.data.clips import ClipFolder
from dreamgen.data.lerobot import Dataset
from dreamgen.data.writer import write_dataset
from dreamgen.stages.evaluate_labels import evaluate_labels
from dreamgen.stages.label import label, pseudo_states
from dreamgen.stages.train_labeler import frames_through, train_labeler
from dreamgen.worlds.prefix import PrefixWorld
from idm.latent.model import LatentActions
from idm.model import FlowIDM

sys.path.insert(0, str(Path(__file__).parents[1] / "idm"))
from moving_square import CLOCK, ROBOT, Squares  # noqa: E402

ROWS = 19


def recorded(root: Path, robot: Embodiment) -> Dataset:
    """Six recorded episodes; a second view is the first one upside down, a robot without state leaves it out."""

    def views(video: np.ndarray) -> dict:
        return {view.name: video if k == 0 else video[:, ::-1] for k, view in enumerate(robot.views)}

    episodes = [Episode(instruction="move", state=e.state[:, : robot.state_dim], action=e.action,
                        video=views(e.video["top"]), meta={"seed": 40 + i})
                for i, e in enumerate(Squares(6, rows=ROWS, seed=3).episodes)]  # fmt: skip
    write_dataset(root, episodes, robot)
    return Dataset(root, robot)


def dreams_of(dataset: Dataset, out: Path) -> Path:
    """Two recordings in the place of dreams."""
    with Stage(out, "dream", config={}) as run:
        for i in range(2):
            ClipFolder(out / "clips").write(Clip(id=f"dream_{i}", video=dataset.canvas(i, CLOCK.rows), video_hz="10",
                                                 instruction="move", state=dataset.episode(i).state[0]))  # fmt: skip
        run.finish(clips=2)
    return out


def flow(robot: Embodiment, **changes) -> FlowIDM:
    options = {"clock": CLOCK, "frames": 2, "train_frames": 3, "width": 32, "layers": 2, "heads": 2,
               "vision": {"channels": [8, 16], "points": 4}, "precision": "fp32"} | changes  # fmt: skip
    return FlowIDM(robot=robot, **options)


def trained(labeler, dataset: Dataset, out: Path, **options) -> dict:  # noqa: ANN001
    return train_labeler(labeler, dataset, out=out, steps=2, batch_size=2, precision="fp32", record={}, **options)


def test_a_robot_of_two_views_is_labelled_and_its_views_come_apart_again(tmp_path):
    low = View(name="low", key="observation.images.low", height=32, width=48)
    robot = replace(ROBOT, views=(*ROBOT.views, low), grid=())
    dataset = recorded(tmp_path / "data", robot)
    trained(flow(robot), dataset, tmp_path / "labeler")
    dreams = dreams_of(dataset, tmp_path / "dreams")
    label(FlowIDM.load(tmp_path / "labeler", robot), dreams, out=tmp_path / "labels", robot=robot, record={})
    made = Dataset(tmp_path / "labels", robot)
    assert made.episode(0).action.shape == (16, 3) and np.isfinite(made.episode(0).action).all()
    shown, true = made.views(1, [4]), dataset.views(1, [4])
    for name, other in (("top", "low"), ("low", "top")):
        apart = [np.abs(shown[name].astype(int) - true[key].astype(int)).mean() for key in (name, other)]
        assert apart[0] < 1 < apart[1], apart


@pytest.mark.parametrize("output", ["latent", "actions"])
def test_latent_actions_are_written_as_both_of_their_outputs(tmp_path, output):
    dataset = recorded(tmp_path / "data", ROBOT)
    model = LatentActions(robot=ROBOT, clock=CLOCK, frames=4, latent=6, width=32, layers=1, decoder_layers=1, heads=2,
                          labelled=0.5, precision="fp32")  # fmt: skip
    trained(model, dataset, tmp_path / "latent")
    labeler = LatentActions.load(tmp_path / "latent", ROBOT, output=output)
    dreams = dreams_of(dataset, tmp_path / "dreams")
    label(labeler, dreams, out=tmp_path / "labels", robot=ROBOT, record={})
    made = Dataset(tmp_path / "labels", labeler.robot)
    episode, known = made.episode(1), made.episode(1).extra["state_known"]
    np.testing.assert_allclose(episode.state[0], dataset.episode(1).state[0])
    assert known[0].all()
    if output == "latent":  # an embodiment of its own, whose latents move nothing that is known
        assert made.robot.name == "square_latent" and episode.action.shape == (16, 6) and not known[1:].any()
        np.testing.assert_array_equal(episode.action[::2], episode.action[1::2])
    else:
        moved = episode.state[0] + 2 * episode.action[:-1, :2].cumsum(0)
        np.testing.assert_allclose(episode.state[1:], moved, atol=1e-3)
        assert episode.action.shape == (16, 3) and known.all()


def test_a_robot_without_state_is_labelled(tmp_path):
    robot = replace(ROBOT, state=(), action=tuple(replace(part, moves=None) for part in ROBOT.action))
    dataset = recorded(tmp_path / "data", robot)
    trained(flow(robot), dataset, tmp_path / "labeler")
    labeler, dreams = FlowIDM.load(tmp_path / "labeler", robot), dreams_of(dataset, tmp_path / "dreams")
    label(labeler, dreams, out=tmp_path / "labels", robot=robot, record={})
    episode = Dataset(tmp_path / "labels", robot).episode(0)
    assert episode.action.shape == (16, 3) and episode.state.shape == (16, 0) and "state_known" not in episode.extra
    assert evaluate_labels(labeler, dataset, out=tmp_path / "scores", record={})["results"]["idm"]["state"] == {}


def test_states_that_nobody_taught_a_labeler_to_read_are_not_written_as_known(tmp_path):
    dataset = recorded(tmp_path / "data", ROBOT)
    labeler = flow(ROBOT, state_weight=0.0)
    trained(labeler, dataset, tmp_path / "labeler")
    clip = Clip(id="d", video=dataset.canvas(0, CLOCK.rows), video_hz="10", instruction="")
    labels, read = labeler.labels_and_states([clip])
    state, known = pseudo_states(ROBOT, [clip], labels, read)[0]
    assert not state.any() and not known.any() and state.shape == (16, 2)
    first = dataset.episode(0).state[0]
    state, _ = pseudo_states(ROBOT, [replace(clip, state=first)], labels, read)[0]
    np.testing.assert_allclose(state[1:], first + 2 * labels[0].value[:-1, :2].cumsum(0), atol=1e-3)
    errors = evaluate_labels(labeler, dataset, out=tmp_path / "scores", record={})["results"]["idm"]["state"]
    assert set(errors) == {"integrated", "pseudo_state"}


def test_a_world_model_takes_more_frames_than_a_labeler_of_few_asks_for(tmp_path):
    """Three frames at 5 Hz, as the published setting has three: the autoencoder reads 1 + a multiple of 4."""
    dataset, world = recorded(tmp_path / "data", ROBOT), PrefixWorld(robot=ROBOT, path="tiny", frames=17, steps=2)
    assert [frames_through(world, n) for n in (2, 3, 5, 6, 17)] == [5, 5, 5, 9, 17]
    assert frames_through(object(), 3) == 3
    labeler = flow(ROBOT, clock=Clock(robot_hz="20", video_hz="5", frames=3), train_frames=2)
    trained(labeler, dataset, tmp_path / "labeler", world_model=world, degraded=1.0, degraded_clips=2,
            redream_up_to=1.0)  # fmt: skip
    found = evaluate_labels(labeler, dataset, out=tmp_path / "scores", world_model=world, record={})["results"]
    assert found["idm"]["decoded"]["n"] == 6
