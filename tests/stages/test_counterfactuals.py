"""Other streams of actions, dreamt by a perfect world and executed: all must agree, and nothing drift."""

import sys
from pathlib import Path

import numpy as np
import pytest

from dreamgen.core.clip import Prompt, read_prompts
from dreamgen.core.embodiment import Embodiment, Part, View
from dreamgen.core.kinematics import follow
from dreamgen.core.manifest import read_json
from dreamgen.data.clips import ClipFolder
from dreamgen.data.lerobot import Dataset
from dreamgen.data.prompts import DatasetPrompts
from dreamgen.data.states import commanded_states
from dreamgen.data.streams import resting
from dreamgen.report.tree import trees
from dreamgen.stages.collect import collect
from dreamgen.stages.dream import dream
from dreamgen.stages.evaluate_counterfactuals import evaluate_counterfactuals
from dreamgen.stages.evaluate_world import evaluate_world
from dreamgen.video.metrics import lpips_or_reason
from dreamgen.worlds.alternatives import ActionPrompts, repeating
from dreamgen.worlds.oracle import OracleWorld
from dreamgen.worlds.search import AdversarialSearch

sys.path.insert(0, str(Path(__file__).parents[1] / "sims"))
from point import ROBOT, Point, Walker  # noqa: E402

ROWS = 9


class Seen(Point):
    """Tells where the point is, and a thing that nothing moves."""

    def objects(self) -> dict[str, np.ndarray]:
        return {"hand": np.array([self.place, 0, 0]), "rock": np.array([3.0, 0, 0])}


class Column:
    """A judge and a tracker in one: reads the place off the picture, half a metre a column."""

    robot, names, threshold = ROBOT, ("hand", "rock"), 0.5

    def judge(self, clips):
        return np.array([float(clip.video[:, 0, :, 0].argmax(1).max() >= 14) for clip in clips])

    def track(self, frames):
        hand = (frames[:, 0, :, 0].argmax(1) - 12) / 2
        return np.stack([np.stack([hand, 0 * hand, 0 * hand], 1), np.tile([3.0, 0, 0], (len(hand), 1))], 1)


def oracle() -> OracleWorld:
    return OracleWorld(sim=Seen, video_hz=5, frames=4)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Dataset:
    root = tmp_path_factory.mktemp("play")
    collect(Seen, out=root, episodes=5, instructions=["home"], source="play", rows=ROWS, truth=True, seed=8, record={})
    return Dataset(root, ROBOT)


def test_the_simulator_tells_where_things_are(recordings) -> None:
    episode = recordings.episode(2)
    assert np.allclose(episode.extra["object.hand"][:, 0], episode.state[:, 0], atol=1e-6)
    assert np.allclose(episode.extra["object.rock"], [[3, 0, 0]] * ROWS)


def test_a_perfect_world_does_not_drift_and_listens(recordings, tmp_path) -> None:
    found = evaluate_world(oracle(), recordings, out=tmp_path, locator=Column(), sim=Seen, episodes=4, batch_size=3,
                           seconds=[1, 1.4, 9], astray=0.6, films=1, record={})["results"]  # fmt: skip
    assert set(found["drift"]) == {"1s", "1.4s", "end"} and (found["frames"], found["episodes"]) == (9, 4)
    for row in found["drift"].values():
        assert ("lpips" in row) == (lpips_or_reason()[0] is not None)
        assert row["psnr"] > 30 and row["ssim"] > 0.95
        assert row["positions"]["hand"]["error"] <= 0.5 and row["positions"]["rock"] == {"error": 0, "floor": 0}
    assert found["before_hallucination"] == 1 and found["untouched"] == found["untouched_floor"] == 0
    assert found["readable"] > 0.9
    assert found["listening"]["pixels"] > 2 and found["listening"]["hand"] > 1
    assert found["calibration"]["large"]["real"] > found["calibration"]["small"]["real"] > 0
    assert abs(found["calibration"]["large"]["dreamt"] - found["calibration"]["large"]["real"]) < 0.5
    assert [row["ratio"] for row in found["calibration"].values()] == [1, 1]  # beside what the tracker reads of it
    assert read_json(tmp_path / "results" / "world.json").items() <= found.items()
    assert (tmp_path / "films" / "00.mp4").is_file()


def test_dreamt_streams_come_true(tmp_path, monkeypatch) -> None:
    streams = ("small", "large", "late", "still", "other")
    prompts = ActionPrompts(sim=Seen, first_frames=3, instructions=["home"], rows=6, streams=streams, seed=4)
    made = prompts()
    assert [p.id for p in made[:3]] == ["a000000_own", "a000000_small", "a000000_large"] and len(made) == 3 * 6
    assert len({p.pair for p in made}) == 3 and len({p.seed for p in made}) == 18
    assert all(np.array_equal(p.image, made[0].image) for p in made[:6])
    assert np.array_equal(made[5].action, made[6].action)  # another first frame's own
    assert np.allclose(made[1].origin["actions"], made[1].action, atol=1e-5)
    dream(oracle(), prompts, out=tmp_path / "dreams", record={})
    assert ClipFolder(tmp_path / "dreams" / "clips").info("a000001_late")["origin"]["stream"] == "late"
    found = evaluate_counterfactuals(tmp_path / "dreams", Column(), Seen, out=tmp_path / "truth", locator=Column(),
                                     near=0.6, record={})["results"]  # fmt: skip
    assert found["success"]["auroc"] == 1 and found["optimism"] == 0 and found["pessimism"] == 0
    assert found["by_stream"]["still"] == {"n": 3, "real": 0.0, "dreamt": 0.0} and found["by_stream"]["own"]["real"] > 0
    hand = found["positions"].pop("hand")
    assert hand["coverage"] == hand["precision"] == hand["read"] == 1 and hand["n"] == 18 and hand["held"] < 1
    assert hand["error"] == hand["floor"] <= 0.25 and found["positions"] == {}  # nothing moves the rock
    assert len(read_json(tmp_path / "truth" / "pairs.json")["a000002"]) == 6
    assert len(list((tmp_path / "truth" / "sheets").glob("*.png"))) == 3
    read = []
    monkeypatch.setattr(ClipFolder, "read", lambda self, id, once=ClipFolder.read: read.append(id) or once(self, id))
    ((pair, tree), *_) = trees(tmp_path / "dreams", tmp_path / "truth", 2)
    assert len(read) == 12  # of the pairs that are shown
    assert pair == "a000000: home" and tree.count("<path") == 6 and tree.count("<image") == 1 + 6 * 4
    assert "judged 0.00, really failed" in tree and trees(tmp_path / "none", None, 2) == []


def test_an_optimist_is_told_so(tmp_path) -> None:
    prompts = ActionPrompts(sim=Seen, first_frames=2, instructions=["home"], rows=6, streams=("still", "large"), seed=4)
    dream(oracle(), prompts, out=tmp_path / "dreams", record={})

    class Optimist(Column):
        def judge(self, clips):
            return np.ones(len(clips))

    found = evaluate_counterfactuals(tmp_path / "dreams", Optimist(), Seen, out=tmp_path / "t", record={})["results"]
    assert found["optimism"] == 1 and found["success"]["auroc"] == 0.5

    class Silent(Column):
        def judge(self, clips):
            return np.array([np.nan if clip.pair == "a000000" else 1.0 for clip in clips])

    partly = evaluate_counterfactuals(tmp_path / "dreams", Silent(), Seen, out=tmp_path / "s", record={})["results"]
    truth = {row["stream"]: row["real"] for row in read_json(tmp_path / "s" / "pairs.json")["a000001"]}
    assert partly["abstained"] == 3
    for stream, row in partly["by_stream"].items():
        assert row == {"n": 1, "real": float(truth[stream]), "dreamt": 1.0}  # both of the clips that are judged
    Silent.instructions = ("away",)
    with pytest.raises(ValueError, match=r"knows none of the instructions \['home'\]"):
        evaluate_counterfactuals(tmp_path / "dreams", Silent(), lambda: None, out=tmp_path / "v", record={})
    with pytest.raises(ValueError, match="needs|against a simulator"):
        evaluate_counterfactuals(tmp_path / "dreams", Optimist(), None, out=tmp_path / "u", record={})


def test_streams_of_recordings_and_policies(recordings) -> None:
    made = ActionPrompts(dataset=recordings, first_frames=2, rows=6, streams=("policy", "other"), policy=Walker(),
                         world=oracle(), execute=3)()  # fmt: skip
    made = read_prompts(made)
    assert [p.origin["stream"] for p in made] == ["own", "policy", "other"] * 2
    acted = made[1].action
    assert acted.shape == (6, 1) and (acted[:3] == acted[0]).all() and 0.2 <= acted[0, 0] <= 0.6
    with pytest.raises(ValueError, match="'policy' needs a policy and a world"):
        ActionPrompts(dataset=recordings, streams=("policy",), policy=Walker())()
    with pytest.raises(ValueError, match="'adversarial' needs a search"):
        ActionPrompts(dataset=recordings, streams=("adversarial",))()
    with pytest.raises(ValueError, match=r"no streams \['odd'\]; expected some of small"):
        ActionPrompts(dataset=recordings, streams=("odd", "small"))()
    for both in ({}, {"sim": Seen, "dataset": recordings}):
        with pytest.raises(ValueError, match="either a simulator or a dataset"):
            ActionPrompts(streams=("small",), **both)()


def test_streams_begin_at_any_row_of_a_recording(recordings) -> None:
    made = ActionPrompts(dataset=recordings, first_frames=7, keyframes=(0, 0.35), rows=6, streams=("other",), seed=4)()
    own = [p for p in made if p.origin["stream"] == "own"]
    assert len(own) == 7 and [p.origin["row"] for p in own] == sorted([0] * 4 + [3] * 3, key=bool)
    for p in own:
        i, row = p.origin["episode"], p.origin["row"]
        assert p.id == f"e{i:06d}{'_r3' * (row > 0)}_own" and ("seed" in p.origin) == ("sim" in p.origin) == (row == 0)
        assert np.array_equal(p.action, recordings.episode(i).action[row : row + 6])
        assert np.array_equal(p.image, recordings.canvas(i, [row])[0])
        assert np.allclose(p.state, commanded_states(recordings.robot, recordings.episode(i))[row])
    assert all(a.origin["episode"] != b.origin["episode"] for a, b in zip(own, own[1:], strict=False))
    with pytest.raises(ValueError, match="has 5 first frames with 6 rows or more from there on; 7 were asked for"):
        ActionPrompts(dataset=recordings, first_frames=7, keyframes=(0, 0.5), rows=6, streams=("other",))()
    with pytest.raises(ValueError, match=r"keyframes is \[0, 0.5\] and first frames come from a simulator"):
        ActionPrompts(sim=Seen, keyframes=[0, 0.5])()


def test_prompts_without_actions_are_refused_where_they_are_needed(recordings, tmp_path) -> None:
    with pytest.raises(ValueError, match="5 of 5 prompts bring no actions .'e000000_s0' is the first.*prompts=actions"):
        dream(oracle(), DatasetPrompts(dataset=recordings), out=tmp_path / "no", needs_actions=True, record={})
    more = dict(dataset=recordings, first_frames=2, rows=6, policy=Walker(), world=oracle(), execute=3)
    some = ActionPrompts(streams=("policy",), **more)
    assert dream(oracle(), some, out=tmp_path / "yes", needs_actions=True, record={})["results"]["clips"] == 4


def test_a_policy_acts_in_all_clips_of_a_batch_at_once(recordings, tmp_path) -> None:
    asked = []

    class Counting(Walker):
        remembers = True

        def act(self, observations, seeds, memories=None, now=0):
            asked.append((len(observations), now))
            assert all(memory.setdefault("asked", now // 3 * 3) == 0 for memory in memories)  # its own from the begin
            return super().act(observations, seeds)

    prompts = ActionPrompts(dataset=recordings, first_frames=4, rows=7, streams=("policy",), policy=Counting(),
                            world=oracle(), execute=3)  # fmt: skip
    alone = [read_prompts([prompt])[0] for prompt in prompts()]
    assert len(asked) == 4 * 3
    del asked[:]
    together = read_prompts(prompts())
    assert asked == [(4, 0), (4, 3), (4, 6)]
    for a, b in zip(alone, together, strict=True):
        assert (a.id, a.seed, a.origin) == (b.id, b.seed, b.origin) and np.array_equal(a.action, b.action)
    del asked[:]
    dream(oracle(), prompts, out=tmp_path, batch_size=6, record={})
    assert asked == [(3, 0), (3, 3), (3, 6), (1, 0), (1, 3), (1, 6)]


def test_streams_that_would_repeat_the_first_are_refused(recordings) -> None:
    made = dict(dataset=recordings, first_frames=1, rows=3)
    for name, why in (("mirrored", "no delta part of 2"), ("stuck", "no binary part"), ("late", "a quarter of 3 rows"),
                      ("other", "no other first frame")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"{name} \(.*{why}.*Leave them out of prompts.streams"):
            ActionPrompts(streams=("small", name), **made)()
    view = View(name="eye", key="observation.images.eye", height=8, width=8)
    grip = Embodiment(name="grip", robot_hz=5, views=[view],
                      action=[Part(name="g", start=0, stop=1, kind="binary", limits=(0, 1))])  # fmt: skip
    assert set(repeating(grip, 2, 8)) == {"small", "large", "adversarial", "mirrored"}


def test_a_policy_acts_within_the_limits_and_its_world_is_placed(recordings) -> None:
    class Wild(Walker):
        remembers = True

        def act(self, observations, seeds, memories=None, now=0):
            memories[0]["asked"] = memories[0].get("asked", []) + [now]
            assert memories[0]["asked"] == list(range(0, now + 1, 3))
            return np.full((1, 3, 1), 7.0, np.float32)

    class Placed(OracleWorld):
        placed = 0

        def place(self):
            Placed.placed += 1

    world = Placed(sim=Seen, video_hz=5, frames=4)
    search = AdversarialSearch(world=world, judge=Column(), population=3, rounds=1)
    made = ActionPrompts(dataset=recordings, first_frames=1, rows=6, streams=("policy", "adversarial"), policy=Wild(),
                         world=world, search=search, execute=3)()  # fmt: skip
    assert Placed.placed == 0  # nothing is dreamt before its turn
    acted, sought = read_prompts(made[1:])
    assert (acted.action == 1).all() and Placed.placed == 4 and sought.origin["probability"] <= 1
    assert [(p.id, p.seed) for p in made[1:]] == [(p.id, p.seed) for p in (acted, sought)]


def test_a_stream_that_is_sought_is_sought_once(recordings, tmp_path) -> None:
    """Whoever shares the work, and however often it is killed."""
    sought = []

    class Counting(AdversarialSearch):
        def __call__(self, prompt, action, seed):
            sought.append(prompt.pair)
            return super().__call__(prompt, action, seed)

    world = oracle()
    search = Counting(world=world, judge=Column(), population=3, rounds=1)
    prompts = ActionPrompts(dataset=recordings, first_frames=2, rows=6, streams=("adversarial",), search=search)
    for shard in (0, 1, 0):
        dream(world, prompts, out=tmp_path, batch_size=2, shard=shard, num_shards=2, record={})
    assert len(sought) == 2 and len(set(sought)) == 2
    alone = read_prompts(prompts())
    folder = ClipFolder(tmp_path / "clips")
    assert all(np.allclose(folder.info(p.id)["origin"]["actions"], p.action, atol=1e-5) for p in alone)


def test_rest_leaves_a_state_as_it_is() -> None:
    view = View(name="eye", key="observation.images.eye", height=8, width=8)
    arm = Embodiment(name="arm", robot_hz=5, views=[view],
                     state=[Part(name="at", start=0, stop=2), Part(name="q", start=2, stop=3),
                            Part(name="open", start=3, stop=4)],
                     action=[Part(name="move", start=0, stop=2, kind="delta", moves="at"),
                             Part(name="go", start=2, stop=3, moves="q", scale=2.0),
                             Part(name="grip", start=3, stop=4, kind="binary", moves="open", sets=(1, 0),
                                  limits=(0, 1)),
                             Part(name="lamp", start=4, stop=5, limits=(1, 3))])  # fmt: skip
    for opening in (0.0, 1.0):
        state = np.array([0.3, -0.2, 0.8, opening], np.float32)
        action = resting(arm, state, 5)
        assert action.shape == (5, 5) and np.allclose(follow(arm, state, action)[0], state)
        assert (action[:, 4] == 1).all()  # 0 is outside its limits
    assert resting(arm, np.zeros(0, np.float32), 3).tolist() == [[0, 0, 0, 0, 1]] * 3


def test_the_search_finds_a_failure_close_by() -> None:
    sim = Seen()
    sim.reset("home", 1)
    prompt = Prompt(id="x", image=sim.observe().views["eye"], instruction="home", seed=1, state=sim.state(),
                    origin={"instruction": "home", "seed": 1})  # fmt: skip
    action = np.full((6, 1), 0.4, np.float32)  # from -1 to 1.4

    class Smooth(Column):
        def judge(self, clips):
            return np.array([clip.video[-1, 0, :, 0].argmax() / 23 for clip in clips])

    search = AdversarialSearch(world=oracle(), judge=Smooth(), size=0.3, population=6, rounds=2)
    assert search.probability(prompt, [action])[0] == pytest.approx(14 / 23)
    changed, least = search(prompt, action, seed=3)
    assert least < 14 / 23 and np.abs(changed - action).max() <= 0.3 + 1e-6
    assert np.array_equal(search(prompt, action, seed=3)[0], changed)
