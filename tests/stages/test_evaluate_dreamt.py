"""A policy tried in a dream, without a simulator: with a perfect world and judge it is what the simulator says."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from dreamgen.core.clip import read_prompts
from dreamgen.core.embodiment import Part
from dreamgen.core.manifest import fingerprint, read_json, write_json
from dreamgen.core.seeding import seed_for
from dreamgen.data.lerobot import Dataset
from dreamgen.data.prompts import DatasetPrompts, SimPrompts
from dreamgen.filters.rates import Rates
from dreamgen.policies.encoder import TinyEncoder
from dreamgen.policies.policy import FlowPolicy
from dreamgen.policies.realtime import Ensembled, RealTime
from dreamgen.sims.rollout import rollout
from dreamgen.stages import evaluate_dreamt as stage
from dreamgen.stages.collect import collect
from dreamgen.stages.correlation import correlation
from dreamgen.stages.evaluate_dreamt import evaluate_dreamt
from dreamgen.video.mp4 import read_mp4
from dreamgen.worlds.env import DreamEnv, dream_episodes
from jobs.steps import complete
from tests.stages.test_correlation import Column, oracle

sys.path.insert(0, str(Path(__file__).parents[1] / "sims"))
from point import ROBOT, Point, Steady  # noqa: E402

OPTIONS = dict(steps=6, execute=3, batch_size=4, films=2, seed=3, record={})
WORLD = {"path": "0123", "steps": 8}  # as a manifest records it
IN_WORLD = {**OPTIONS, "record": {"world_model": {**WORLD, "precision": None}}}
RATES = Rates(tpr=0.9, tnr=0.8, positives=40, negatives=40)


class Knowing(Column):
    """Its rates were measured on dreams of a world model, as its manifest says."""

    rates = {"imagined": RATES, "dreamt": RATES}

    def __init__(self, path: Path, world_model: dict | None = None) -> None:
        super().__init__()
        self.path = path
        write_json(path / "manifest.json", {"id": "0", "stage": "train_judge", "config": {"world_model": world_model}})


def prompts(count: int = 9, instructions=("home",)) -> SimPrompts:
    return SimPrompts(sim=Point, first_frames=count, instructions=instructions, seed=2)


def test_the_dream_says_what_the_simulator_says(tmp_path) -> None:
    policy, judge = Steady(0.3), Knowing(tmp_path / "judge", WORLD)
    found = evaluate_dreamt(oracle(), judge, policy, prompts(), out=tmp_path, **IN_WORLD)["results"]
    plan = [(p.origin["instruction"], p.origin["seed"]) for p in prompts()()]
    real = [episode.success for episode in rollout(Point, policy, plan, steps=6, execute=3)]
    rows = read_json(tmp_path / "episodes.json")
    assert [row["success"] for row in rows] == real and 0 < sum(real) < 9
    assert (found["success"]["successes"], found["success"]["n"], found["abstained"]) == (sum(real), 9, 0)
    assert found["corrected"] == RATES.corrected(sum(real), 9)
    assert found["by_instruction"] == {"home": found["success"]} and "agreement" not in found
    assert sorted(p.stem for p in (tmp_path / "films").glob("*.mp4")) == ["f000000_s0", "f000001_s0"]
    assert len(read_mp4(tmp_path / "films" / "f000000_s0.mp4")) == 7


def test_policies_are_compared_episode_by_episode_where_the_judge_speaks(tmp_path) -> None:
    many = prompts(8, ("home", "away"))
    slow, fast = (evaluate_dreamt(oracle(), Column(), Steady(speed), many, out=tmp_path / str(speed), **OPTIONS, **more)
                  for speed, more in ((0.1, {}), (0.6, {"against": tmp_path / "0.1", "confidence": True})))  # fmt: skip
    results = fast["results"]
    assert results["abstained"] == 4 and results["success"]["n"] == 4 and results["corrected"] is None
    assert results["by_instruction"]["away"] is None
    assert results["against"]["n"] == 4 and results["against"]["won"] > 0 == results["against"]["lost"]
    assert results["agreement"] == 1 and slow["results"]["success"]["rate"] < results["success"]["rate"]


def robots(folder: Path) -> Path:
    """A policy of the point and of a wider robot, of which nothing but the point's statistics is learned: it moves
    home by about .3 a step."""
    views = (replace(ROBOT.views[0], name="mast"),)
    arm = replace(ROBOT, name="arm", robot_hz="20", views=views, grid=(), state=(Part(name="joints", start=0, stop=3),),
                  action=(Part(name="joints", start=0, stop=4),))  # fmt: skip
    encoder = TinyEncoder(width=16, channels=(4, 8), halvings=1, keypoints=2, colours=2, patches=2, text_width=8)
    torch.manual_seed(0)
    policy = FlowPolicy(robot=arm, encoder=encoder, bodies=["arm", "point", "point_dream"], layers=2, heads=2,
                        head_width=8, horizon=6, robots={"point": ROBOT, "point_dream": "point"})  # fmt: skip
    rng = np.random.default_rng(1)
    states, chunks = rng.normal(-1, 1, (50, 1)), 0.3 + 0.2 * rng.normal(size=(50, 6, 1))
    policy.fit(states.astype(np.float32), chunks.astype(np.float32), body=1)
    policy.save(folder)
    return folder


@pytest.mark.parametrize("execution", [None, partial(RealTime, delay=1), Ensembled])
@pytest.mark.parametrize("speaks", [None, "point_dream"])
def test_a_policy_of_several_robots_dreams_as_the_one_that_is_asked_for(tmp_path, speaks, execution) -> None:
    path = robots(tmp_path / "policy")
    policy = FlowPolicy.load(path, robot=ROBOT, speaks=speaks)
    assert policy.robot == ROBOT and policy.bodies[policy.speaks] == (speaks or "point")
    acting = policy if execution is None else execution(policy)
    plan = [(p.origin["instruction"], p.origin["seed"]) for p in prompts()()]
    env = DreamEnv(world=oracle(), judge=Column(), num_envs=4, steps=6, execute=3)
    dreams = dream_episodes(env, acting, read_prompts(prompts()()), [seed for _, seed in plan])
    for real, dream in zip(rollout(Point, acting, plan, steps=6, execute=3), dreams, strict=True):
        np.testing.assert_allclose(dream.past.action[: len(real.action)], real.action, atol=1e-5)
    out = tmp_path / "dreamt"
    made = evaluate_dreamt(oracle(), Column(), policy, prompts(), out=out, execution=execution, **OPTIONS)
    seeds = [seed_for(3, "evaluate", p.id) for p in prompts()()]
    again = dream_episodes(env, acting, read_prompts(prompts()()), seeds)
    assert [row["probability"] for row in read_json(out / "episodes.json")] == [e.probability for e in again]
    assert made["parents"] == {"policy": fingerprint(path)} and made["results"]["success"]["n"] == 9


def test_a_policy_that_acts_for_another_robot_is_refused(tmp_path) -> None:
    path = robots(tmp_path / "policy")
    with pytest.raises(
        ValueError, match="the policy was made for another robot than embodiment 'point'(.|\n)*saved arm"
    ):
        evaluate_dreamt(oracle(), Column(), FlowPolicy.load(path), prompts(), out=tmp_path / "a", **OPTIONS)
    with pytest.raises(ValueError, match="knows the robots 'arm' [(]arm[)], 'point' [(]point, point_dream[)]"):
        FlowPolicy.load(path, robot=replace(ROBOT, name="line"))


def test_the_rates_of_one_look_correct_no_other(tmp_path, caplog) -> None:
    judge = Knowing(tmp_path / "judge", WORLD)
    found = evaluate_dreamt(oracle(), judge, Steady(0.3), prompts(), out=tmp_path, looks="every", **IN_WORLD)
    assert found["results"]["corrected"] is None and found["results"]["success"]["n"] == 9
    assert "corrected" not in caplog.text


@pytest.mark.parametrize(
    ("theirs", "told"),
    [(WORLD | {"path": "4567"}, "path: '4567' -> '0123'"), (WORLD | {"steps": 4}, "steps: 4 -> 8"),
      (None, "that it does not name")],
)  # fmt: skip
def test_rates_on_other_dreams_correct_nothing(tmp_path, caplog, theirs, told) -> None:
    judge = Knowing(tmp_path / "judge", theirs)
    found = evaluate_dreamt(oracle(), judge, Steady(0.3), prompts(4), out=tmp_path, **IN_WORLD)["results"]
    assert found["corrected"] is None and found["success"]["n"] == 4
    assert caplog.text.count("is not corrected") == 1 and told in caplog.text and str(judge.path) in caplog.text


def test_policies_are_correlated_by_rates_on_the_same_dreams(tmp_path, caplog) -> None:
    judge, policies = Knowing(tmp_path / "judge", WORLD), {f"speed {s}": Steady(s) for s in (0.1, 0.3, 0.6)}
    options = dict(episodes=9, instructions=["home"], blind=[], **OPTIONS)
    same, other = (
        correlation(oracle(), judge, Point, policies, out=tmp_path / path, **options
                    | {"record": {"world_model": WORLD | {"path": path}}})["results"]["correlation"]
        for path in ("0123", "4567")
    )  # fmt: skip
    assert same["mae"] == 0 < same["corrected"]["mae"]
    assert all(row["corrected"] == RATES.corrected(round(9 * row["dream"]), 9) for row in same["policies"].values())
    assert "corrected" not in other and "corrected" not in other["policies"]["speed 0.6"]
    assert caplog.text.count("path: '0123' -> '4567'") == 1


def test_only_the_same_first_frames_in_the_same_dream_are_compared(tmp_path) -> None:
    first = prompts(4)

    def other() -> list:  # as of another dataset: neither ids nor seeds tell them apart
        return [replace(prompt, image=np.roll(prompt.image, 1, 1)) for prompt in read_prompts(first())]

    options = OPTIONS | {"record": {"steps": 6, "world_model": {"path": "one"}}}
    evaluate_dreamt(oracle(), Column(), Steady(0.1), first, out=tmp_path / "one", **options)
    with pytest.raises(ValueError, match="has none of these episodes"):
        evaluate_dreamt(
            oracle(), Column(), Steady(0.1), other, out=tmp_path / "two", against=tmp_path / "one", **options
        )
    assert not (tmp_path / "two/parts").exists()  # said before the first dream
    options = OPTIONS | {"record": {"steps": 6, "world_model": {"path": "two"}}}
    with pytest.raises(ValueError, match=r"of other settings \(world_model.path: 'one' -> 'two'\)"):
        evaluate_dreamt(oracle(), Column(), Steady(0.1), first, out=tmp_path / "x", against=tmp_path / "one", **options)


class Photos:
    """First frames of a folder, as `FolderPrompts`; here they are drawn in the simulator."""

    def __init__(self, folder: Path) -> None:
        self.source, self.made = folder, prompts(4)

    def __call__(self) -> list:
        return self.made()


def test_photos_are_part_of_the_result(tmp_path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.png").write_bytes(b"1")
    first = evaluate_dreamt(oracle(), Column(), Steady(0.3), Photos(photos), out=tmp_path / "one", **OPTIONS)
    stage = OmegaConf.create({"out": str(tmp_path / "one"), "prompts": {"folder": str(photos)}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobs.steps.record", lambda stage: {})
        assert first["parents"] == {"prompts": fingerprint(photos)} and complete(stage)
        (photos / "a.png").write_bytes(b"2")
        again = fingerprint(photos)
        assert not complete(stage)
    with pytest.raises(ValueError, match=f"parents.prompts: '.*' -> '{again}'"):
        evaluate_dreamt(oracle(), Column(), Steady(0.3), Photos(photos), out=tmp_path / "one", **OPTIONS)
    collect(Point, out=tmp_path / "data", episodes=2, instructions=["home"], source="play", rows=9, record={})
    own = DatasetPrompts(dataset=Dataset(tmp_path / "data", ROBOT))  # the record of its settings tells what it holds
    recorded = evaluate_dreamt(oracle(), Column(), Steady(0.3), own, out=tmp_path / "two", **OPTIONS)
    assert recorded["parents"] == {}


def test_a_killed_run_goes_on_with_its_batch(tmp_path, monkeypatch) -> None:
    whole = evaluate_dreamt(oracle(), Column(), Steady(0.3), prompts(), out=tmp_path / "whole", **OPTIONS)
    real, calls = stage.dreamt_rows, []

    def once(*args):
        calls.append(len(args[2]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(stage, "dreamt_rows", once)
    with pytest.raises(KeyboardInterrupt):
        evaluate_dreamt(oracle(), Column(), Steady(0.3), prompts(), out=tmp_path / "cut", **OPTIONS)
    again = evaluate_dreamt(oracle(), Column(), Steady(0.3), prompts(), out=tmp_path / "cut", **OPTIONS)
    assert calls == [4, 4, 1, 1] and again["results"] == whole["results"]


def test_what_cannot_be_tried_is_said(tmp_path) -> None:
    judge = Column()
    judge.robot = replace(ROBOT, action=(replace(ROBOT.action[0], limits=(-2, 2)),))
    with pytest.raises(ValueError, match="the judge was made for another robot"):
        evaluate_dreamt(oracle(), judge, Steady(0.3), prompts(), out=tmp_path / "a", **OPTIONS)
    with pytest.raises(ValueError, match="there are 0 prompts"):
        evaluate_dreamt(oracle(), Column(), Steady(0.3), list, out=tmp_path / "b", **OPTIONS)
    with pytest.raises(ValueError, match="there are 4 prompts with 2 ids"):
        evaluate_dreamt(oracle(), Column(), Steady(0.3), lambda: prompts(2)() * 2, out=tmp_path / "c", **OPTIONS)


def test_a_list_of_first_frames_draws_none(tmp_path) -> None:
    """A scene is placed and an episode is decoded when it is dreamed, in whatever order; then the simulator closes."""
    sims: list[Point] = []

    class Counted(Point):
        def __init__(self) -> None:
            sims.append(self)
            self.resets, self.closed = [], False

        def reset(self, instruction: str, seed: int) -> None:
            self.resets.append(seed)
            super().reset(instruction, seed)

    made = SimPrompts(sim=Counted, first_frames=5, repeats=2, seed=2)()
    assert sims[0].resets == [] and len(made) == 10
    late, early = read_prompts(made[6:8]), read_prompts(made[:2])
    for p in [*late, *early]:
        alone = Point()
        alone.reset(p.origin["instruction"], p.origin["seed"])
        assert np.array_equal(p.image, alone.observe().views["eye"]) and p.state == alone.state()
    assert len(sims[0].resets) == 2 and not sims[0].closed
    del made
    assert sims[0].closed

    collect(Point, out=tmp_path, episodes=3, instructions=["home"], source="play", rows=9, seed=8, record={})
    data = Dataset(tmp_path, ROBOT)
    decoded, canvas = [], data.canvas
    data.canvas = lambda i, rows: decoded.append(i) or canvas(i, rows)
    made = DatasetPrompts(dataset=data, repeats=2)()
    assert decoded == [] and len(read_prompts(made)) == 6 and decoded == [0, 1, 2]


def test_first_frames_in_the_middle_of_recordings(tmp_path) -> None:
    collect(Point, out=tmp_path, episodes=3, instructions=["home"], source="play", rows=9, seed=8, record={})
    data = Dataset(tmp_path, ROBOT)
    made = read_prompts(DatasetPrompts(dataset=data, keyframes=[0, 0.5, 0.51])())  # the last is the same row
    assert [p.pair for p in made] == [f"e00000{i}{at}" for i in range(3) for at in ("", "_r4")]
    for k, p in enumerate(made):
        i, row = divmod(k, 2)
        assert np.array_equal(p.image, data.canvas(i, [4 * row])[0]) and p.state == data.episode(i).state[4 * row]
        assert ("seed" in p.origin) == (row == 0) and p.origin["row"] == 4 * row
    with pytest.raises(ValueError, match=r"keyframes holds \[1\.0\]; expected shares"):
        DatasetPrompts(dataset=data, keyframes=[0.2, 1.0])()
