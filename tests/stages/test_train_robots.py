"""One policy trained on the recordings and dreams of two robots, each of which it then acts for."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from dreamgen.core.protocols import Policy
from dreamgen.data.lerobot import Dataset
from dreamgen.data.writer import write_dataset
from dreamgen.policies.feed import Feed
from dreamgen.policies.palette import PaletteEncoder
from dreamgen.policies.policy import FlowPolicy
from dreamgen.stages.evaluate import evaluate
from dreamgen.stages.evaluate_open_loop import evaluate_open_loop
from dreamgen.stages.open_loop import open_loop_error
from dreamgen.stages.train_policy import train_policy
from tests.data.video_only import strip
from tests.stages.hoist import HOIST, hoisted
from tests.stages.test_policy_stages import HORIZON, ROBOT, Point, episodes, small

BODIES = dict(bodies=["real", "dream", "hoist", "hoist_dream"], robots={"hoist": HOIST, "hoist_dream": "hoist"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("robots")
    write_dataset(root / "real", episodes(10, 1), ROBOT)
    write_dataset(root / "dreams", episodes(4, 2), ROBOT)
    write_dataset(root / "hoist", hoisted(40, 3), HOIST)
    write_dataset(root / "hoist_dreams", hoisted(4, 4), HOIST)
    write_dataset(root / "hoist_heldout", hoisted(8, 5), HOIST)
    return root


def opened(folder: Path, name: str, **options) -> Dataset:
    return Dataset(folder / name, HOIST if name.startswith("hoist") else ROBOT, **options)


def tiny(**changes) -> FlowPolicy:
    encoder = PaletteEncoder(width=24, colours=2, slots=4, hidden=48, noise=0.01, dropout=0.0)
    return small(**{"encoder": encoder, **BODIES, **changes})


def train(folder: Path, out: Path, policy=tiny, **knobs) -> dict:  # noqa: ANN001
    knobs = {"steps": 4, "regression_steps": 3, "batch_size": 8, "dreams": [opened(folder, "dreams")], **knobs}
    others = knobs.pop("others", {"hoist": {"real": opened(folder, "hoist")},
                                  "hoist_dream": {"dreams": [opened(folder, "hoist_dreams")]}})  # fmt: skip
    return train_policy(policy, opened(folder, "real"), out=out, others=others, record={}, **knobs)


class Swapped:
    """A policy whose cameras were plugged into each other's places."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.robot, self.horizon = policy, policy.robot, policy.horizon

    def act(self, observations, seeds) -> np.ndarray:
        names = [view.name for view in self.robot.views]
        turned = [replace(o, views=dict(zip(names[::-1], (o.views[n] for n in names), strict=True)))
                  for o in observations]  # fmt: skip
        return self.policy.act(turned, seeds)


def test_two_robots_are_learned_together_and_each_is_told_what_is_its(folder: Path, tmp_path: Path):
    done = train(folder, tmp_path / "p", steps=40, regression_steps=60, batch_size=24, lr=8e-3, regression_lr=8e-3,
                 muon_lr=0.06,
                 warmup=5, ema=0.9, dreams=[], others={"hoist": {"real": opened(folder, "hoist")}})  # fmt: skip
    assert done["results"]["observations"] == [90, 360] and done["parents"].keys() == {"real_0", "real_1"}
    point, hoist = (FlowPolicy.load(tmp_path / "p", robot=robot) for robot in (ROBOT, HOIST))
    held = opened(folder, "hoist_heldout")
    assert open_loop_error(hoist, held) < 0.45
    assert open_loop_error(Swapped(hoist), held) > 1.0
    made = evaluate_open_loop(hoist, held, out=tmp_path / "o", record={})["results"]["open_loop"]["by_part"]
    assert all(part["mae"] < 0.6 * part["control_mae"] for part in made.values())
    assert evaluate(point, Point, out=tmp_path / "e", episodes=8, steps=12, execute=3,
                    record={})["results"]["success"]["rate"] >= 0.9  # fmt: skip
    with pytest.raises(ValueError, match="heldout was made for another robot than embodiment 'point'"):
        open_loop_error(point, held)
    with pytest.raises(ValueError, match="the policy was made for another robot than embodiment 'point'"):
        evaluate(hoist, Point, out=tmp_path / "f", episodes=2, execute=3, record={})
    hoist.speaks = 0  # through the weights of the other one's body
    hoist.spaces.each[0], hoist.spaces.each[2] = hoist.spaces.each[2], hoist.spaces.each[0]
    assert open_loop_error(hoist, held) > 0.8


def test_a_run_of_two_robots_that_is_killed_ends_in_the_same_bits(folder: Path, tmp_path: Path, monkeypatch):
    flare = partial(tiny, align_weight=0.2, align_layer=1, future_tokens=3)
    how = dict(policy=flare, checkpoint_every=2, spread_scale=0.5, steps=4, regression_steps=0, batch_size=140)
    done = train(folder, tmp_path / "whole", **how)
    assert done["parents"].keys() == {"real_0", "real_1", "dream_2", "dream_3"}
    assert done["results"]["observations"] == [90, 360, 36, 36]
    calls, loss = [], FlowPolicy.loss

    def dies(self, batch):
        calls.append(1)
        if len(calls) == 4:  # features pay: as many observations are taken as there are
            raise KeyboardInterrupt
        return loss(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(FlowPolicy, "loss", dies)
        with pytest.raises(KeyboardInterrupt):
            train(folder, tmp_path / "cut", **how)
    assert list((tmp_path / "cut/features").glob("*.f16"))  # of both robots, by the frozen front
    train(folder, tmp_path / "cut", **how)
    one, other = (FlowPolicy.load(tmp_path / name).state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def feed(model: FlowPolicy, folder: Path, **changes) -> Feed:
    given = dict(real=opened(folder, "real"), dreams=[opened(folder, "dreams")],
                 others={"hoist": {"real": opened(folder, "hoist")},
                         "hoist_dream": {"dreams": opened(folder, "hoist_dreams")}})  # fmt: skip
    plain = dict(batch_size=400, ratio="3:1", dream_body="dream", spread_scale=None, options={}, dream_options={},
                 seed=0)  # fmt: skip
    return Feed(model, **{**given, **plain, **changes})


def test_robots_are_drawn_by_the_size_of_their_data_and_dreams_by_the_ratio(folder: Path):
    made = feed(tiny(), folder)
    draw = made.mixture.at(0)
    assert draw.dream.sum() == 100
    share = 360**0.43 / (360**0.43 + 90**0.43)
    assert np.mean(draw.dataset[:300] == 1) == pytest.approx(share, abs=0.06)
    batch = made.at(0)
    assert batch["body"].unique().tolist() == [0, 1, 2, 3]
    assert all((batch["seen"] == 2) == (batch["body"] >= 2)) and batch["pictures"].shape[1:] == (2, 16, 32, 3)


def test_statistics_are_of_each_robot_and_pictures_of_both(folder: Path):
    model = tiny()
    feed(model, folder)
    real, hoist = opened(folder, "real"), opened(folder, "hoist")
    np.testing.assert_allclose(model.other_normalisers["hoist"]["state"].offset, hoist.states().mean(0), rtol=1e-5)
    np.testing.assert_allclose(model.normalise_state.offset, real.states().mean(0), atol=1e-5)
    chunks = model.other_normalisers["hoist"]["action"].offset.view(HORIZON, 3)
    np.testing.assert_allclose(chunks, np.tile(hoist.actions().mean(0), (HORIZON, 1)), rtol=1e-4)
    assert model.encoder.config["views"] == 2 and len(model.encoder.std) == 2 * 2
    found = [model.encoder.measure(torch.from_numpy(chunk.sample(1000))) for chunk in feed(model, folder).chunks[:2]]
    first = torch.cat([found[0], found[1][:, :2]]).std(0) + 0.02  # the front is the first view of both
    torch.testing.assert_close(model.encoder.std[:2], first, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(model.encoder.std[2:], found[1][:, 2:].std(0) + 0.02, atol=1e-4, rtol=1e-3)


def test_the_future_of_a_row_is_that_of_its_own_robot(folder: Path):
    torch.manual_seed(0)
    model = small(**BODIES, align_weight=0.2, align_layer=1, future_tokens=3)
    made = feed(model, folder, batch_size=24)
    batch = made.at(0)
    target = model.flare.embed(batch["future"], batch["words"], batch["seen"])
    draw = made.mixture.at(0)
    order = [k for number in range(4) for k in np.flatnonzero(draw.dataset == number)]  # a batch is told by dataset
    for row, k in enumerate(order):
        data, later = made.datasets[draw.dataset[k]], min(int(draw.row[k]) + HORIZON, 8)
        views = data.views(int(draw.episode[k]), [later])
        own = torch.from_numpy(np.stack([views[view.name][0] for view in data.robot.views]))[None]
        seen = batch["future"][row]
        assert torch.equal(seen[: own.shape[1]], own[0]) and not seen[own.shape[1] :].any()
        want = model.flare.embed(own, batch["words"][row : row + 1])[0]
        torch.testing.assert_close(target[row], want, atol=1e-4, rtol=1e-4)
        assert batch["future_known"][row] == (draw.row[k] + HORIZON < 9)


def test_videos_of_another_robot_train_through_its_body(folder: Path, tmp_path: Path):
    video = opened(tmp_path, strip(folder / "hoist_dreams", tmp_path / "hoist_video").name, actions=False)
    aligned = small(**BODIES, align_weight=0.2, align_layer=1, future_tokens=3)
    made = feed(aligned, folder, others={"hoist": {"real": [opened(folder, "hoist")], "videos": [video]}})
    batch = made.at(0)
    mute = ~batch["valid"].any(1)
    assert mute.any() and (batch["body"][mute] == 2).all()
    with pytest.raises(ValueError, match="no data train the robot 'hoist'.*videos alone teach no actions"):
        feed(aligned, folder, others={"hoist": {"videos": [video]}})
    feed(aligned, folder, others={"hoist": {"videos": [video]}}, fresh=[])  # it begins with weights of another policy
    with pytest.raises(ValueError, match="stage.others.hoist.videos are without actions.*align_weight is 0"):
        feed(small(**BODIES), folder, others={"hoist": {"real": [opened(folder, "hoist")], "videos": [video]}})


def test_what_does_not_fit_is_named(folder: Path, tmp_path: Path):
    hoist = opened(folder, "hoist")
    with pytest.raises(
        ValueError, match="stage.others.hoist is .'recordings'.; expected a map of real, dreams, videos"
    ):
        feed(tiny(), folder, others={"hoist": {"recordings": hoist}})
    with pytest.raises(ValueError, match="stage.others.hoist is Dataset; expected a map of"):
        feed(tiny(), folder, others={"hoist": hoist})
    with pytest.raises(ValueError, match="no embodiment 'crane'; it has .'real', 'dream', 'hoist', 'hoist_dream'."):
        feed(tiny(), folder, others={"crane": {"real": hoist}})
    with pytest.raises(ValueError, match="hoist was made for another robot than embodiment 'point'"):
        feed(tiny(), folder, real=hoist)
    large = replace(HOIST, views=tuple(replace(view, height=32, width=64) for view in HOIST.views))
    with pytest.raises(ValueError, match="'hoist' is seen at 32x64 pixels, the robot 'point' at 16x32"):
        tiny(robots={"hoist": large, "hoist_dream": "hoist"})
    with pytest.raises(ValueError, match="stage.others.hoist.real reads actions"):
        blind = opened(tmp_path, strip(folder / "hoist", tmp_path / "hoist_blind").name, actions=False)
        train(folder, tmp_path / "q", others={"hoist": {"real": blind}})
    with pytest.raises(
        ValueError, match="no data train the robot 'hoist', of the bodies .'hoist', 'hoist_dream'.; give"
    ):
        train(folder, tmp_path / "r", others={})
    twin = replace(ROBOT, name="twin")  # of the same widths and views
    write_dataset(tmp_path / "twin", episodes(2, 1), twin)
    with pytest.raises(ValueError, match="stage.validation, .*twin, was made for another(.|\n)*here point, saved twin"):
        train(folder, tmp_path / "v", validation=Dataset(tmp_path / "twin", twin))


def test_memory_is_that_of_all_datasets_together(folder: Path):
    """10 episodes of 9 pictures of 16 x 32 take 138 KB, 40 with two views eight times as much, 4 dreams 55 KB."""
    made = feed(tiny(), folder, options=dict(memory_gb=200e-6), others={"hoist": {"real": opened(folder, "hoist")}})
    assert [round(1e6 * chunks.held_gb) for chunks in made.chunks] == [138, 0, 55]
    made = feed(tiny(), folder, options=dict(memory_gb=190e-6), others={"hoist": {"real": opened(folder, "hoist")}})
    assert [round(1e6 * chunks.held_gb) for chunks in made.chunks] == [138, 0, 0]
