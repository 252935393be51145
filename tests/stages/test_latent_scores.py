"""Probes against closed forms, and the evaluation of latents whose truth is known."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dreamgen.core.clip import Clip, Episode, Labels
from dreamgen.core.clock import Clock
from dreamgen.data.lerobot import Dataset
from dreamgen.data.writer import write_dataset
from dreamgen.stages.evaluate_latents import evaluate_latents, feature_differences
from dreamgen.stages.label import label
from dreamgen.stages.latent_scores import (
    PENALTIES,
    Split,
    by_gap,
    codebook_usage,
    few_probe,
    in_context,
    label_efficiency,
    linear_probe,
    mlp_probe,
    probe,
    ridge,
    shuffled,
    split,
)
from dreamgen.stages.train_labeler import train_labeler
from tests.data.video_only import strip

sys.path.insert(0, str(Path(__file__).parents[1] / "idm"))
from moving_square import CLOCK, ROBOT, Squares  # noqa: E402


def test_actions_of_a_gap_are_the_mean_of_its_steps():
    clock = Clock(robot_hz="3", video_hz="2", frames=4)  # gaps of 1, 2 and 1 steps
    action = np.array([[1.0], [2.0], [6.0], [5.0]])
    assert clock.gaps() == [(0, 1), (1, 3), (3, 4)]
    assert by_gap(action, clock).tolist() == [[1.0], [4.0], [5.0]]


def test_context_is_the_neighbours():
    assert in_context(np.array([[1], [2], [3]])).tolist() == [[1, 1, 2], [1, 2, 3], [2, 3, 3]]


def test_ridge_is_the_closed_form_in_both_shapes():
    rng = np.random.default_rng(0)
    for n, d in ((30, 4), (5, 11)):
        x, y = rng.normal(size=(n, d)), rng.normal(size=(n, 2))
        w, o = ridge(x, y, 0.7)
        xc, yc = x - x.mean(0), y - y.mean(0)
        np.testing.assert_allclose(w, np.linalg.solve(xc.T @ xc + 0.7 * np.eye(d), xc.T @ yc), atol=1e-9)
        np.testing.assert_allclose((y - x @ w - o).mean(0), 0, atol=1e-9)


def test_a_probe_of_few_rows_chooses_its_penalty_by_leaving_each_out():
    rng = np.random.default_rng(2)
    for n, d in ((9, 4), (7, 20)):
        x, y, test = rng.normal(size=(n, d)), rng.normal(size=(n, 2)), rng.normal(size=(3, d))
        x[:, 0] += y[:, 0]
        size = x.std(0)
        errors = []
        for penalty in PENALTIES:
            left = []
            for i in range(n):
                w, o = ridge(np.delete(x, i, 0) / size, np.delete(y, i, 0), penalty)
                left.append((x[i] / size @ w + o - y[i]) ** 2)
            errors.append(sum(left))
        best = np.argmin(errors, axis=0)  # for each entry its own
        assert best[0] != best[1]
        for entry, penalty in enumerate(PENALTIES[best]):
            w, o = ridge(x / size, y[:, entry : entry + 1], penalty)
            np.testing.assert_allclose(few_probe(x, y, test)[:, entry], (test / size @ w + o)[:, 0], atol=1e-8)


def test_probes_do_not_depend_on_the_units_of_what_they_foretell():
    """A part in other units, from another zero: the same R2 of it and of the part beside it."""
    rng = np.random.default_rng(1)
    features = [rng.normal(size=(n, 5)) for n in (40, 31, 37, 25, 50, 22, 49, 28)]
    mix = rng.normal(size=(5, 3))
    actions = [np.concatenate([f @ mix[:, :2] + 0.1 * rng.normal(size=(len(f), 2)), f @ mix[:, 2:] > 0], 1)
               for f in features]  # fmt: skip
    found = []
    for scale, zero in ((1, 0), (0.01, 0.3), (100, -40)):
        turned = [a * (scale, scale, 1) + (zero, zero, 0) for a in actions]
        kinds = {kind: scores for kind, scores in probe(features, turned, ROBOT, 0).items() if kind != "width"}
        few = label_efficiency(features, turned, ROBOT, 0, pairs=(20, 150), draws=2)
        kinds |= {count: {name: score["mean"] for name, score in parts.items()} for count, parts in few.items()}
        found.append([kinds[kind][name] for kind in sorted(kinds) for name in ("move", "light")])
    assert min(found[0][::2]) > 0.9  # of `move`
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-3)


def test_a_target_that_never_changes_in_training_is_its_mean():
    rng = np.random.default_rng(3)
    x = Split(*(rng.normal(size=(n, 4)) for n in (30, 8, 9)))
    y = Split(*(np.full((len(rows), 2), (7.0, -3.0)) for rows in x))
    np.testing.assert_allclose(linear_probe(x, y), y.test, atol=1e-6)
    np.testing.assert_allclose(mlp_probe(x, y, 0), y.test, atol=0.5)
    np.testing.assert_allclose(few_probe(x.train, y.train, x.test), y.test, atol=1e-6)


def test_probes_find_what_is_there_and_nothing_elsewhere():
    rng = np.random.default_rng(1)
    features = [rng.normal(size=(n, 5)) for n in (20, 31, 17, 25, 30, 22, 19, 28)]
    mix = rng.normal(size=(5, 3))
    actions = [np.concatenate([f @ mix[:, :2], np.tanh(f[:, :1] * f[:, 1:2])], 1) for f in features]
    found = probe(features, actions, ROBOT, 0)
    assert found["linear"]["move"] > 0.99 and found["linear"]["light"] < 0.2 < found["mlp"]["light"]
    assert probe(shuffled(features, 0), actions, ROBOT, 0)["linear"]["move"] < 0.1
    curve = label_efficiency(features, actions, ROBOT, 0, pairs=(4, 100, 1000))
    assert set(curve) == {"4", "100"} and curve["4"]["move"]["mean"] < curve["100"]["move"]["mean"] > 0.99
    x = split([in_context(f) for f in features], 0)
    assert linear_probe(x, split(actions, 0)).shape == (len(x.test), 3)
    with pytest.raises(ValueError, match="probes need at least 4"):
        split(features[:3], 0)


def test_codebook_usage():
    found = codebook_usage([np.array([[0, 1], [1, 1]]), np.array([[0, 1], [1, 1]])], 4)
    np.testing.assert_allclose(found["perplexity"], [2, 1])
    assert found["used"] == 0.5 and found["combinations"] == 2 and found["shares"][0] == [0.5, 0.5, 0, 0]


class Knowing:
    """Latents that are the recorded mean actions, turned; carries a donor's pictures over."""

    source, robot, clock, path, labelled, config = ROBOT, ROBOT, CLOCK, None, 0.5, {"codebook": 3}
    turn = np.random.default_rng(0).normal(size=(3, 5))

    def __init__(self, dataset: Dataset) -> None:
        self.dataset, self.seen = dataset, {}

    def true(self, clip: Clip) -> np.ndarray:
        return self.dataset.episode(int(clip.id.split("_")[1])).action[: CLOCK.with_frames(len(clip.video)).steps]

    def gaps(self, clips: list[Clip]) -> list[dict]:
        found = []
        for clip in clips:
            action = self.true(clip)
            latent = by_gap(action, CLOCK.with_frames(len(clip.video))) @ self.turn
            self.seen[latent.tobytes()] = clip.video
            change = np.ones(len(latent))
            found.append({"latent": latent, "action": action.reshape(-1, 2, 3), "left": change / 4, "change": change,
                          "codes": np.zeros((len(latent), 2))})  # fmt: skip
        return found

    def carry_over(self, frame: np.ndarray, latent: np.ndarray) -> np.ndarray:
        return self.seen[latent.tobytes()]


class Reader(Knowing):
    """Inverse dynamics that knows each recording by its pictures."""

    def label(self, clips: list[Clip]) -> list[Labels]:
        known = {self.dataset.canvas(i, np.arange(0, 19, 2)).tobytes(): i for i in range(len(self.dataset))}
        actions = [self.dataset.episode(known[clip.video.tobytes()]).action[:18] for clip in clips]
        return [Labels(value=a, spread=np.zeros_like(a)) for a in actions]


class Light:
    """A world model whose latents of a clip are the mean colour of each frame, on one cell."""

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        assert video.shape[1] == 1  # each frame by itself
        return video.double().mean((2, 3)).movedim(2, 1)[..., None, None]


def test_differences_of_features_are_of_neighbouring_frames():
    video = np.random.default_rng(0).integers(0, 255, (5, 4, 6, 3)).astype(np.uint8)
    found = feature_differences(Clip(id="c", video=video, video_hz="10", instruction="move"), Light())
    np.testing.assert_allclose(found, np.diff(video.reshape(5, -1, 3).mean(1), axis=0), atol=1e-4)


class Fine:
    """Latents of 2 channels on a grid of 30 x 52, as of pictures of 480 x 832."""

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        return torch.arange(30 * 52.0).view(30, 52) * video[:, None, :, :1, :1, 0].float() * torch.ones(1, 2, 1, 1, 1)


def test_fine_grids_of_features_are_averaged_to_eight_cells_a_side():
    video = np.array([3, 5, 4], np.uint8)[:, None, None, None].repeat(3, 3)
    found = feature_differences(Clip(id="c", video=video, video_hz="10", instruction="move"), Fine())
    assert found.shape == (2, 2 * 8 * 8)
    rows = np.arange(30 * 52.0).reshape(30, 52)
    corner = rows[:4, :7].mean()  # 30 / 8 and 52 / 8, rounded up
    np.testing.assert_allclose(found[:, 0], [2 * corner, -corner])
    np.testing.assert_allclose(found[0].reshape(2, 64).mean(1), 2 * rows.mean(), rtol=1e-2)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("squares") / "data"
    write_dataset(root, [Episode(instruction="move", state=e.state, action=e.action, video=e.video)
                         for e in Squares(8, rows=19, seed=3).episodes], ROBOT)  # fmt: skip
    return root


def test_video_without_actions_gets_latents_and_labels(data, tmp_path):
    from idm.latent.model import LatentActions
    from idm.model import FlowIDM

    video = Dataset(strip(data, tmp_path / "video"), ROBOT, actions=False)
    sizes = {"width": 32, "heads": 2, "layers": 1}
    options = {"steps": 2, "batch_size": 2, "precision": "fp32", "record": {}}
    latent = LatentActions(robot=ROBOT, clock=CLOCK, frames=3, latent=6, decoder_layers=1, labelled=0.0, **sizes)
    done = train_labeler(latent, video, out=tmp_path / "latent", **options)
    assert np.isfinite(done["results"]["held_out_scores"]["change"]["left"])
    labeler = LatentActions.load(tmp_path / "latent")
    for name, one in (("latents", labeler), ("labels", Reader(Dataset(data, ROBOT)))):
        label(one, video.root, out=tmp_path / name, robot=ROBOT, record={})
        made = Dataset(tmp_path / name, one.robot)
        assert len(made) == 8 and np.isfinite(made.actions()).all()
        assert (made.episode(3).extra["state_known"] == 0).all()  # no state to begin with
    np.testing.assert_allclose(made.episode(3).action, Dataset(data, ROBOT).episode(3).action[:18], atol=1e-6)
    with pytest.raises(ValueError, match="stage.dataset of a labeler of actions reads actions"):
        idm = FlowIDM(robot=ROBOT, clock=CLOCK, frames=2, vision={"channels": [8, 16], "points": 2}, **sizes)
        train_labeler(idm, video, out=tmp_path / "idm", **options)
    with pytest.raises(ValueError, match="set labeler.labelled=0"):
        told = LatentActions(robot=ROBOT, clock=CLOCK, frames=3, **sizes)
        train_labeler(told, video, out=tmp_path / "told", **options)
    with pytest.raises(ValueError, match="stage.dataset reads actions"):
        evaluate_latents(labeler, video, out=tmp_path / "scores", record={})


def test_evaluation_of_latents_that_are_the_actions(data, tmp_path):
    dataset = Dataset(data, ROBOT)
    manifest = evaluate_latents(Knowing(dataset), dataset, out=tmp_path / "scores", idm=Reader(dataset),
                                world_model=Light(), pairs=(10, 30, 99), record={})  # fmt: skip
    found = json.loads((tmp_path / "scores" / "latents.json").read_text())
    assert found["probe"]["latent"]["linear"]["move"] > 0.99 and found["probe"]["shuffled"]["linear"]["move"] < 0.5
    assert found["probe"]["idm"]["linear"] == {"move": 1.0, "light": 1.0} == found["head"]
    assert set(found["probe"]) == {"latent", "pixels", "state", "features", "shuffled", "idm"}
    assert found["swap"]["donor"]["move"] == 1.0 and found["swap"]["own"]["move"] < 0.9
    assert found["change"] == 0.25 and found["codes"]["used"] == pytest.approx(1 / 3)
    assert found["pairs"] == {"there": 45, "skipped": [99]}
    assert set(found["efficiency"]) == {"latent", "pixels", "features"}
    assert set(found["efficiency"]["latent"]) == {"10", "30"} and manifest["results"]["episodes"] == 8
    assert (tmp_path / "scores" / "swap.png").read_bytes()[:4] == b"\x89PNG"
