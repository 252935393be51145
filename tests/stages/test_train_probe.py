"""A judge of positions from recordings to the card: a point that must come home, read off the picture by its column."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from dreamgen.core.clip import Clip, Episode
from dreamgen.core.manifest import is_complete, read_json
from dreamgen.data.lerobot import Dataset
from dreamgen.data.writer import write_dataset
from dreamgen.filters.positions import PositionJudge
from dreamgen.stages.correlation import correlation
from dreamgen.stages.train_probe import train_probe
from dreamgen.worlds.oracle import OracleWorld

sys.path.insert(0, str(Path(__file__).parents[1] / "sims"))
from point import ROBOT, Point, Steady  # noqa: E402


class Bright:
    """Where the brightest column is."""

    names = ("point",)

    def track(self, frames):
        places = (frames[:, 0, :, 0].argmax(1) - 12) / 2
        return np.stack([places, 0 * places, 0 * places], -1)[:, None]


class Blind:
    """Says yes to all."""

    threshold = 0.5

    def judge(self, clips):
        return np.ones(len(clips))


def recorded(root: Path, count: int = 80) -> Dataset:
    """Episodes at many speeds, two of a first state; "wait" is fulfilled by all."""
    made = []
    for k in range(count):
        text, speed, sim = ("wait" if k % 5 == 0 else "home"), np.random.default_rng(k).uniform(-0.1, 0.7), Point()
        sim.reset("home", k // 2)
        seen = [sim.observe()]
        for _ in range(6):
            sim.step(np.array([speed]))
            seen.append(sim.observe())
        made.append(
            Episode(
                instruction=text,
                state=np.stack([one.state for one in seen]),
                action=np.full((7, 1), speed, np.float32),
                video={"eye": np.stack([one.views["eye"] for one in seen])},
                meta={"success": bool(text == "wait" or sim.place >= 1), "pair": f"p{k // 2}"},
            )
        )
    write_dataset(root, made, ROBOT)
    return Dataset(root, ROBOT)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    root = tmp_path_factory.mktemp("probe")
    make = partial(PositionJudge, locator=Bright(), ridge=0.1)
    return root, train_probe(make, [recorded(root / "data")], out=root / "probe", video_hz="5", record={})["results"]


def test_a_killed_stage_reads_on(tmp_path, monkeypatch) -> None:
    data, reads, real = recorded(tmp_path / "data"), [], PositionJudge.features

    def features(self, clip):
        reads.append(clip.id)
        if len(reads) == 50:
            raise KeyboardInterrupt
        return real(self, clip)

    monkeypatch.setattr(PositionJudge, "features", features)
    make = partial(PositionJudge, locator=Bright(), ridge=0.1)
    with pytest.raises(KeyboardInterrupt):
        train_probe(make, [data], out=tmp_path / "probe", video_hz="5", record={})
    train_probe(make, [data], out=tmp_path / "probe", video_hz="5", record={})
    assert len(reads) == 50 + 80 - 32 and not (tmp_path / "probe" / "read").exists()  # a batch of 32 was kept


def test_it_is_measured_on_episodes_that_it_did_not_see(done) -> None:
    root, found = done
    held_out = found["held_out"]
    assert sum(found["episodes"]) == 80 and held_out["n"] + held_out["abstained"] == found["episodes"][2]
    assert held_out["auroc"] > 0.95 and found["abstains"] == ["wait"] and held_out["abstained"] > 0
    assert is_complete(root / "probe") and read_json(root / "probe" / "scores.json") == {"held_out": held_out}
    judge = PositionJudge.load(root / "probe", locator=Bright())
    rates = judge.rates["real"]
    assert (rates.tpr, rates.tnr, judge.threshold) == (held_out["tpr"], held_out["tnr"], found["threshold"])
    video = np.full((7, 16, 24, 3), 128, np.uint8)
    assert np.isnan(judge.judge([Clip(id="w", video=video, video_hz="5", instruction="wait")])).all()


def test_recordings_without_outcome_are_refused(tmp_path) -> None:
    state, action = np.zeros((7, 1), np.float32), np.zeros((7, 1), np.float32)
    video = {"eye": np.zeros((7, 16, 24, 3), np.uint8)}
    write_dataset(tmp_path / "data", [Episode(instruction="home", state=state, action=action, video=video)], ROBOT)
    with pytest.raises(ValueError, match="does not say which episodes succeeded"):
        train_probe(partial(PositionJudge, locator=Bright()), [Dataset(tmp_path / "data", ROBOT)],
                    out=tmp_path / "probe", video_hz="5", record={})  # fmt: skip


OPTIONS = dict(episodes=9, steps=6, execute=3, batch_size=4, films=1, seed=3, seen=["a", "b"], blind=["first_frame"],
               record={})  # fmt: skip


def test_the_probe_has_a_card_of_the_same_dreams(done, tmp_path) -> None:
    world, probe = OracleWorld(sim=Point, video_hz=5, frames=4), PositionJudge.load(done[0] / "probe", locator=Bright())
    policies = {name: Steady(speed) for name, speed in zip("abcdef", (0.0, 0.6, 0.1, 0.2, 0.3, 0.4), strict=True)}
    found = correlation(world, Blind(), Point, policies, out=tmp_path / "a", probe=probe, instructions=["home"],
                        **OPTIONS)["results"]["correlation"]  # fmt: skip
    card = found["probe"]
    keys = {"k", "r", "r_low", "r_high", "rho", "mmrv", "mae", "bias", "regret", "episode_auroc", "tpr", "tnr"}
    assert keys <= set(card) and set(found["blind"]) == {"first_frame"} and "probe" in found["seen"]
    assert card["r"] > 0.9 and card["episode_auroc"] > 0.95 and card["abstained"] == 0  # the dream is right ...
    assert found["r"] is None and found["episode_auroc"] == 0.5  # ... where its judge is not
    rows = [read_json(tmp_path / "a" / "policies" / f"{name}.json") for name in "cdef"]
    assert card["k"] == 4 and all(len(row["probe"]) == 9 for row in rows)
    yes = [np.mean([p >= probe.threshold for p in row["probe"]]) for row in rows]
    assert card["mae"] == pytest.approx(np.mean(np.abs(np.array(yes) - [np.mean(row["real"]) for row in rows])))
    plain = correlation(world, Blind(), Point, policies, out=tmp_path / "b", instructions=["home"], **OPTIONS)
    assert "probe" not in plain["results"]["correlation"]
    with pytest.raises(ValueError, match=r"knows none of the instructions \['away'\].*knows \['home'\]"):
        correlation(world, Blind(), Point, policies, out=tmp_path / "c", probe=probe, instructions=["away"], **OPTIONS)
