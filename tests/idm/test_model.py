"""The flow-matching labeler: its parts, its promises, and that it learns to read motion."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from moving_square import CLOCK, ROBOT, Squares, clip_of

from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import View
from dreamgen.core.protocols import Labeler
from dreamgen.engine.train import train
from dreamgen.stages.label_scores import score_labels
from idm.augment import Augment, blur
from idm.batches import Batches
from idm.clips import pictures
from idm.merge import Windows
from idm.model import FlowIDM
from idm.tower import PretrainedVision
from idm.vision import keypoints, with_motion

VISION = {"channels": [16, 24, 32], "points": 12}


def small(**changes) -> FlowIDM:
    options = {"robot": ROBOT, "clock": CLOCK, "frames": 3, "train_frames": 7, "vision": VISION, "width": 48,
               "layers": 2, "heads": 3, "precision": "fp32", "label_batch": 2} | changes  # fmt: skip
    return FlowIDM(**options)


@pytest.fixture(scope="module")
def squares() -> Squares:
    return Squares(5)


def test_motion_channels_are_the_differences_to_the_neighbours():
    video = torch.rand(2, 4, 3, 5, 6)
    seen = with_motion(video)
    assert seen.shape == (2, 4, 9, 5, 6)
    torch.testing.assert_close(seen[:, 2, 3:6], video[:, 2] - video[:, 1])
    torch.testing.assert_close(seen[:, 2, 6:], video[:, 3] - video[:, 2])
    assert not seen[:, 0, 3:6].any() and not seen[:, 3, 6:].any()


def test_keypoints_find_a_peak_between_pixels():
    maps = torch.full((1, 1, 5, 9), -30.0)
    maps[0, 0, 3, 5], maps[0, 0, 3, 6] = 10.0, 10.0
    x, y, _ = keypoints(maps)[0]
    np.testing.assert_allclose([float(x), float(y)], [-1 + 2 * 5.5 / 8, -1 + 2 * 3 / 4], atol=1e-5)


def test_blur_keeps_the_mean_of_a_constant_and_spreads_a_dot():
    dot = torch.zeros(1, 1, 3, 9, 11)
    dot[..., 4, 5] = 1
    soft = blur(dot)
    assert abs(float(soft.sum()) - 3) < 1e-5 and abs(float(soft[0, 0, 1, 4, 5]) - (6 / 16) ** 2) < 1e-6
    still = Augment(share=0.0, colour=0.0)(dot * 2 - 1)
    torch.testing.assert_close(still, dot * 2 - 1)


def test_conditions_computed_once_equal_those_of_each_window_alone(squares):
    model = small().eval()
    clip = clip_of(squares, 0)
    noise = torch.randn(1, 7, 2, 4, 3, generator=torch.Generator().manual_seed(0))
    video = torch.from_numpy(clip.video).float().div(127.5).sub(1).permute(0, 3, 1, 2)[None]
    chunks, _ = model.predict(video, noise, 2.0)
    tokens = model.encode(video)
    for k in (0, 4):
        alone = Windows.of(CLOCK.with_frames(3), 3)
        conditions = model._conditions(tokens[:, k : k + 3], alone, 2.0)
        x = noise[:, k]
        for step in range(model.flow_steps):
            t = torch.full(x.shape[:2], step / model.flow_steps)
            with torch.no_grad():
                x = x + model._velocity(x, t, conditions, torch.ones(1, 4, dtype=torch.bool)) / model.flow_steps
        torch.testing.assert_close(model.head.action.denormalise(x), chunks[:, k], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tower", [False, True])
def test_a_long_clip_is_encoded_a_few_frames_at_a_time(squares, monkeypatch, tower):
    config = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 32, "patch_size": 8}  # fmt: skip
    model = small(**({"vision": {"path": "none", "tokens": 2, "config": config}} if tower else {})).eval()
    video = torch.from_numpy(np.stack([clip_of(squares, i).video for i in range(2)]))
    floats, convert = [], pictures
    monkeypatch.setattr("idm.model.pictures", lambda some: floats.append(some.shape[1]) or convert(some))
    with torch.no_grad():
        whole = model.encode(convert(video))
        for frames in (1, 2, 4, 8):
            monkeypatch.setattr("idm.clips.PIXELS", frames * 2 * 32 * 48 + 5)
            seen = []
            floats.clear()
            with model.vision.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(len(given[0]))):
                torch.testing.assert_close(model.encode(video), whole, atol=1e-5, rtol=1e-5)
            assert max(floats) <= frames + 2  # as bytes all of it, as floats these and their neighbours
            assert sum(seen) == 2 * 9 and max(seen) == 2 * frames


def test_a_long_clip_is_denoised_a_few_windows_at_a_time(squares, monkeypatch):
    model = small(spacings=["2", "3/2"]).eval()
    clips = [clip_of(squares, i, Clock(robot_hz="20", video_hz="40/3", frames=9)) for i in range(2)]
    whole, seen = model.chunks(clips), []
    each = 2 * 3 * (3 * 2 * 4 + 1) * 2 * 48  # clips, frames, tokens, keys and values
    with model.denoiser.register_forward_pre_hook(lambda _, given: seen.append(len(given[0]))):
        for windows in (1, 2, 3):
            monkeypatch.setattr("idm.flow.MEMORIES", windows * each + 5)
            seen.clear()
            for (chunk, state), (same, read) in zip(model.chunks(clips), whole, strict=True):
                np.testing.assert_allclose(chunk, same, atol=1e-5)
                np.testing.assert_array_equal(state, read)
            assert sum(seen) == 2 * 7 * model.flow_steps and max(seen) == 2 * windows


def test_labels_come_with_the_states_read_on_the_way(squares):
    model = small()
    model.fit(squares, range(4))
    clips = [clip_of(squares, 1), clip_of(squares, 2, CLOCK.with_frames(5))]
    seen = []
    with model.vision.register_forward_pre_hook(lambda _, given: seen.append(len(given[0]))):
        labels, states = model.labels_and_states(clips)
    assert sum(seen) == 9 + 5  # each frame once
    for clip, label, state, other in zip(clips, labels, states, model.label(clips), strict=True):
        np.testing.assert_array_equal(label.value, other.value)
        assert state.shape == (len(label.value) + 1, 2)
        tokens = model.encode(pictures(torch.from_numpy(clip.video[None])))
        read = model.head.state.denormalise(model.head.read_state(tokens[0, :, 0])).detach().numpy()
        np.testing.assert_allclose(state[::2], read, atol=1e-4)
        np.testing.assert_allclose(state[1::2], (read[1:] + read[:-1]) / 2, atol=1e-4)


def test_calibration_leaves_out_what_is_too_short(squares):
    class Some(Squares):
        def length(self, index):
            return 4 if index == 1 else super().length(index)  # two frames

    model, some = small(), Some(5)
    model.fit(squares, range(4))
    assert model.calibrate(some, [1, 4]) == model.calibrate(squares, [4])
    with pytest.raises(ValueError, match="none of 1 episodes shows the 3 frames at 10 Hz of a window"):
        model.calibrate(some, [1])


def test_labels_do_not_depend_on_batch_or_order(squares):
    model = small()
    clips = [clip_of(squares, i) for i in range(5)]
    assert isinstance(model, Labeler)
    together = model.label(clips)
    backwards = model.label(clips[::-1])[::-1]
    for clip, a, b in zip(clips, together, backwards, strict=True):
        (alone,) = model.label([clip])
        assert a.value.shape == a.spread.shape == (16, 3)
        for other in (b, alone):
            np.testing.assert_allclose(a.value, other.value, atol=1e-4)
    assert not np.allclose(together[0].value, small(seed=1).label(clips[:1])[0].value)


def test_saved_and_loaded_it_labels_alike(squares, tmp_path):
    model = small()
    model.fit(squares, range(4))
    model.calibrate(squares, [4])
    model.save(tmp_path / "labeler")
    again = FlowIDM.load(tmp_path / "labeler", ROBOT)
    clip = clip_of(squares, 2)
    np.testing.assert_array_equal(model.label([clip])[0].value, again.label([clip])[0].value)
    assert FlowIDM.load(tmp_path / "labeler", rule="median").rule == "median"
    other = replace(ROBOT, views=(View(name="top", key="k", height=32, width=48),))
    with pytest.raises(ValueError, match="made for another robot"):
        FlowIDM.load(tmp_path / "labeler", other)


def test_batches_are_functions_of_the_step_and_of_recorded_rows(squares):
    model = small(spacings=["2", "3/2"])
    make = lambda **o: Batches(squares, [0, 1, 3], model.clocks, batch_size=3, seed=5, **o)  # noqa: E731
    one, two = make(), make()
    for step in (7, 2):
        a, b = one(step), two(step)
        assert all(np.array_equal(a[k], b[k]) for k in a)
        rows = a["rows"]
        assert a["video"].shape == (3, 7, 32, 48, 3) and a["action"].shape == (3, rows[-1], 3)
        for n in range(3):
            index, start = next(
                (i, s)
                for i in (0, 1, 3)
                for s in range(27 - rows[-1])
                if np.array_equal(squares.episodes[i].action[s : s + rows[-1]], a["action"][n])
            )
            np.testing.assert_array_equal(a["video"][n], squares.canvas(index, start + rows))
            np.testing.assert_array_equal(a["state"][n], squares.episodes[index].state[start + rows])
    assert {float(one(step)["spacing"]) for step in range(12)} == {2.0, 1.5}
    openings = [squares.episodes[i].action[0] for i in (0, 1, 3)]
    for share in (0.0, 0.5):  # how many clips begin with their episode, where no frame shows what came before
        actions = np.concatenate([make(first=share)(step)["action"][:, 0] for step in range(100)])
        found = np.mean([any(np.array_equal(action, opening) for opening in openings) for action in actions])
        assert abs(found - share) < 0.1
    dark = make(
        degrade=lambda asked, rates, texts: [asked(n) // 2 for n in range(len(rates))],
        degraded=1.0,
        degraded_clips=4,
        degrade_frames=9,
    )(1)["video"]
    assert dark.max() <= 127
    with pytest.raises(ValueError, match="none of 1 episodes of robot 'square' has the 53 rows"):
        Batches(squares, [0], [CLOCK.with_frames(27)], batch_size=1, seed=0)


def test_clips_are_drawn_by_how_much_moves_in_them(squares):
    """Against loops over all rows, and numpy's own draw from probabilities."""
    clock, rest, first = CLOCK.with_frames(4), 0.3, 0.2
    made = Batches(squares, [0, 2, 4], [clock], batch_size=1, seed=5, rest=rest, first=first)
    scale = np.concatenate([squares.episodes[i].action for i in (0, 2, 4)]).std(0) + 1e-6
    places, weight = [], []
    for i in (0, 2, 4):
        motion = np.abs(squares.episodes[i].action / scale)
        motion = (motion - np.median(motion, axis=0)).clip(0).mean(1)
        for start in range(27 - 6):
            places.append((i, start))
            weight.append(motion[start : start + 6].mean())
    weight = np.array(weight) / np.mean(weight) * (1 - rest) + rest
    opening = np.array([start == 0 for _, start in places])
    weight = np.where(opening, first * weight / weight[opening].sum(), (1 - first) * weight / weight[~opening].sum())
    starts, upto = made.starts[clock]
    np.testing.assert_array_equal(starts, places)
    np.testing.assert_allclose(np.diff(upto, prepend=0), weight, rtol=1e-4)
    share = np.diff(upto, prepend=0)
    one, two = np.random.default_rng(7), np.random.default_rng(7)
    for _ in range(50):
        assert one.choice(len(share), p=share) == upto.searchsorted(two.random(), side="right")


def test_errors_name_the_clip_and_the_remedy(squares):
    model = small()
    with pytest.raises(ValueError, match="'square_1' has 4 robot steps a frame.*trained for 2"):
        model.label([clip_of(squares, 1, Clock(robot_hz="20", video_hz="5", frames=4))])
    with pytest.raises(ValueError, match="has 2 frames; a window of this labeler has 3"):
        model.label([clip_of(squares, 1, CLOCK.with_frames(2))])
    wrong = replace(clip_of(squares, 1), video=np.zeros((9, 24, 24, 3), np.uint8))
    with pytest.raises(ValueError, match="canvas of robot 'square'"):
        model.label([wrong])
    with pytest.raises(ValueError, match="canvas divisible by 32"):
        small(vision={"channels": [8, 16, 16, 16, 16]})
    with pytest.raises(ValueError, match="expected 2 <= frames <= train_frames"):
        small(frames=8)
    with pytest.raises(ValueError, match="spacings are 3/2 robot steps a frame.*clock has 2 .10 of 20 Hz.; add '2'"):
        small(spacings=["3/2"])
    with pytest.raises(ValueError, match="expected robot steps a frame"):
        small(spacings=["2", "fast"])
    with pytest.raises(ValueError, match="none of 2 episodes of robot 'square' has the 33 rows that 17 frames for the"):
        model.batches(squares, [0, 1], batch_size=1, seed=0, degrade=lambda asked, rates, texts: [], degrade_frames=17)


def test_a_spacing_is_known_however_it_is_written(squares):
    model = small(spacings=["2", "1.5", 1.5])
    assert model.spacings == ["2", "3/2"]
    model.check(clip_of(squares, 0, Clock(robot_hz="20", video_hz="40/3", frames=4)))


def test_states_that_nobody_taught_it_to_read_are_unknown_and_correct_nothing(squares):
    model, plain = small(state_weight=0.0), small(correct=0.0)
    for one in (model, plain):
        one.fit(squares, range(4))
    assert set(model.calibrate(squares, [4])) == {"sigma_action_move", "sigma_action_light"}
    clips = [clip_of(squares, 2)]
    assert model.head.response.abs().sum() > 0 and model.labels_and_states(clips)[1] is None
    assert plain.labels_and_states(clips)[1] is not None
    squares = Squares(5)
    squares.episodes[3] = replace(squares.episodes[3], extra={"state_known": np.zeros_like(squares.episodes[3].state)})
    with pytest.raises(ValueError, match="1 of 4 episodes .* unknown .column state_known.*labeler.state_weight=0"):
        plain.fit(squares, range(4))
    model.fit(squares, range(4))
    np.testing.assert_array_equal(model.label(clips)[0].value, plain.label(clips)[0].value)


def test_it_moves_to_the_accelerator(monkeypatch):
    monkeypatch.setattr("idm.model.best_device", lambda: torch.device("meta"))
    model = small()
    assert model.place() is model
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"meta"}


def test_the_published_window_can_be_said_and_a_transformers_tower_plugs_in(squares):
    """Two frames 16 steps apart; a SigLIP2-like tower with random weights stands for the real one."""
    clock = Clock(robot_hz="20", video_hz="5/4", frames=2)
    tower = {"path": "none", "tokens": 2, "frozen": True, "config": {
        "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 8}}  # fmt: skip
    model = small(clock=clock, frames=2, train_frames=2, vision=tower)
    assert isinstance(model.vision, PretrainedVision)
    (labels,) = model.label([clip_of(squares, 0, clock)])
    assert labels.value.shape == (16, 3)
    loss, _ = model.loss(model.batches(squares, range(3), batch_size=2, seed=0)(0))
    loss.backward()
    assert all(p.grad is None for p in model.vision.tower.parameters())


def test_it_learns_the_motion_of_a_square(tmp_path):
    """At one frame a step: between frames two steps apart only the sum of two random actions can be seen."""
    training, apart = Squares(40, seed=1), Squares(6, seed=2)
    clock = Clock(robot_hz="20", video_hz="20", frames=9)
    model = small(clock=clock, width=64, heads=4, layers=4, train_frames=5, augment={"share": 0.2, "noise": 0.02})
    model.fit(training, range(40))
    train(model, model.batches(training, range(40), batch_size=8, seed=0), out=tmp_path, steps=380, lr=3e-3, warmup=20,
          ema=0.98, precision="fp32", checkpoint_every=1000)  # fmt: skip
    model.calibrate(training, range(8))
    clips = [clip_of(apart, i, clock.with_frames(25)) for i in range(6)]
    labels, states = model.labels_and_states(clips)
    scores = score_labels(labels, [apart.episodes[i].action[:24] for i in range(6)], ROBOT, clock)
    assert scores["r2"]["move"] > 0.95, scores["r2"]
    assert scores["auroc"]["light"] > 0.95 and scores["lag"]["move"] == 0
    read = np.concatenate(states) - np.concatenate([e.state[:25] for e in apart.episodes])
    assert np.abs(read).mean() < 0.6  # pixels
