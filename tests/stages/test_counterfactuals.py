"""Other streams of actions, dreamt by a perfect world and executed: all must agree, and nothing drift."""

import sys
from pathlib import Path

import numpy as np
import pytest

from dreamgen.core.clip import Prompt
from dreamgen.core.embodiment import Embodiment, Part, View
from dreamgen.core.manifest import read_json
from dreamgen.data.clips import ClipFolder
from dreamgen.data.lerobot import Dataset
from dreamgen.data.streams import late, mirrored, noisy, still, stuck
from dreamgen.report.tree import trees
from dreamgen.stages.collect import collect
from dreamgen.stages.dream import dream
from dreamgen.stages.evaluate_counterfactuals import evaluate_counterfactuals
from dreamgen.stages.evaluate_world import evaluate_world
from dreamgen.video.metrics import lpips_or_reason
from dreamgen.worlds.alternatives import ActionPrompts
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
    assert found["before_hallucination"] == 1 and found["untouched"] == 0
    assert found["listening"]["pixels"] > 2 and found["listening"]["hand"] > 1
    assert found["calibration"]["large"]["real"] > found["calibration"]["small"]["real"] > 0
    assert abs(found["calibration"]["large"]["dreamt"] - found["calibration"]["large"]["real"]) < 0.5
    assert read_json(tmp_path / "results" / "world.json") == found and (tmp_path / "films" / "00.mp4").is_file()


def test_dreamt_streams_come_true(tmp_path) -> None:
    streams = ("small", "large", "mirrored", "late", "still", "other")
    prompts = ActionPrompts(sim=Seen, first_frames=3, instructions=["home"], rows=6, streams=streams, seed=4)
    made = prompts()
    assert [p.id for p in made[:3]] == ["a000000_own", "a000000_small", "a000000_large"] and len(made) == 3 * 7
    assert len({p.pair for p in made}) == 3 and len({p.seed for p in made}) == 21
    assert all(np.array_equal(p.image, made[0].image) for p in made[:7])
    assert np.array_equal(made[6].action, made[7].action)  # another first frame's own
    assert np.allclose(made[1].origin["actions"], made[1].action, atol=1e-5)
    dream(oracle(), prompts, out=tmp_path / "dreams", record={})
    assert ClipFolder(tmp_path / "dreams" / "clips").info("a000001_late")["origin"]["stream"] == "late"
    found = evaluate_counterfactuals(tmp_path / "dreams", Column(), Seen, out=tmp_path / "truth", locator=Column(),
                                     near=0.6, record={})["results"]  # fmt: skip
    assert found["success"]["auroc"] == 1 and found["optimism"] == 0 and found["pessimism"] == 0
    assert found["by_stream"]["still"] == {"n": 3, "real": 0.0, "dreamt": 0.0} and found["by_stream"]["own"]["real"] > 0
    assert found["coverage"] == found["precision"] == 1 and found["position_error"]["rock"] == 0
    assert len(read_json(tmp_path / "truth" / "pairs.json")["a000002"]) == 7
    assert len(list((tmp_path / "truth" / "sheets").glob("*.png"))) == 3
    ((pair, tree), *_) = trees(tmp_path / "dreams", tmp_path / "truth", 2)
    assert pair == "a000000" and tree.count("<path") == 7 and tree.count("<image") == 1 + 7 * 4
    assert "judged 0.00, really failed" in tree and trees(tmp_path / "none", None, 2) == []


def test_an_optimist_is_told_so(tmp_path) -> None:
    prompts = ActionPrompts(sim=Seen, first_frames=2, instructions=["home"], rows=6, streams=("still", "large"), seed=4)
    dream(oracle(), prompts, out=tmp_path / "dreams", record={})

    class Optimist(Column):
        def judge(self, clips):
            return np.ones(len(clips))

    found = evaluate_counterfactuals(tmp_path / "dreams", Optimist(), Seen, out=tmp_path / "t", record={})["results"]
    assert found["optimism"] == 1 and found["success"]["auroc"] == 0.5
    with pytest.raises(ValueError, match="needs|against a simulator"):
        evaluate_counterfactuals(tmp_path / "dreams", Optimist(), None, out=tmp_path / "u", record={})


def test_streams_of_recordings_and_policies(recordings) -> None:
    made = ActionPrompts(dataset=recordings, first_frames=2, rows=6, streams=("policy", "other"), policy=Walker(),
                         world=oracle(), execute=3)()  # fmt: skip
    assert [p.origin["stream"] for p in made] == ["own", "policy", "other"] * 2
    acted = made[1].action
    assert acted.shape == (6, 1) and (acted[:3] == acted[0]).all() and 0.2 <= acted[0, 0] <= 0.6
    with pytest.raises(ValueError, match="a policy and a world"):
        ActionPrompts(dataset=recordings, streams=("policy",))()
    with pytest.raises(ValueError, match="either a simulator or a dataset"):
        ActionPrompts(streams=("small",))()


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


def test_streams_in_closed_form() -> None:
    view = View(name="eye", key="observation.images.eye", height=8, width=8)
    arm = Embodiment(name="arm", robot_hz=5, views=[view],
                     action=[Part(name="move", start=0, stop=3, kind="delta", limits=(-1, 1)),
                             Part(name="joint", start=3, stop=4),
                             Part(name="grip", start=4, stop=5, kind="binary")])  # fmt: skip
    action = np.arange(20, dtype=np.float32).reshape(4, 5) / 20
    action[:, 4] = [0, 1, 1, 0]
    assert np.allclose(mirrored(arm, action) * [1, -1, 1, 1, 1], action)
    assert stuck(arm, action, high=True)[:, 4].tolist() == [1] * 4 and stuck(arm, action)[:, 4].tolist() == [0] * 4
    moved = late(arm, action, 1)
    assert np.allclose(moved[1:], action[:3]) and moved[0].tolist() == [0, 0, 0, action[0, 3], 0]
    assert np.allclose(still(arm, action), [[0, 0, 0, action[0, 3], 0]] * 4)
    long = np.zeros((4000, 5), np.float32)
    drawn = noisy(arm, long, 0.2, np.random.default_rng(0), smooth=0.5)
    assert np.allclose(drawn[:, :4].std(0), 0.2, atol=0.02) and (drawn[:, 4] == 0).all()
    assert np.corrcoef(drawn[1:, 3], drawn[:-1, 3])[0, 1] == pytest.approx(0.5, abs=0.05)
    assert np.abs(noisy(arm, long, 3.0, np.random.default_rng(0))[:, :3]).max() == 1
