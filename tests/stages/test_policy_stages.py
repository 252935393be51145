"""Train and evaluate a policy on a toy robot: a point that must be moved to the left or to the right."""

import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dreamgen.core.clip import Episode, Observation
from dreamgen.core.embodiment import Embodiment, Part, View
from dreamgen.core.seeding import rng_for
from dreamgen.data.lerobot import Dataset
from dreamgen.data.writer import write_dataset
from dreamgen.policies.encoder import TinyEncoder
from dreamgen.policies.policy import FlowPolicy
from dreamgen.stages.evaluate import evaluate
from dreamgen.stages.evaluate_open_loop import evaluate_open_loop
from dreamgen.stages.open_loop import open_loop_error
from dreamgen.stages.train_policy import train_policy

ROBOT = Embodiment(
    name="point", robot_hz="10", views=(View(name="front", key="observation.images.front", height=16, width=32),),
    state=(Part(name="place", start=0, stop=1, unit="m"),),
    action=(Part(name="move", start=0, stop=1, kind="delta", moves="place", limits=(-1, 1)),
            Part(name="lamp", start=1, stop=2, kind="binary", limits=(0, 1))),
)  # fmt: skip
SIDES = {"go left": -1, "go right": 1}
ROWS, HORIZON = 9, 4


class Point:
    """A point at x in [-4, 4], drawn as a bright bar; done at -3 (left) or 3 (right)."""

    robot, instructions = ROBOT, tuple(SIDES)

    def reset(self, instruction: str, seed: int) -> None:
        self.instruction, self.x = instruction, float(rng_for(seed, "x").uniform(-1, 1))

    def observe(self) -> Observation:
        frame = np.zeros((16, 32, 3), np.uint8)
        column = int(round(16 + 3 * self.x))
        frame[:, max(0, column - 2) : column + 2] = 255
        return Observation(views={"front": frame}, state=self.state(), instruction=self.instruction)

    def state(self) -> np.ndarray:
        return np.array([self.x], np.float32)

    def step(self, action: np.ndarray) -> bool:
        self.x = float(np.clip(self.x + action[0], -4, 4))
        return SIDES[self.instruction] * self.x >= 3

    def expert(self) -> Iterator[np.ndarray]:
        while True:
            yield np.array([0.8 * SIDES[self.instruction], float(self.x > 0)], np.float32)

    def close(self) -> None:
        pass


class Oracle:
    """A policy that knows; on the left it fails."""

    robot, horizon = ROBOT, HORIZON

    def act(self, observations, seeds) -> np.ndarray:
        chunk = [[[0.8 * (o.instruction == "go right"), 1]] * HORIZON for o in observations]
        return np.array(chunk, np.float32)


def episodes(n: int, seed: int) -> Iterator[Episode]:
    world = Point()
    for k in range(n):
        instruction = world.instructions[k % 2]
        world.reset(instruction, 100 * seed + k)
        seen, actions = [], []
        for _, action in zip(range(ROWS), world.expert(), strict=False):
            seen.append(world.observe())
            actions.append(action)
            world.step(action)
        yield Episode(instruction=instruction, state=np.stack([o.state for o in seen]), action=np.stack(actions),
                      video={"front": np.stack([o.views["front"] for o in seen])}, meta={"seed": k})  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("point")
    write_dataset(root / "real", episodes(10, 1), ROBOT)
    write_dataset(root / "dreams", episodes(6, 2), ROBOT)
    return root


def small(**changes) -> FlowPolicy:
    encoder = TinyEncoder(width=24, channels=(8, 12), halvings=2, keypoints=3, patches=2, text_width=16, buckets=31)
    return FlowPolicy(
        **{**dict(robot=ROBOT, encoder=encoder, horizon=HORIZON, layers=2, heads=2, head_width=12), **changes}
    )


def run(folder: Path, out: Path, steps: int = 6, **knobs) -> dict:
    knobs = {"policy": small, "dreams": [Dataset(folder / "dreams", ROBOT)], "batch_size": 8, **knobs}
    record = {"steps": steps, **{k: str(v) for k, v in knobs.items() if k not in ("policy", "dreams", "validation")}}
    return train_policy(real=Dataset(folder / "real", ROBOT), out=out, steps=steps, record=record, **knobs)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return FlowPolicy.load(out, robot=ROBOT).state_dict()


def test_training_is_resumed_to_the_bit(folder: Path, tmp_path: Path):
    done = run(folder, tmp_path / "whole", checkpoint_every=4)
    assert done["results"]["observations"] == [10 * ROWS, 6 * ROWS] and not (tmp_path / "whole/training").exists()

    class Killed(Exception):
        pass

    def dies() -> FlowPolicy:
        policy, calls = small(), []
        loss = policy.loss

        def counted(batch):
            calls.append(1)
            if len(calls) > 5:
                raise Killed
            return loss(batch)

        policy.loss = counted
        return policy

    with pytest.raises(Killed):
        run(folder, tmp_path / "killed", policy=dies, checkpoint_every=4)
    assert not (tmp_path / "killed/manifest.json").exists()
    run(folder, tmp_path / "killed", checkpoint_every=4)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(a[k], b[k]) for k in a)
    for left in ("training", "features"):  # by a kill after the manifest
        (tmp_path / "whole" / left).mkdir()
    assert run(folder, tmp_path / "whole", checkpoint_every=4) == done
    assert not any((tmp_path / "whole" / left).exists() for left in ("training", "features"))


def test_it_learns_and_succeeds(folder: Path, tmp_path: Path):
    trained = run(folder, tmp_path / "p", steps=160, batch_size=16, lr=5e-3, warmup=10, ema=0.9, dream_body="real",
                  validation=Dataset(folder / "dreams", ROBOT))  # fmt: skip
    assert trained["results"]["validation"]["flow"] < 0.8
    policy = FlowPolicy.load(tmp_path / "p", robot=ROBOT)
    made = evaluate(policy, Point, out=tmp_path / "e", episodes=10, steps=12, execute=3, record={})
    assert made["results"]["success"]["rate"] >= 0.9
    assert made["parents"].keys() == {"policy"}
    scores = evaluate_open_loop(policy, Dataset(folder / "dreams", ROBOT), out=tmp_path / "o", record={})["results"]
    assert scores["open_loop"]["mae"] < 0.5 * scores["open_loop"]["control_mae"]
    assert len(scores["open_loop"]["by_part"]["move"]["by_horizon"]["mse"]) == HORIZON


def test_evaluation_counts_and_films(tmp_path: Path):
    made = evaluate(Oracle(), Point, out=tmp_path / "a", episodes=7, steps=10, execute=3, films=3, seed=4, record={})[
        "results"
    ]
    assert made["success"]["successes"] == 4 and made["success"]["n"] == 8
    assert made["by_instruction"]["go left"]["rate"] == 0 and made["by_instruction"]["go right"]["rate"] == 1
    assert [p.name for p in sorted((tmp_path / "a/failures").iterdir())] == [f"{k:02d}_go_left.mp4" for k in range(3)]
    rows = json.loads((tmp_path / "a/episodes.json").read_text())
    other = evaluate(
        Oracle(), Point, out=tmp_path / "b", episodes=4, execute=4, seed=4, instructions=["go right"], record={}
    )
    assert other["results"]["success"]["n"] == 4
    seeds = [row["seed"] for row in json.loads((tmp_path / "b/episodes.json").read_text())]
    assert seeds == [row["seed"] for row in rows if row["instruction"] == "go right"]  # paired


def test_open_loop_of_a_known_policy(folder: Path, tmp_path: Path):
    data = Dataset(folder / "real", ROBOT)
    made = evaluate_open_loop(Oracle(), data, out=tmp_path / "o", every=3, record={})["results"]
    assert made["chunks"] == 10 * 3
    move, lamp = (made["open_loop"]["by_part"][name] for name in ("move", "lamp"))
    assert move["mae"] == pytest.approx(0.4) and move["mse"] == pytest.approx(0.32)  # right exact, left off by 0.8
    assert move["control_mae"] == pytest.approx(0.8, abs=1e-4)
    recorded = np.stack([data.episode(i).action[:, 1] for i in range(10)])
    wrong = [1 - recorded[i, row + k] for k in range(HORIZON) for i in range(10) for row in (0, 3, 6) if row + k < ROWS]
    assert lamp["mae"] == pytest.approx(np.mean(wrong), abs=1e-6)


def test_a_placeholder_is_shown_to_no_policy_as_a_state(tmp_path: Path):
    class Shown(Oracle):
        def __init__(self) -> None:
            self.states: list[float] = []

        def act(self, observations, seeds) -> np.ndarray:
            self.states += [float(o.state[0]) for o in observations]
            return super().act(observations, seeds)

    known = np.ones((ROWS, 1), np.float32)
    known[3:] = 0
    dreams = (dataclasses.replace(e, state=e.state * known, extra={"state_known": known}) for e in episodes(2, 3))
    write_dataset(tmp_path / "dreams", dreams, ROBOT)
    data, shown = Dataset(tmp_path / "dreams", ROBOT), [Shown(), Shown()]
    evaluate_open_loop(shown[0], data, out=tmp_path / "o", every=3, record={})
    open_loop_error(shown[1], data, every=3)
    for policy in shown:
        assert np.isnan(policy.states).tolist() == [False, True, True] * 2


def test_errors_are_clear(folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="no episode of .*real is as long as the policy's horizon, 10 rows"):
        run(folder, tmp_path / "a", policy=partial(small, horizon=10))
    with pytest.raises(ValueError, match="no embodiment 'dream'; it has \\['real'\\]"):
        run(folder, tmp_path / "b", policy=partial(small, bodies=["real"]))
    other = dataclasses.replace(ROBOT, name="other")
    with pytest.raises(ValueError, match="name: here other, saved point"):
        run(folder, tmp_path / "c", policy=partial(small, robot=other))
    with pytest.raises(ValueError, match="needs a simulator.*stage=open_loop"):
        evaluate(Oracle(), None, out=tmp_path / "d", record={})
    with pytest.raises(ValueError, match="does not know \\['fly'\\]"):
        evaluate(Oracle(), Point, out=tmp_path / "e", instructions=["fly"], record={})


def test_a_loss_that_is_not_finite_names_the_episodes(folder: Path, tmp_path: Path):
    def breaks() -> FlowPolicy:
        policy, calls = small(), []
        loss = policy.loss

        def counted(batch):
            calls.append(1)
            value, metrics = loss(batch)
            return (value * float("nan") if len(calls) == 5 else value), metrics

        policy.loss = counted
        return policy

    dreams = [Dataset(folder / "dreams", ROBOT, episodes=[3, 5])]
    told = r"the loss is nan at step 4 of episodes .* of .*real; episodes (3|5|3, 5) of .*dreams"
    with pytest.raises(ValueError, match=told):
        run(folder, tmp_path / "p", policy=breaks, dreams=dreams, checkpoint_every=3)
    assert json.loads((tmp_path / "p/training/latest.json").read_text())["step"] == 4
    # the way out that the message names: from the state that was kept, averaged, with its normalisers
    kept = tmp_path / "p/training/step_00000004"
    begun = {}

    def watched() -> FlowPolicy:
        policy = small()
        loss = policy.loss

        def first(batch):
            if not begun:
                begun.update({name: value.clone() for name, value in policy.state_dict().items()})
            return loss(batch)

        policy.loss = first
        return policy

    done = run(folder, tmp_path / "q", policy=watched, dreams=dreams, start=tmp_path / "p", lr=1e-4)
    assert "start" in done["parents"] and done["results"]["steps"] == 6
    for name, value in {**load_file(kept / "buffers.safetensors"), **load_file(kept / "ema.safetensors")}.items():
        assert name not in begun or torch.equal(begun[name], value), name
    again = run(folder, tmp_path / "r", dreams=[], start=tmp_path / "q", steps=1)  # and from a policy
    old, new = weights(tmp_path / "q"), weights(tmp_path / "r")
    assert all(torch.equal(old[name], new[name]) for name in old if name.startswith("normalise"))
    assert again["results"]["observations"] == [10 * ROWS]
    with pytest.raises(ValueError, match="q is no beginning for this model"):
        run(folder, tmp_path / "s", policy=partial(small, layers=3), start=tmp_path / "q")
