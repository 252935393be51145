"""Training with latent actions beside real ones, controls of dreams, evaluation on the way, execution and pairs."""

import dataclasses
import json
import os
import signal
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from dreamgen.core.clip import Observation
from dreamgen.core.embodiment import Part
from dreamgen.data.lerobot import Dataset
from dreamgen.data.writer import write_dataset
from dreamgen.policies.chunks import Chunks
from dreamgen.policies.feed import Feed
from dreamgen.policies.palette import PaletteEncoder
from dreamgen.policies.policy import FlowPolicy
from dreamgen.policies.realtime import Ensembled, RealTime
from dreamgen.stages import midway
from dreamgen.stages.evaluate import evaluate
from dreamgen.stages.train_policy import train_policy, validator
from jobs.recipe import load
from tests.data.video_only import strip
from tests.stages.test_policy_stages import HORIZON, ROBOT, Oracle, Point, episodes, run, small

LATENT = dataclasses.replace(ROBOT, name="point_latent", action=(Part(name="latent", start=0, stop=5),))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("point")
    write_dataset(root / "real", episodes(6, 1), ROBOT)
    write_dataset(root / "dreams", episodes(4, 2), ROBOT)
    rng = np.random.default_rng(0)
    latent = [dataclasses.replace(e, action=rng.normal(size=(len(e.action), 5)).astype(np.float32))
              for e in episodes(4, 3)]  # fmt: skip
    write_dataset(root / "latent", latent, LATENT)
    return root


def test_latent_actions_are_learned_beside_real_ones(folder: Path, tmp_path: Path):
    policy = partial(small, bodies=["real", "latent"], robots={"latent": LATENT})
    latent = Dataset(folder / "latent", LATENT)
    done = run(folder, tmp_path / "p", policy=policy, dreams=[], latent=[latent], steps=3, evaluate_every=3, sim=Point,
               evaluate_episodes=4, evaluate_steps=6, evaluate_execute=2)  # fmt: skip
    assert done["results"]["observations"] == [54, 36] and done["parents"].keys() == {"real_0", "latent_1"}
    found = FlowPolicy.load(tmp_path / "p", robot=ROBOT)
    np.testing.assert_allclose(found.spaces.of(1).action.offset.reshape(HORIZON, 5).mean(0),
                               latent.actions().mean(0), atol=0.25)  # fmt: skip
    # evaluated on the way, in another process, as the policy that was saved
    (success,) = done["results"]["midway"]
    assert success["step"] == 3 and success["n"] == 4 and 0 <= success["low"] <= success["rate"] <= success["high"]
    assert not (tmp_path / "p/midway/00000003").exists()
    with pytest.raises(ValueError, match="name: here point_latent, saved point"):
        run(folder, tmp_path / "q", policy=policy, dreams=[], latent=[Dataset(folder / "dreams", ROBOT)], steps=3)
    with pytest.raises(ValueError, match="no embodiment 'latent'"):
        run(folder, tmp_path / "r", dreams=[], latent=[latent], steps=3)
    with pytest.raises(ValueError, match="evaluate_every is 2; expected a multiple"):
        run(folder, tmp_path / "s", evaluate_every=2)


def test_videos_without_actions_train_by_alignment_alone(folder: Path, tmp_path: Path):
    aligned = partial(small, align_weight=0.3, align_layer=1, future_tokens=3)
    video = Dataset(strip(folder / "dreams", tmp_path / "video"), ROBOT, actions=False)
    done = run(folder, tmp_path / "p", policy=aligned, dreams=[], videos=[video], steps=2)
    assert done["results"]["observations"] == [54, 36] and done["parents"].keys() == {"real_0", "video_1"}
    feed = Feed(aligned(), real=Dataset(folder / "real", ROBOT), dreams=[], videos=[video], batch_size=8, ratio="1:1",
                dream_body="dream", spread_scale=0.5, options={}, dream_options={"state": "zero"}, seed=0)  # fmt: skip
    batch = feed.at(0)
    assert batch["row_weight"] == (batch["valid"].sum() / 8) and batch["row_weight"] < HORIZON  # over all rows
    assert batch["valid"].any(1).tolist() == [True] * 4 + [False] * 4 and batch["future_known"][4:].any()
    assert not batch["state_known"][4:].any() and (batch["body"] == 0).all()
    with pytest.raises(ValueError, match="FLARE's alignment alone learns from them, and policy.align_weight is 0"):
        run(folder, tmp_path / "q", dreams=[], videos=[video])
    with pytest.raises(ValueError, match="opened with its actions; open it with actions=false"):
        run(folder, tmp_path / "r", policy=aligned, dreams=[], videos=[Dataset(folder / "dreams", ROBOT)])
    with pytest.raises(ValueError, match="stage.dreams reads actions"):
        run(folder, tmp_path / "s", policy=aligned, dreams=[video])


def test_an_evaluation_on_the_way_that_fails_costs_itself(folder: Path, tmp_path: Path, monkeypatch, caplog):
    def fails(*_, **__):
        raise OSError("the simulator broke")

    monkeypatch.setattr(midway, "ProcessPoolExecutor", lambda n, mp_context, initializer: ThreadPoolExecutor(n))
    monkeypatch.setattr(midway, "rollout", fails)
    options = dict(steps=4, evaluate_every=2, sim=Point, evaluate_episodes=2, evaluate_steps=4, evaluate_execute=2)
    (tmp_path / "p/midway/00000003.partial").mkdir(parents=True)  # of a kill: no snapshot yet
    done = run(folder, tmp_path / "p", **options)
    assert done["results"]["midway"] == [{"step": k, "error": "OSError: the simulator broke"} for k in (2, 4)]
    assert "midway/00000002 has failed: OSError: the simulator broke" in caplog.text
    assert FlowPolicy.load(tmp_path / "p/midway/00000002").horizon == HORIZON  # to look at what went wrong
    assert not (tmp_path / "p/training").exists() and run(folder, tmp_path / "p", **options) == done


def test_an_evaluation_on_the_way_is_of_what_the_recipe_teaches(tmp_path: Path, monkeypatch):
    plans: list = []
    monkeypatch.setattr(midway, "rollout", lambda sim, policy, plan, **_: plans.append(plan) or iter(()))
    monkeypatch.setattr(midway, "success_interval", lambda won, n: {"n": n})
    small().save(tmp_path / "p")
    for asked in (None, ["go right"]):
        midway.measure(FlowPolicy, tmp_path / "p", Point, asked, 4, 6, 2, 0, tmp_path / "p.json")
        small().save(tmp_path / "p")
    assert [text for text, _ in plans[0]] == ["go left", "go right"] * 2
    assert [text for text, _ in plans[1]] == ["go right"] * 4
    cfg = load("train_policy", ["experiment=smoke", "step=policy_real"])[0]
    assert cfg.instructions and cfg.stage.evaluate_instructions == cfg.instructions


def dying(marker: Path) -> Point:
    """A simulator whose process is killed the first time."""
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return Point()


def test_an_evaluation_whose_process_is_killed_begins_again(tmp_path: Path):
    beside = midway.Midway(tmp_path, partial(dying, tmp_path / "killed"), FlowPolicy, episodes=2, steps=2, execute=2,
                           seed=0)  # fmt: skip
    model = small()
    beside.begin(model, 1)
    with pytest.raises(BrokenExecutor):
        beside.begun[tmp_path / "midway/00000001"].result(timeout=300)
    beside.begin(model, 2)  # goes on, in a new process
    found = beside.gather()
    assert [row["step"] for row in found] == [1, 2] and all(row["n"] == 2 for row in found)


def test_two_views_are_looked_at_by_the_palette(tmp_path: Path):
    """What `policy=tiny` says of no robot, its encoder takes from the one at hand."""
    views = tuple(dataclasses.replace(ROBOT.views[0], name=name, key=f"observation.images.{name}")
                  for name in ("front", "wrist"))  # fmt: skip
    robot = dataclasses.replace(ROBOT, views=views, grid=())
    both = [dataclasses.replace(e, video={"front": e.video["front"], "wrist": 255 - e.video["front"]})
            for e in episodes(4, 1)]  # fmt: skip
    write_dataset(tmp_path / "real", both, robot)

    def tiny() -> FlowPolicy:
        encoder = PaletteEncoder(width=24, colours=3, slots=3, hidden=12)
        return FlowPolicy(robot=robot, encoder=encoder, horizon=HORIZON, layers=1, heads=2, head_width=12,
                          align_weight=0.2, align_layer=1, future_tokens=2, align_horizon=2)  # fmt: skip

    real = Dataset(tmp_path / "real", robot)
    train_policy(tiny, real, out=tmp_path / "p", steps=2, regression_steps=1, batch_size=4, record={})
    found = FlowPolicy.load(tmp_path / "p", robot=robot)
    assert found.encoder.config["views"] == 2 and len(found.encoder.std) == 2 * 3
    assert found.future_steps == 2 and found.config["align_horizon"] == 2  # not as far as a chunk
    seen = Observation(views={k: v[0] for k, v in both[0].video.items()}, state=both[0].state[0], instruction="go left")
    assert found.act([seen], [0]).shape == (1, HORIZON, 2)
    with pytest.raises(ValueError, match="align_horizon 0; expected"):
        small(align_weight=0.2, align_layer=1, align_horizon=0)


def test_several_recordings_are_drawn_from_by_their_size(folder: Path, tmp_path: Path):
    real = [Dataset(folder / "real", ROBOT), Dataset(folder / "dreams", ROBOT, episodes=[0])]
    done = train_policy(small, real, [Dataset(folder / "dreams", ROBOT)], out=tmp_path / "p", steps=1, batch_size=4,
                        record={})  # fmt: skip
    assert done["results"]["observations"] == [54, 9, 36] and done["results"]["short_left_out"] == [0, 0, 0]
    assert done["parents"].keys() == {"real_0", "real_1", "dream_2"}
    feed = Feed(small(), real=real, dreams=[], batch_size=1000, ratio="1:1", dream_body="dream", spread_scale=None,
                options={}, dream_options={}, seed=0)  # fmt: skip
    rows = feed.mixture.at(0).dataset
    assert np.mean(rows == 1) == pytest.approx(9**0.43 / (9**0.43 + 54**0.43), abs=0.05)
    assert not feed.mixture.at(0).dream.any()


@torch.no_grad()
def test_held_out_loss_does_not_depend_on_how_many_are_looked_at_at_once(folder: Path):
    torch.manual_seed(0)
    model = small(align_weight=0.3, align_layer=1, future_tokens=3)
    held, seen = Dataset(folder / "dreams", ROBOT), []
    Feed(model, real=held, dreams=[], batch_size=4, ratio="1:1", dream_body="dream", spread_scale=None, options={},
         dream_options={}, seed=0)  # fmt: skip
    plain, common = model.eval().loss, dict(horizon=HORIZON, future_steps=HORIZON, body=0)
    model.loss = lambda batch: seen.append(len(batch["body"])) or plain(batch)
    found = [validator(held, size, common)(model, 0) for size in (9, 36)]
    assert seen == [9, 9, 9, 9, 36]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_policy_acts_for_a_body_that_was_trained(folder: Path, tmp_path: Path):
    dreams, bodies = Dataset(folder / "dreams", ROBOT), []

    def speaks() -> FlowPolicy:
        policy = small(speaks="dream")
        loss = policy.loss

        def heard(batch: dict) -> tuple:
            bodies.extend([] if policy.training else batch["body"].tolist())
            return loss(batch)

        policy.loss = heard
        return policy

    with pytest.raises(ValueError, match="acts for the body 'real', and the data train 'dream' alone.*dream_body=real"):
        train_policy(small, None, [dreams], out=tmp_path / "a", record={})
    train_policy(small, None, [dreams], out=tmp_path / "b", steps=1, batch_size=2, dream_body="real", record={})
    train_policy(speaks, None, [dreams], out=tmp_path / "c", steps=1, batch_size=2, validation=dreams, record={})
    assert bodies == [1] * 8  # held out, as it acts
    assert FlowPolicy.load(tmp_path / "c", robot=ROBOT).speaks == 1


def test_states_and_labels_of_dreams_as_controls(folder: Path):
    data = Dataset(folder / "dreams", ROBOT)
    plain = Chunks(data, horizon=HORIZON).batch([(0, 1), (3, 2)])
    zero = Chunks(data, horizon=HORIZON, state="zero").batch([(0, 1), (3, 2)])
    assert (zero["state"] == 0).all() and zero["state_known"].all() and (plain["state"] != 0).any()
    shuffled = Chunks(data, horizon=HORIZON, labels="shuffled")
    donors = [int(k) for k in shuffled.donor]
    assert sorted(donors) == [0, 1, 2, 3] and all(k != donor for k, donor in enumerate(donors))
    for i in range(4):
        np.testing.assert_array_equal(shuffled.actions(i, 2)[0], Chunks(data, horizon=HORIZON).actions(donors[i], 2)[0])
    with pytest.raises(ValueError, match="labels is 'random'"):
        Chunks(data, horizon=HORIZON, labels="random")


def test_evaluations_are_compared_on_the_same_first_states(tmp_path: Path):
    class Left(Oracle):
        def act(self, observations, seeds) -> np.ndarray:
            return super().act(observations, seeds) * np.array([-1, 1], np.float32)

    options = dict(episodes=6, steps=10, execute=3, films=0, seed=4, record={})
    first = evaluate(Oracle(), Point, out=tmp_path / "a", **options)["results"]
    made = evaluate(Left(), Point, out=tmp_path / "b", against=tmp_path / "a", **options)["results"]["against"]
    assert first["success"]["successes"] == 3 and made["n"] == 6 and made["lost"] == 3 and made["difference"] < 0
    with pytest.raises(ValueError, match="none of these episodes"):
        evaluate(Oracle(), Point, out=tmp_path / "c", against=tmp_path / "a", **{**options, "seed": 5})


def test_chunks_are_joined_in_closed_loop(tmp_path: Path):
    options = dict(episodes=4, steps=10, execute=2, films=0, seed=4, record={})
    plain = evaluate(Oracle(), Point, out=tmp_path / "a", **options)
    mean = evaluate(Oracle(), Point, out=tmp_path / "b", execution=partial(Ensembled, decay=0.1), **options)
    assert mean["results"]["success"] == plain["results"]["success"]  # the oracle never changes its mind
    torch.manual_seed(0)
    policy = small().eval()
    made = [evaluate(policy, Point, out=tmp_path / name, execution=partial(RealTime, delay=1), **options)
            for name in ("c", "d")]  # fmt: skip
    assert made[0]["results"] == made[1]["results"]
    a, b = (json.loads((tmp_path / name / "episodes.json").read_text()) for name in ("c", "d"))
    assert a == b
