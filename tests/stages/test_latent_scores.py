"""Probes against closed forms, and the evaluation of latents whose truth is known."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from dreamgen.core.clip import Clip, Episode, Labels
from dreamgen.core.clock import Clock
from dreamgen.data.lerobot import Dataset
from dreamgen.data.writer import write_dataset
from dreamgen.stages.evaluate_latents import evaluate_latents
from dreamgen.stages.latent_scores import (
    by_gap,
    codebook_usage,
    in_context,
    label_efficiency,
    linear_probe,
    probe,
    ridge,
    shuffled,
    split,
)

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


def test_evaluation_of_latents_that_are_the_actions(tmp_path):
    squares = Squares(8, rows=19, seed=3)
    write_dataset(tmp_path / "data", [Episode(instruction="move", state=e.state, action=e.action, video=e.video)
                                      for e in squares.episodes], ROBOT)  # fmt: skip
    dataset = Dataset(tmp_path / "data", ROBOT)
    manifest = evaluate_latents(Knowing(dataset), dataset, out=tmp_path / "scores", idm=Reader(dataset), pairs=(10, 30),
                                record={})  # fmt: skip
    found = json.loads((tmp_path / "scores" / "latents.json").read_text())
    assert found["probe"]["latent"]["linear"]["move"] > 0.99 and found["probe"]["shuffled"]["linear"]["move"] < 0.5
    assert found["probe"]["idm"]["linear"] == {"move": 1.0, "light": 1.0} == found["head"]
    assert set(found["probe"]) == {"latent", "pixels", "state", "shuffled", "idm"}
    assert found["swap"]["donor"]["move"] == 1.0 and found["swap"]["own"]["move"] < 0.9
    assert found["change"] == 0.25 and found["codes"]["used"] == pytest.approx(1 / 3)
    assert set(found["efficiency"]["latent"]) == {"10", "30"} and manifest["results"]["episodes"] == 8
    assert (tmp_path / "scores" / "swap.png").read_bytes()[:4] == b"\x89PNG"
