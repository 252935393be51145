"""Training with latent actions beside real ones, controls of dreams, evaluation on the way, execution and pairs."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from dreamgen.core.embodiment import Part
from dreamgen.data.lerobot import Dataset
from dreamgen.data.writer import write_dataset
from dreamgen.policies.chunks import Chunks
from dreamgen.policies.policy import FlowPolicy
from dreamgen.policies.realtime import Ensembled, RealTime
from dreamgen.stages.evaluate import evaluate
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
    (midway,) = done["results"]["midway"]
    assert midway["step"] == 3 and midway["n"] == 4 and 0 <= midway["low"] <= midway["rate"] <= midway["high"]
    assert not (tmp_path / "p/midway/00000003").exists()
    with pytest.raises(ValueError, match="name: here point_latent, saved point"):
        run(folder, tmp_path / "q", policy=policy, dreams=[], latent=[Dataset(folder / "dreams", ROBOT)], steps=3)
    with pytest.raises(ValueError, match="no embodiment 'latent'"):
        run(folder, tmp_path / "r", dreams=[], latent=[latent], steps=3)
    with pytest.raises(ValueError, match="evaluate_every is 2; expected a multiple"):
        run(folder, tmp_path / "s", evaluate_every=2)


def test_states_and_labels_of_dreams_as_controls(folder: Path):
    data = Dataset(folder / "dreams", ROBOT)
    plain = Chunks(data, horizon=HORIZON).batch([(0, 1), (3, 2)])
    zero = Chunks(data, horizon=HORIZON, state="zero").batch([(0, 1), (3, 2)])
    assert (zero["state"] == 0).all() and zero["state_known"].all() and (plain["state"] != 0).any()
    shuffled = Chunks(data, horizon=HORIZON, labels="shuffled")
    donors = [int(k) for k in shuffled.donor]
    assert sorted(donors) == [0, 1, 2, 3] and donors != [0, 1, 2, 3]
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
