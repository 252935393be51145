"""A labeler of two robots: one network, heads of each; each is labelled in its own terms."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from moving_square import ROBOT, clip_of
from two_squares import OTHER, SMALL, VIDEO, Others, Small

from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment
from dreamgen.data.mixture import shares
from dreamgen.engine.train import read_losses, train
from dreamgen.stages.label_scores import score_labels
from idm.batches import Alternating, Batches
from idm.merge import Windows
from idm.model import FlowIDM
from idm.robots import Seen

PLAIN = {"share": 0.0, "colour": 0.0}


def small(robots: tuple[Embodiment, ...] = (SMALL, OTHER), **changes) -> FlowIDM:
    options = {"clock": VIDEO, "frames": 3, "train_frames": 5, "vision": {"channels": [16, 24], "points": 8},
               "width": 32, "layers": 2, "heads": 2, "precision": "fp32", "augment": PLAIN, "samples": 1,
               "flow_steps": 4} | changes  # fmt: skip
    model = FlowIDM(robot=robots[0], **options)
    for robot in robots[1:]:
        model.add(robot)
    return model


def fitted(model: FlowIDM, *data: Small) -> FlowIDM:
    for one in data:
        with model.reading(one.robot.name):
            model.fit(one, range(len(one)))
    return model


@pytest.fixture(scope="module")
def worlds() -> tuple[Small, Others]:
    return Small(24, seed=1), Others(24, seed=2)


def test_robots_see_videos_of_the_same_rates():
    """At 20 Hz every second frame, and every 1.5th, are 10 and 40/3 frames a second."""
    first = Seen(ROBOT, Clock(robot_hz="20", video_hz="10", frames=9), ["2", "3/2"])
    for hz, spacings, video_hz in (("30", ["3", "9/4"], "10"), ("12", ["6/5", "1"], "10"), ("6", ["1"], "6"),
                                   ("50/3", ["5/3", "5/4"], "10")):  # fmt: skip
        made = first.beside(replace(ROBOT, name="b", robot_hz=hz))
        assert (made.spacings, made.clock.video_hz, made.clock.frames) == (spacings, video_hz, 9)
        for clock, steps in zip(made.clocks(4), spacings, strict=True):
            assert str(clock.stride) == steps and clock.frames == 4 and clock.robot_hz == hz
    with pytest.raises(ValueError, match="'wide' is .32, 64.*'square' .32, 48.; .*another size or grid"):
        first.beside(replace(ROBOT, name="wide", views=(replace(ROBOT.views[0], width=64),)))
    with pytest.raises(ValueError, match="'still' has no action parts"):
        first.beside(replace(ROBOT, name="still", action=()))
    with pytest.raises(ValueError, match="head for a robot 'square' already.*another name.*stage.more"):
        small().add(SMALL)


@pytest.mark.parametrize(
    ("hz", "spacings", "wanted"), [("20", (), [4]), ("16", (), [6]), ("10", ("2", "3/2", "9/5"), [4, 4, 7])]
)
def test_training_clips_show_the_windows_of_every_phase(caplog, hz, spacings, wanted):
    """What a long clip asks for has been trained: the places of the frames in each of its windows."""
    model = small((SMALL,), clock=Clock(robot_hz="20", video_hz=hz, frames=9), spacings=spacings, train_frames=4)
    assert [clock.frames for clock in model.clocks] == wanted and model.clip_frames == max(wanted)
    for clock in model.clocks:
        asked, trained = (Windows.of(clock.with_frames(n), 3).at for n in (60, clock.frames))
        assert {tuple(at) for at in asked} == {tuple(at) for at in trained}
    batches = model.batches(Small(2), range(2), batch_size=2, seed=0, degrade=lambda asked, rates, texts:
                            [asked(n) for n in range(len(rates))], degrade_frames=model.clip_frames)  # fmt: skip
    assert {batches(step)["video"].shape[1] for step in range(12)} == set(wanted)
    assert ("training clips have up to" in caplog.text) == (max(wanted) > 4)


def test_a_head_that_is_added_leaves_the_first_weights_as_they_are():
    fast = replace(OTHER, robot_hz="50")  # with chunks of 5 steps in place of 2
    state, alone = torch.random.get_rng_state(), dict(small((SMALL,)).named_parameters())
    both = dict(small((SMALL, fast)).named_parameters())
    assert torch.equal(torch.random.get_rng_state(), state)
    own = {name for name in both if name.startswith("heads.other.")}
    assert own and set(both) - own == set(alone)
    for name, value in alone.items():
        assert torch.equal(both[name][: len(value)], value), name
    assert len(both["denoiser.direct.2.bias"]) == 5 * 32 and len(alone["denoiser.direct.2.bias"]) == 2 * 32
    assert all(torch.equal(a, b) for a, b in zip(both.values(), small((SMALL, fast)).parameters(), strict=True))


def test_a_batch_is_of_one_robot_and_a_function_of_its_step(worlds):
    few, many = Small(3, seed=4), worlds[1]
    model = small()
    make = lambda **o: model.batches(few, range(3), batch_size=2, seed=5, others=[(many, range(24), None)], **o)  # noqa: E731
    one, two = make(), make()
    parts = {data.robot.name: Batches(data, range(len(data)), model.seen[data.robot.name].clocks(5), batch_size=2,
                                      seed=5) for data in (few, many)}  # fmt: skip
    for step in (6, 1, 2):
        a, b = one(step), two(step)
        plain = parts[a["robot"]](step)
        assert plain.keys() | {"robot"} == a.keys() == b.keys()
        assert all(np.array_equal(a[key], b[key]) and np.array_equal(a[key], plain[key]) for key in plain)
    weight = np.array([3 * 17, 24 * 17]) ** 0.43  # 21 rows, 5 frames
    for made, share in ((one, weight[0] / weight.sum()), (make(own_share=0.7), 0.7)):
        drawn = np.mean([made.name(step) == "square" for step in range(600)])
        assert abs(drawn - share) < 0.06 and abs(made.shares[0] - share) < 1e-6
    three = Alternating({"a": parts["square"], "b": parts["other"], "c": parts["other"]}, own_share=0.4, seed=0)
    np.testing.assert_allclose(three.shares, [0.4, 0.3, 0.3])
    np.testing.assert_allclose(shares([1, 16], 0.5), [0.2, 0.8])
    with pytest.raises(ValueError, match="own_share is 1.0; expected a share between 0 and 1"):
        make(own_share=1.0)
    assert isinstance(model.batches(few, range(3), batch_size=2, seed=5), Batches)


def test_clips_of_each_robot_can_be_drawn_again(worlds):
    model, asked = small(), []

    def darker(name: str):  # noqa: ANN202
        return lambda get, rates, texts: [asked.append(name) or get(n) // 2 for n in range(len(rates))]

    how = dict(degrade=darker("own"), degraded=1.0, degraded_clips=3, degrade_frames=9, batch_size=2, seed=5)
    made = model.batches(worlds[0], range(4), others=[(worlds[1], range(4), darker("other"))], **how)
    assert asked == ["own"] * 3 + ["other"] * 3
    assert {made.name(step) for step in range(9)} == {"square", "other"}
    assert all(made(step)["video"].max() < 128 for step in range(9))
    plain = model.batches(worlds[0], range(4), others=[(worlds[1], range(4), None)], **how)
    bright = {plain.name(step): int(plain(step)["video"].max()) for step in range(9)}
    assert bright["square"] < 128 < bright["other"]
    with pytest.raises(ValueError, match="none of 4 episodes of robot 'other' has the .* frames for the world model"):
        model.batches(worlds[0], range(4), others=[(worlds[1], range(4), darker("other"))], **how | {
            "degrade": None, "degrade_frames": 40})  # fmt: skip


@pytest.mark.parametrize(("count", "wanted"), [(8, [0, 1, 2, 3, 4, 5, 0, 1]), (4, [0, 1, 3, 4]), (3, [0, 2, 4])])
def test_clips_that_are_drawn_again_are_spread_over_the_episodes(count, wanted):
    """Also where there are hardly more episodes than clips."""
    data, asked = Small(6), []
    data.episodes = [replace(episode, instruction=str(i)) for i, episode in enumerate(data.episodes)]

    def degrade(get, rates, texts):  # noqa: ANN001, ANN202
        asked.extend(map(int, texts))
        return [get(n) for n in range(len(rates))]

    Batches(data, range(6), [VIDEO], batch_size=1, seed=0, degrade=degrade, degraded_clips=count, degrade_frames=9)
    assert asked == wanted


def test_an_episode_that_is_too_short_for_one_spacing_is_seen_at_the_others(caplog):
    data = Small(3)
    e = data.episodes[1]
    data.episodes[1] = replace(e, state=e.state[:8], action=e.action[:8], video={"top": e.video["top"][:8]})
    model = small((SMALL,), spacings=["1", "2"])  # of clips of 5 and of 9 rows
    made = model.batches(data, range(3), batch_size=3, seed=0, degraded_clips=6, degrade_frames=5, degraded=0.3,
                         degrade=lambda get, rates, texts: [get(n) for n in range(len(rates))])  # fmt: skip
    near, far = (set(made.starts[clock][0][:, 0].tolist()) for clock in made.clocks)
    assert (near, far, made.episodes) == ({0, 1, 2}, {0, 2}, [0, 1, 2])
    assert [(index, int(clock.stride)) for index, _, _, clock in made.dreamlike] == [
        (0, 1), (2, 2), (2, 1), (2, 2), (1, 1), (2, 2)]  # fmt: skip
    longer = Batches(data, range(3), made.clocks[:1], batch_size=3, seed=0, degraded_clips=6, degrade_frames=9,
                     degrade=lambda get, rates, texts: [get(n) for n in range(len(rates))])  # fmt: skip
    assert [index for index, *_ in longer.dreamlike] == [0, 2, 0, 2, 0, 2]  # those that show as much, and as many clips
    assert "1 of 3 episodes of robot 'square' bring no training clips at 10 Hz: they are shorter than" in caplog.text
    assert {made(step)["video"].shape for step in range(9)} == {(3, 5, 16, 24, 3)}
    with pytest.raises(ValueError, match="none of 1 episodes of robot 'square' has the 9 rows .* clip at 10 Hz spans"):
        model.batches(data, [1], batch_size=3, seed=0)


def test_gradients_of_one_robot_never_touch_the_head_of_another(worlds):
    model = fitted(small(), *worlds)
    for data, own, others in zip(worlds, ("square", "other"), ("other", "square"), strict=True):
        model.zero_grad(set_to_none=True)
        with model.reading(own):
            batch = model.batches(data, range(4), batch_size=2, seed=0)(0)
        loss, metrics = model.loss({**batch, "robot": own})
        loss.backward()
        assert set(metrics) == {f"{own}_state", f"{own}_flow"} and model.robot.name == "square"
        assert all(p.grad is None for p in model.heads[others].parameters())
        assert all(p.grad is not None and p.grad.any() for p in model.heads[own].parameters())
        assert all(p.grad is not None for p in model.vision.parameters())


def test_a_head_rests_while_others_learn_in_any_number_of_processes(worlds, tmp_path, monkeypatch):
    """No weight decay, and no momentum of steps before, moves it; without noise, processes that share the batch give
    the same weights as one."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self, shape: torch.full(shape, 0.4))
    results = []
    for count in (1, 2):
        model, kept = fitted(small(), *worlds), []
        batches = model.batches(worlds[0], range(8), batch_size=4, seed=0, others=[(worlds[1], range(8), None)])

        def weights(name: str, model=model) -> torch.Tensor:  # noqa: ANN001
            return torch.cat([p.detach().flatten() for p in model.heads[name].parameters()])

        def keep(_: object, step: int, kept=kept, weights=weights) -> dict:  # noqa: ANN001
            kept.append({name: weights(name) for name in ("square", "other")})
            return {}

        keep(model, 0)
        train(model, batches, out=tmp_path / str(count), steps=5, lr=3e-3, warmup=1, weight_decay=0.1, ema=None,
              precision="fp32", replicas=count, log_every=1, validate=keep, validate_every=1)  # fmt: skip
        names = [batches.name(step) for step in range(5)]
        assert names == ["square", "square", "other", "other", "square"]
        for name, (before, after) in zip(names, pairwise(kept), strict=True):
            assert [key for key in before if not torch.equal(before[key], after[key])] == [name]
        rows = read_losses(tmp_path / str(count))
        assert [sorted(key for key in row if "flow" in key) for row in rows] == [[f"{name}_flow"] for name in names]
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert float((results[0] - results[1]).abs().mean()) < 1e-6  # single ones whose gradient is almost 0 go astray


@pytest.fixture(scope="module")
def learned(worlds, tmp_path_factory) -> FlowIDM:
    model = fitted(small(), *worlds)
    batches = model.batches(worlds[0], range(24), batch_size=8, seed=0, others=[(worlds[1], range(24), None)])
    train(model, batches, out=tmp_path_factory.mktemp("learned"), steps=80, lr=5e-3, warmup=10, ema=0.9,
          precision="fp32", checkpoint_every=1000)  # fmt: skip
    for data in worlds:
        with model.reading(data.robot.name):
            model.calibrate(data, range(6))
    return model


def test_both_robots_are_labelled_in_their_own_terms(learned):
    found = {}
    for data in (Small(6, seed=3), Others(6, seed=3)):  # the same videos
        with learned.reading(data.robot.name):
            clock = learned.clock.with_frames(20)
            labels = learned.label([clip_of(data, i, clock) for i in range(6)])
            true = [data.episodes[i].action[:19] for i in range(6)]
            scores = score_labels(labels, true, data.robot, clock)
        found[data.robot.name] = np.concatenate([label.value for label in labels]), np.concatenate(true), scores
    square, other = found["square"][2], found["other"][2]
    assert square["r2"]["move"] > 0.5 and square["auroc"]["light"] > 0.9, square
    assert other["r2"]["pull"] > 0.5 and other["r2"]["aim"] > 0.5 and other["auroc"]["dark"] > 0.9, other
    # what the other robot's labels would be as the square's, and the other way round: of wrong sign and size
    move, pull = found["square"][0][:, :2], found["other"][0][:, 1:3]
    for wrong, true in ((pull, found["square"][1][:, :2]), (move, found["other"][1][:, 1:3])):
        assert 1 - ((wrong - true) ** 2).sum() / ((true - true.mean(0)) ** 2).sum() < 0
    assert np.corrcoef(-0.1 * pull.ravel(), 2 * move.ravel())[0, 1] > 0.8  # pixels: the same motion was seen


def test_a_saved_labeler_is_loaded_for_each_of_its_robots(learned, tmp_path):
    learned.save(tmp_path)
    for data in (Small(1, seed=3), Others(1, seed=3)):
        loaded = FlowIDM.load(tmp_path, data.robot)
        assert loaded.robot == data.robot and list(loaded.seen) == ["square", "other"]
        clip = clip_of(data, 0, loaded.clock)
        with learned.reading(data.robot.name):
            np.testing.assert_array_equal(loaded.label([clip])[0].value, learned.label([clip])[0].value)
        loaded.save(tmp_path / "again")
        for file in ("config.json", "contract.json", "others.json", "model.safetensors"):
            assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()
    assert FlowIDM.load(tmp_path).robot == SMALL
    with pytest.raises(ValueError, match="has 2 robot steps a frame .5 of 10 Hz.; this labeler was trained for 1"):
        FlowIDM.load(tmp_path, OTHER).check(clip_of(Others(1), 0, Clock(robot_hz="10", video_hz="5", frames=4)))
    with pytest.raises(
        ValueError, match="another robot(.|\n)*robot_hz: here 15, saved 10(.|\n)*knows 'square', 'other'"
    ):
        FlowIDM.load(tmp_path, replace(OTHER, robot_hz="15"))
    third = replace(OTHER, name="third")
    with pytest.raises(ValueError, match="other robots than embodiment 'third': it knows 'square', 'other'.*start"):
        FlowIDM.load(tmp_path, third)
    small((SMALL,)).save(tmp_path)
    assert not (tmp_path / "others.json").exists() and list(FlowIDM.load(tmp_path).seen) == ["square"]
    with pytest.raises(ValueError, match="another robot(.|\n)*name: here third, saved square(.|\n)*It knows 'square'."):
        FlowIDM.load(tmp_path, third)


def test_a_labeler_begins_with_the_network_of_another(learned, tmp_path):
    learned.save(tmp_path)
    third = replace(SMALL, name="third", robot_hz="30")  # chunks of 3 steps, where those of the start are of 2
    model = small((third,), clock=Clock(robot_hz="30", video_hz="20", frames=9), seed=1)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    model.begin_with(tmp_path)
    taken = learned.state_dict()
    for name, value in model.state_dict().items():
        if name.startswith("heads."):
            assert torch.equal(value, first[name])
        else:
            rows = len(taken[name])
            assert torch.equal(value[:rows], taken[name]) and torch.equal(value[rows:], first[name][rows:]), name
    assert len(first["denoiser.direct.2.bias"]) == 3 * 32 and list(model.heads) == ["third"]
    model.begin_with(tmp_path)
    again = small((SMALL,), seed=1)  # its own head of that name is not taken over either
    kept = again.head.decoder.weight.clone()
    again.begin_with(tmp_path)
    assert torch.equal(again.head.decoder.weight, kept) and not torch.equal(kept, learned.head.decoder.weight)


@pytest.mark.parametrize(("changes", "what"), [
    ({"width": 64}, "width: 32 -> 64"), ({"frames": 4}, "frames: 3 -> 4"), ({"heads": 4}, "heads: 2 -> 4"),
    ({"vision": {"channels": [16, 24], "points": 9}}, "vision.points: 8 -> 9"),
    ({"vision": {"channels": [16, 24], "points": 8, "blocks": 2}}, "vision.blocks: 1 -> 2"),
])  # fmt: skip
def test_a_beginning_with_another_network_is_refused(tmp_path: Path, changes, what):
    small((SMALL,)).save(tmp_path)
    model = small(**changes)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=rf"is no beginning for this one \({what}\).*stage.start"):
        model.begin_with(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    same = {"channels": [16, 24], "points": 8, "blocks": 1, "layers": 0}  # defaults, spelt out
    small(vision=same).begin_with(tmp_path)
