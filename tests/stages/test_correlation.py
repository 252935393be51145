"""The whole evaluator on a simulator that knows all answers: with a perfect world and judge, r = 1 and no bias."""

import inspect
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from dreamgen.core.clip import Prompt
from dreamgen.core.manifest import read_json
from dreamgen.data.lerobot import Dataset
from dreamgen.filters.rates import Rates
from dreamgen.policies.degraded import Delayed, Mistaken, Noisy
from dreamgen.sims.keyframes import FromKeyframe
from dreamgen.sims.rollout import ask
from dreamgen.stages.collect import collect
from dreamgen.stages.correlation import correlation
from dreamgen.video.mp4 import read_mp4
from dreamgen.worlds.env import DreamEnv, dream_episodes
from dreamgen.worlds.oracle import OracleWorld

sys.path.insert(0, str(Path(__file__).parents[1] / "sims"))
from point import ROBOT, Point, Steady, Walker  # noqa: E402


class Column:
    """Reads the place off the picture: home is reached at column 14. An instruction of no letter "h" is unknown."""

    threshold = 0.5

    def __init__(self, lenient: int = 0) -> None:
        self.home = 14 - lenient

    def judge(self, clips):
        places = np.array([clip.video[-1, 0, :, 0].argmax() for clip in clips])
        told = 1 / (1 + np.exp(-(places - self.home + 0.5)))
        return np.where([c.instruction == "home" for c in clips], told, np.nan)


class Telling(Column):
    """Says what it knows."""

    instructions = ("home",)


class Reset(Point):
    """Nothing may be simulated in it."""

    def reset(self, instruction, seed):
        raise AssertionError("too late")


POLICIES = {f"speed {s}": Steady(s) for s in (0.0, 0.1, 0.2, 0.3, 0.4, 0.6)}
OPTIONS = dict(episodes=9, instructions=["home"], steps=6, execute=3, batch_size=4, films=2, seed=3, record={})


def oracle() -> OracleWorld:
    return OracleWorld(sim=Point, video_hz=5, frames=4)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("correlation")
    demos = {name: k for k, name in enumerate(POLICIES)}
    return out, correlation(None, Column(), Point, POLICIES, out=out, demos=demos, seen=["speed 0.0", "speed 0.6"],
                            confidence=True, video_hz=5, **OPTIONS)  # fmt: skip


def test_a_perfect_world_and_judge_are_right_about_everything(done) -> None:
    out, manifest = done
    found = manifest["results"]["correlation"]
    assert found == read_json(out / "results" / "correlation.json")
    rows = {name: read_json(out / "policies" / f"{name}.json") for name in POLICIES}
    for row in rows.values():
        assert [p >= 0.5 for p in row["probability"]] == row["real"] and row["agreement"] == [1.0] * 9
    assert 0 < sum(rows["speed 0.3"]["real"]) < 9
    assert found["k"] == 4 and found["headline"] == "unseen policies" and found["seen"]["k"] == 2
    assert found["r"] == pytest.approx(1) and found["rho"] == pytest.approx(1)
    assert [found[key] for key in ("mmrv", "mae", "bias", "regret")] == [0, 0, 0, 0]
    assert [found[key] for key in ("episode_auroc", "tpr", "tnr", "agreement")] == [1, 1, 1, 1]


def test_blind_evaluators_stand_beside(done) -> None:
    found = done[1]["results"]["correlation"]
    keys = {"k", "r", "r_low", "r_high", "rho", "mmrv", "mae", "bias", "regret", "episode_auroc", "tpr", "tnr"}
    assert set(found["blind"]) == {"shuffled_actions", "first_frame", "demos"}  # no recordings for the validation
    assert all(keys <= set(card) for card in [found, *found["blind"].values()])
    first = found["blind"]["first_frame"]
    assert first["r"] is None and first["tpr"] == 0 and first["bias"] < 0  # nobody is home at first
    assert found["blind"]["demos"]["r"] > 0.8 and found["blind"]["demos"]["mae"] is None


def test_every_simulator_is_closed(tmp_path) -> None:
    class Counted(Point):
        def __init__(self) -> None:
            super().__init__()
            held.append(self)

        def close(self) -> None:
            held.remove(self)

    held: list[Point] = []
    two = {name: POLICIES[name] for name in ("speed 0.2", "speed 0.6")}
    correlation(None, Column(), Counted, two, out=tmp_path, video_hz=5, **OPTIONS)
    assert not held


class Doubtful(Column):
    """Right about every episode, but measured elsewhere as one that errs."""

    rates = {"real": Rates(tpr=1.0, tnr=1.0, positives=50, negatives=50),
             "imagined": Rates(tpr=0.7, tnr=0.6, positives=50, negatives=50)}  # fmt: skip


def test_answers_are_corrected_by_the_rates_on_video_of_their_kind(tmp_path) -> None:
    options = {**OPTIONS, "blind": []}
    real = correlation(None, Doubtful(), Point, POLICIES, out=tmp_path / "r", video_hz=5, probe=Doubtful(), **options)
    real = real["results"]["correlation"]
    assert real["corrected"]["mae"] == real["probe"]["corrected"]["mae"] == pytest.approx(0)
    dream = correlation(oracle(), Doubtful(), Point, POLICIES, out=tmp_path / "d", **options)["results"]["correlation"]
    assert dream["mae"] == 0 and "corrected" not in dream  # nobody says on whose dreams its rates were measured


def test_demonstrations_are_known_of_all_or_of_none(tmp_path, caplog) -> None:
    with pytest.raises(ValueError, match="does not say how many demonstrations speed 0.1, speed 0.2"):
        correlation(oracle(), Column(), Point, POLICIES, out=tmp_path, demos={"speed 0.0": 1}, **OPTIONS)
    two = {name: POLICIES[name] for name in ("speed 0.2", "speed 0.6")}
    found = correlation(oracle(), Column(), Point, two, out=tmp_path, demos={"speed 0.2": 1},
                        **{**OPTIONS, "blind": ["validation"]})["results"]["correlation"]  # fmt: skip
    assert found["blind"] == {} and "stage.validation is not given" in caplog.text


def test_films_show_reality_beside_the_dream(done) -> None:
    assert sorted(path.name for path in (done[0] / "films" / "speed 0.3").iterdir()) == ["00.mp4", "08.mp4"]
    films = [read_mp4(done[0] / "films" / name / "00.mp4") for name in ("speed 0.1", "speed 0.6")]
    slow, fast = (np.split(video, 2, axis=2) for video in films)
    assert slow[0].shape == (7, 16, 24, 3) and abs(slow[0].astype(int) - slow[1]).mean() < 3
    real, dreamt = (video[:, 0, :, 0].argmax(1) for video in fast)
    assert real[0] == dreamt[0] < 14 <= real[-2] == real[-1] < dreamt[-1]  # the real episode ends at home


def test_a_run_continues_and_says_what_it_cannot_do(done, tmp_path) -> None:
    with pytest.raises(ValueError, match="abstained on every episode of policy 'speed 0.0'"):
        correlation(oracle(), Column(), Point, POLICIES, out=tmp_path, **{**OPTIONS, "instructions": ["away"]})
    with pytest.raises(ValueError, match=r"knows none of the instructions \['away'\].*knows \['home'\]"):
        correlation(oracle(), Telling(), Reset, POLICIES, out=tmp_path, **{**OPTIONS, "instructions": ["away"]})
    with pytest.raises(ValueError, match="nobody: no such policy"):
        correlation(oracle(), Column(), Point, POLICIES, out=tmp_path, seen=["nobody"], **OPTIONS)
    with pytest.raises(ValueError, match="2 or more"):
        correlation(oracle(), Column(), Point, {"a": Walker()}, out=tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match="has none"):
        correlation(oracle(), Column(), None, POLICIES, out=tmp_path, **OPTIONS)


class Listening(Column):
    """Believes in an episode in which the robot was sent forward, whatever the picture shows."""

    def judge(self, clips):
        return np.array([float((clip.action > 0.01).any()) for clip in clips])


def test_the_first_frame_alone_says_nothing_of_commands(tmp_path) -> None:
    two = {name: POLICIES[name] for name in ("speed 0.2", "speed 0.6")}
    found = correlation(oracle(), Listening(), Point, two, out=tmp_path, **OPTIONS)["results"]["correlation"]
    assert [row["dream"] for row in found["policies"].values()] == [1, 1]
    assert found["blind"]["first_frame"]["tpr"] == 0  # the robot is held still


def test_abstentions_count_on_neither_side(tmp_path) -> None:
    options = {**OPTIONS, "instructions": ["home", "away"], "episodes": 12, "blind": ["first_frame", "demos"]}
    demos = {name: k for k, name in enumerate(POLICIES)}
    found = correlation(oracle(), Column(), Point, POLICIES, out=tmp_path, demos=demos, **options)
    found = found["results"]["correlation"]
    assert (found["abstained"], found["mae"], found["bias"]) == (36, 0, 0) and found["r"] == pytest.approx(1)
    for name, row in found["policies"].items():
        real = read_json(tmp_path / "policies" / f"{name}.json")["real"]
        assert row["n"] == 6 and row["real"] == row["dream"] == np.mean(real[:6])  # "away" is not judged
    assert found["blind"]["first_frame"]["bias"] == -np.mean([row["real"] for row in found["policies"].values()])


def test_what_is_made_of_a_seen_policy_is_seen(tmp_path) -> None:
    worse = {"noise": partial(Noisy, size=0.2), "mistaken": partial(Mistaken, instructions=["home", "away"])}
    names = ["speed 0.1", "speed 0.4"]
    found = correlation(oracle(), Column(), Point, {n: POLICIES[n] for n in names}, out=tmp_path, seen=["speed 0.4"],
                        degraded=worse, demos={"speed 0.1": 3, "speed 0.4": 9}, **OPTIONS)  # fmt: skip
    found = found["results"]["correlation"]
    seen = {name for name, row in found["policies"].items() if row["seen"]}
    assert seen == {"speed 0.4", "speed 0.4_noise", "speed 0.4_mistaken"} and found["k"] == found["seen"]["k"] == 3
    assert read_json(tmp_path / "manifest.json")["results"]["correlation"]["blind"]["demos"]["k"] == 3


def prompt(text: str = "home", seed: int = 0) -> Prompt:
    sim = Point()
    sim.reset(text, seed)
    seen = sim.observe()
    return Prompt(id=f"{text}{seed}", image=seen.views["eye"], instruction=text, seed=seed, state=seen.state,
                  origin={"instruction": text, "seed": seed})  # fmt: skip


def test_the_environment_speaks_gymnasium() -> None:
    env = DreamEnv(world=oracle(), judge=Column(), num_envs=3, steps=6, execute=3, looks="every")
    seen, info = env.reset(options={"prompts": [prompt(seed=0), prompt(seed=1), prompt("away", 2)]})
    assert env.observation_space.contains(seen) and info["instruction"] == ["home", "home", "away"]
    action = np.full((3, 3, 1), 0.4, np.float32)
    assert env.action_space.contains(action)
    seen, reward, terminated, truncated, info = env.step(action)
    assert terminated.tolist() == [True, False, False] and reward.tolist() == [1, 0, 0] and not truncated.any()
    assert np.allclose(seen["state"][:, 0], [1.2, 0.2, -0.8])  # by the embodiment's rule
    assert (seen["eye"][0, 0, :, 0] == 255).argmax() == 14
    seen, reward, terminated, truncated, info = env.step(action)
    assert np.allclose(seen["state"][:, 0], [1.2, 1.4, 0.4])  # the first had ended
    assert terminated.tolist() == [True, True, False] and truncated.tolist() == [False, False, True]
    assert info["abstained"].tolist() == [False, False, True] and reward.tolist() == [0, 1, 0]
    assert [frame.shape for frame in env.render()] == [(16, 24, 3)] * 3
    env.close()


def test_a_judge_is_told_what_was_commanded() -> None:
    told = []

    class Asking(Column):
        def judge(self, clips):
            told.extend(clip.action[:, 0].tolist() for clip in clips)
            return super().judge(clips)

    env = DreamEnv(world=oracle(), judge=Asking(), num_envs=2, steps=6, execute=3)
    env.reset(options={"prompts": [prompt(seed=0), prompt(seed=1)]})
    for speed in (0.1, 0.2):
        env.step(np.full((2, 3, 1), speed, np.float32))
    assert told == [pytest.approx([0.1] * 3 + [0.2] * 3)] * 2


def test_what_the_environment_refuses() -> None:
    env = DreamEnv(world=oracle(), judge=Column(), num_envs=2, steps=6, execute=3)
    with pytest.raises(ValueError, match="give options"):
        env.reset()
    with pytest.raises(ValueError, match="another camera"):
        env.reset(options={"prompts": [Prompt(id="x", image=np.zeros((8, 8, 3), np.uint8), instruction="", seed=0)]})
    env.reset(options={"prompts": [prompt()]})
    with pytest.raises(ValueError, match="part 'move' is 2"):
        env.step(np.full((1, 3, 1), 2.0))
    with pytest.raises(ValueError, match=r"expected \(1, 3, 1\)"):
        env.step(np.zeros((1, 2, 1)))
    with pytest.raises(ValueError, match="steps a multiple of execute"):
        DreamEnv(world=oracle(), judge=Column(), steps=7, execute=3)
    long = DreamEnv(world=oracle(), judge=Column(), steps=8, execute=4)
    with pytest.raises(ValueError, match="chunks have 3 steps, execute is 4"):
        dream_episodes(long, Walker(), [prompt()], [0])
    slow = DreamEnv(world=OracleWorld(sim=Point, video_hz=2, frames=4), judge=Column(), steps=6, execute=3)
    with pytest.raises(ValueError, match="3 robot steps do not end on a frame.*takes 2, 5, 7, 10"):
        dream_episodes(slow, Walker(), [prompt()], [0])


def test_first_states_from_the_middle() -> None:
    sim = FromKeyframe(sim=Point, steps=1)
    sim.reset("home", 8)  # begins at -2
    assert sim.state() == -1.5 and next(sim.expert()) == 0.5
    world = OracleWorld(sim=partial(FromKeyframe, sim=Point, steps=1), video_hz=5)
    first = Prompt(**{**vars(prompt(seed=8)), "state": sim.state(), "image": sim.observe().views["eye"]})
    env = DreamEnv(world=world, judge=Column(), num_envs=1, steps=3, execute=3)
    env.reset(options={"prompts": [first]})
    seen, *_ = env.step(np.full((1, 3, 1), 0.5))
    assert seen["state"][0, 0] == 0 and (seen["eye"][0, 0, :, 0] == 255).argmax() == 12
    assert not hasattr(sim, "objects") and not inspect.signature(sim.expert).parameters  # as the simulator itself


def test_worse_policies_are_worse_in_the_way_they_say() -> None:
    inner, seen = Steady(0.3), [Point()]
    seen[0].reset("home", 4)
    given = [seen[0].observe()]
    plain = inner.act(given, [5])
    assert np.allclose(Delayed(policy=inner, steps=2).act(given, [5])[0, :, 0], [0, 0, plain[0, 0, 0]])
    noise = Noisy(policy=inner, size=0.5).act(given, [5]) - plain
    assert 0.05 < np.abs(noise).mean() < 1.5
    assert np.array_equal(Noisy(policy=inner, size=0.0).act(given, [5]), plain)
    heard = Mistaken(policy=Walker(), instructions=["home", "away"])
    assert (heard.act(given, [5]) == 0).all() and (Walker().act(given, [5]) > 0).all()
    assert heard.horizon == 3 and heard.robot is ROBOT
    with pytest.raises(ValueError, match=r"hears \['home'\], not among the instructions.*\['away', 'off'\]"):
        Mistaken(policy=Walker(), instructions=["away", "off"]).act(given, [5])
    for few in (None, ["home"]):
        with pytest.raises(ValueError, match="2 or more instructions"):
            Mistaken(policy=Walker(), instructions=few)
    asked = []

    class Old(Walker):
        remembers = True

        def act(self, observations, seeds, memories=None, now=0):
            asked.append(now)
            return super().act(observations, seeds)

    for worse in (Noisy(policy=Old(), size=0.1), Mistaken(policy=Old(), instructions=["home", "away"])):
        ask(worse, given, [5], [{}], 7)
    assert asked == [7, 7]


def test_disturbed_experts_share_first_states(tmp_path) -> None:
    collect(Point, out=tmp_path, episodes=8, instructions=["home"], source="perturbed", pairs=4, rows=9, seed=2,
            record={})  # fmt: skip
    dataset = Dataset(tmp_path, ROBOT)
    metas = [dataset.episode(i).meta for i in range(8)]
    assert [meta["pair"] for meta in metas] == ["p000000"] * 4 + ["p000001"] * 4
    for group in (metas[:4], metas[4:]):
        assert len({meta["seed"] for meta in group}) == 1 and group[0]["perturbed"] == "none"
        assert {meta["perturbed"] for meta in group[1:]} <= {"small noise", "large noise", "delay"}
    first = [dataset.episode(i).state[0].tolist() for i in range(8)]
    assert first[:4] == [first[0]] * 4 and len({dataset.episode(i).action.tobytes() for i in range(4)}) == 4
    assert json.dumps(metas)  # plain
    with pytest.raises(ValueError, match="does not tell where its objects are"):
        collect(Point, out=tmp_path / "b", episodes=2, truth=True, record={})
    with pytest.raises(ValueError, match="all alike"):
        collect(Point, out=tmp_path / "c", episodes=2, pairs=2, record={})
