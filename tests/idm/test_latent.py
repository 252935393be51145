"""Latent actions: causality, bottlenecks, the labeler's promises, and scores against closed forms."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from moving_square import CLOCK, ROBOT, Squares, clip_of

from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import View
from dreamgen.core.protocols import Labeler
from dreamgen.engine.train import train
from idm.clips import pictures
from idm.latent.bottleneck import Continuous, Quantised
from idm.latent.model import LatentActions
from idm.latent.target import Features, Pixels
from idm.latent.transformer import Layer
from idm.model import FlowIDM


def small(**changes) -> LatentActions:
    options = {"robot": ROBOT, "clock": CLOCK, "frames": 4, "latent": 6, "width": 32, "layers": 1, "decoder_layers": 1,
               "heads": 2, "labelled": 0.5, "precision": "fp32", "label_batch": 2} | changes  # fmt: skip
    return LatentActions(**options)


@pytest.fixture(scope="module")
def squares() -> Squares:
    return Squares(5)


def test_time_is_causal_local_and_the_same_everywhere():
    torch.manual_seed(0)
    layer = Layer(24, 3, reach=2).eval()
    torch.nn.init.normal_(layer.distance)
    x = torch.randn(2, 7, 5, 24)
    y = x.clone()
    y[:, 3] += torch.randn(2, 5, 24)
    changed = (layer(x) - layer(y)).abs().amax((0, 2, 3)) > 1e-6
    assert changed.tolist() == [False, False, False, True, True, True, False]
    torch.testing.assert_close(layer(x[:, 2:])[:, 2:], layer(x)[:, 4:], atol=1e-5, rtol=1e-5)


def test_a_latent_sees_no_later_frame_and_is_that_of_any_cut(squares):
    model = small(reach=1).eval()
    clip = clip_of(squares, 0)
    (whole,) = model.gaps([clip])
    later = replace(clip, video=np.concatenate([clip.video[:5], 255 - clip.video[5:]]))
    np.testing.assert_allclose(model.gaps([later])[0]["latent"][:4], whole["latent"][:4], atol=1e-5)
    cut = replace(clip, video=clip.video[3:])
    np.testing.assert_allclose(model.gaps([cut])[0]["latent"][1:], whole["latent"][4:], atol=1e-5)


def test_kl_in_closed_form():
    torch.manual_seed(0)
    layer = Continuous(8, 3, beta=0.5).eval()
    passed = layer(torch.randn(4, 2, 8))
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(passed.label, passed.spread), normal(0.0, 1.0)).sum(-1).mean()
    torch.testing.assert_close(passed.loss, 0.5 * expected)
    torch.testing.assert_close(passed.z, passed.label)
    assert not torch.equal(layer.train()(torch.randn(4, 2, 8)).z, passed.z)


def test_codes_are_the_nearest_and_the_unused_are_replaced_early():
    pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    layer = Quantised(8, 12, codebook=5, tokens=3, renewed=2).eval()
    passed = layer(torch.randn(7, 2, 8))
    assert passed.label.shape == passed.z.shape == (7, 2, 12) and passed.codes.shape == (7, 2, 3)
    book = layer.codes.codebook
    for vector, code, z in zip(passed.label.view(-1, 4), passed.codes.flatten(), passed.z.view(-1, 4), strict=True):
        assert int(((book - vector) ** 2).sum(1).argmin()) == int(code)
        torch.testing.assert_close(z, book[code], atol=1e-5, rtol=1e-5)
    layer.train()
    for step in range(4):
        for name in ("embed", "embed_avg", "cluster_size"):  # a code that is never the nearest
            getattr(layer.codes._codebook, name).data[:, 1] = 1e3 if name != "cluster_size" else 1.0
        layer(torch.randn(7, 2, 8))
        assert bool(layer.codes.codebook[1].abs().max() < 1e2) == (step < 2)
    with pytest.raises(ValueError, match="cannot be shared by 5 tokens"):
        Quantised(8, 12, codebook=5, tokens=5, renewed=0)


@pytest.mark.parametrize("codebook", [0, 5])
def test_labels_of_both_kinds_and_their_embodiment(squares, tmp_path, codebook):
    model = small(codebook=codebook, tokens=3)
    model.fit(squares, range(5))
    model.save(tmp_path)
    clips = [clip_of(squares, i) for i in range(3)]
    labels = LatentActions.load(tmp_path).label(clips)
    assert isinstance(model, Labeler) and model.robot.name == "square_latent" and model.robot.action_dim == 6
    gaps = model.gaps(clips[::-1])[::-1]
    for label, gap in zip(labels, gaps, strict=True):
        np.testing.assert_allclose(label.value, gap["latent"].repeat(2, axis=0), atol=1e-5)  # two robot steps a gap
        assert label.spread.shape == (16, 6) and label.spread.min() >= 0
        assert ("codes" in gap) == bool(codebook)
    robot = LatentActions.load(tmp_path, ROBOT, output="actions")
    robot.action.scale.fill_(50.0)
    (actions,) = robot.label(clips[:1])
    assert np.abs(actions.value).max() == 1  # the limits
    assert robot.robot is ROBOT and actions.value.shape == (16, 3) and set(actions.value[:, 2]) <= {-1.0, 1.0}


def test_only_labelled_episodes_bring_actions(squares):
    model = small(labelled=0.4)
    model.fit(squares, range(5))
    assert len(model.known) == 2
    batch = model.batches(squares, range(5), batch_size=6, seed=1)(3)
    again = model.batches(squares, range(5), batch_size=6, seed=1)(3)
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    assert batch["known"][1::2].all() and not batch["action"][batch["known"] == 0].any()
    blind = small(labelled=0.0)
    blind.fit(squares, range(5))
    assert blind.batches(squares, range(5), batch_size=4, seed=1)(0)["known"].sum() == 0
    assert "head" not in blind.loss(batch)[1]


def test_the_head_is_trained_for_every_step_of_the_longest_gap(squares, caplog):
    """At 5/4 robot steps a gap the fourth one is the first of two steps."""
    model = small(clock=Clock(robot_hz="20", video_hz="16", frames=9))
    model.fit(squares, range(5))
    batch = model.batches(squares, range(5), batch_size=4, seed=1)(0)
    assert batch["video"].shape[1] == 5 and batch["action"].shape[1] == 5 and "have 5 frames in place of" in caplog.text
    model.loss(batch)[0].backward()
    assert (model.head[-1].bias.grad.view(2, 3) != 0).all() and "nothing has trained" not in caplog.text
    blind = small(clock=model.clock, labelled=0.0)
    blind.fit(squares, range(5))
    assert blind.batches(squares, range(5), batch_size=1, seed=1)(0)["video"].shape[1] == 4
    far = small(clock=Clock(robot_hz="20", video_hz="19", frames=9))
    far.fit(squares, range(5))
    assert far.batches(squares, range(5), batch_size=1, seed=1)(0)["video"].shape[1] == 16
    assert "clips of 16 frames at 19 Hz show no gap of 2 robot steps" in caplog.text


def test_of_demonstrations_beside_video_without_actions_those_that_bring_actions_are_labelled(squares):
    mixed, plain = Squares(10), small(labelled=0.4)
    plain.fit(mixed, range(5))
    for i in range(5, 10):
        silent = np.full_like(mixed.episodes[i].action, np.nan)
        mixed.episodes[i] = replace(mixed.episodes[i], action=silent, meta={"action_known": False})
    for seed in range(4):
        model = small(labelled=0.4, seed=seed)
        model.fit(mixed, range(10))
        assert len(model.known) == 2 and max(model.known) < 5 and torch.isfinite(model.action.scale).all()
        assert seed or model.known == plain.known
        batch = model.batches(mixed, range(10), batch_size=6, seed=1)(0)
        assert torch.isfinite(batch["action"]).all() and torch.isfinite(model.loss(batch)[0])


def test_pixels_and_their_patches_are_inverses():
    frames = torch.rand(2, 3, 16, 24)
    torch.testing.assert_close(Pixels().picture(Pixels()(frames)), frames)


def test_features_of_a_tower_can_be_the_target(squares):
    tower = {"model_type": "dinov2", "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
             "image_size": 28, "patch_size": 14, "mlp_ratio": 2}  # fmt: skip
    model = small(target={"path": "none", "config": tower})
    model.fit(squares, range(3))
    loss, metrics = model.loss(model.batches(squares, range(3), batch_size=2, seed=0)(0))
    assert torch.isfinite(loss) and model.scale.shape == (12,)
    assert model.carry_over(clip_of(squares, 0).video[0], np.zeros((2, 6), np.float32)) is None
    with pytest.raises(ValueError, match="name one"):
        Features()


def test_labels_need_no_target(squares, tmp_path, monkeypatch):
    """What was foretold in training may be gone: a folder deleted, a hub out of reach."""
    tower = {"model_type": "dinov2", "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
             "image_size": 28, "patch_size": 14, "mlp_ratio": 2}  # fmt: skip
    model = small(target={"path": "none", "config": tower})
    model.fit(squares, range(3))
    model.save(tmp_path)
    clips = [clip_of(squares, 0)]
    (expected,) = model.label(clips)

    def gone(**_):
        raise ValueError("the tower is gone")

    monkeypatch.setattr("idm.latent.model.Features", gone)
    (found,) = LatentActions.load(tmp_path).label(clips)
    np.testing.assert_array_equal(found.value, expected.value)
    with pytest.raises(ValueError, match="is gone"):
        LatentActions.load(tmp_path).gaps(clips)


def test_a_target_is_found_where_the_run_has_moved_to(squares, tmp_path, monkeypatch):
    opened = []

    class World(Features):
        width = 12

        def __init__(self, *, world):
            opened.append(world)

    monkeypatch.setattr("idm.latent.model.Features", World)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run/world").mkdir(parents=True)
    small(target={"world": "run/world"}).save(tmp_path / "run/labeler")  # as a recipe names it, from where it was run
    for run in ("run", "moved/run"):
        if run != "run":
            (tmp_path / "moved").mkdir()
            (tmp_path / "run").rename(run)
        model = LatentActions.load(Path(run) / "labeler")
        model.target  # noqa: B018
        assert Path(opened[-1]).samefile(tmp_path / run / "world")
    model.save(tmp_path / "again")  # alone: what it names is still there
    LatentActions.load(tmp_path / "again").target  # noqa: B018
    assert Path(opened[-1]).samefile(tmp_path / "moved/run/world")
    (tmp_path / "moved/run/world").rename(tmp_path / "other")
    assert LatentActions.load("moved/run/labeler", target={"world": "other"}).config["target"] == {"world": "other"}
    assert LatentActions.load("moved/run/labeler").config["target"] == {"world": "run/world"}  # as it was named


def test_a_long_clip_is_read_a_few_frames_at_a_time(squares, monkeypatch):
    model, clips = small().eval(), [clip_of(squares, i) for i in range(2)]
    whole, convert = model.gaps(clips), pictures
    for frames in (1, 3):
        floats = []
        monkeypatch.setattr("idm.clips.PIXELS", frames * 2 * 32 * 48 + 5)
        monkeypatch.setattr(
            "idm.latent.model.pictures", lambda some, of=floats: of.append(some.shape[1]) or convert(some)
        )
        for found, expected in zip(model.gaps(clips), whole, strict=True):
            for key in expected:
                np.testing.assert_allclose(found[key], expected[key], atol=1e-5, rtol=1e-4)
        assert max(floats) == frames + 1 and len(floats) == -(-9 // frames) + -(-8 // frames)


@pytest.mark.parametrize("codebook", [0, 5])
def test_video_alone_is_enough_even_without_a_robot(squares, tmp_path, codebook):
    class Video(Squares):
        robot = replace(ROBOT, action=(), state=())

        def episode(self, index):
            e = super().episode(index)
            return replace(e, action=np.full_like(e.action[:, :0], np.nan), meta={"action_known": False})

    video = Video(3)
    model = small(robot=video.robot, labelled=0.0, codebook=codebook, tokens=3)
    model.fit(video, range(3))
    train(model, model.batches(video, range(3), batch_size=2, seed=0), out=tmp_path / "t", steps=2, precision="fp32")
    model.save(tmp_path / "m")
    clips = [clip_of(video, i) for i in range(2)]
    found = LatentActions.load(tmp_path / "m", video.robot).label(clips)
    assert found[1].value.shape == (16, 6) and np.isfinite(found[1].value).all()
    assert 0 < model.measure([clips])["change"]["left"]
    with pytest.raises(ValueError, match="no action parts, and labelled is 0.5"):
        small(robot=video.robot)
    video.robot = ROBOT
    with pytest.raises(ValueError, match="squares is video without actions.*set labeler.labelled=0"):
        small().fit(video, range(3))


def test_errors_name_what_is_wrong(squares):
    model = small()
    with pytest.raises(ValueError, match="'square_1' has 4 robot steps a frame.*trained for 2"):
        model.label([clip_of(squares, 1, Clock(robot_hz="20", video_hz="5", frames=4))])
    with pytest.raises(ValueError, match="output is 'actions' with a labelled share of 0"):
        small(output="actions", labelled=0.0)
    other = replace(ROBOT, views=(View(name="top", key="k", height=32, width=48),))
    with pytest.raises(ValueError, match="made for another robot"):
        small(robot=other).fit(squares, range(2))


def test_a_checkpoint_says_which_kind_of_labeler_it_holds(tmp_path):
    small().save(tmp_path)
    with pytest.raises(ValueError, match="holds a LatentActions, but a FlowIDM was asked for"):
        FlowIDM.load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("kind") == "LatentActions"
    (tmp_path / "config.json").write_text(json.dumps(config))  # as older ones are
    with pytest.raises(ValueError, match="labeler with the settings beta, codebook, .* but a FlowIDM"):
        FlowIDM.load(tmp_path)
    assert LatentActions.load(tmp_path).latent == 6


def test_it_moves_to_the_accelerator(monkeypatch):
    monkeypatch.setattr("idm.latent.model.best_device", lambda: torch.device("meta"))
    assert {p.device.type for p in small().place().parameters()} == {"meta"}


def test_it_learns_to_foretell_and_latents_hold_the_motion(tmp_path):
    torch.set_num_threads(1)
    training, apart = Squares(16, seed=1), Squares(4, seed=2)
    model = small(latent=8, beta=1e-4, frames=3)
    model.fit(training, range(16))
    train(model, model.batches(training, range(16), batch_size=12, seed=0), out=tmp_path, steps=100, lr=3e-3, warmup=10,
          ema=0.95, precision="fp32")  # fmt: skip
    clips = [clip_of(apart, i, CLOCK.with_frames(13)) for i in range(4)]
    latents = np.concatenate([gap["latent"] for gap in model.gaps(clips)])
    moved = np.concatenate([np.diff(e.state[:25:2], axis=0) for e in apart.episodes])
    seen = np.concatenate([latents, np.ones((len(latents), 1))], 1)
    left = moved - seen @ np.linalg.lstsq(seen, moved, rcond=None)[0]
    explained = 1 - (left**2).sum() / ((moved - moved.mean(0)) ** 2).sum()
    assert model.measure([clips])["change"]["left"] < 0.9 and explained > 0.2, explained
