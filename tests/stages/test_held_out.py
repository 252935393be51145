"""Episodes that share a first state are held out together; what is held out is scored instruction by instruction."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from dreamgen.core.clock import Clock
from dreamgen.data.groups import groups_of, held_out
from dreamgen.data.joined import Joined
from dreamgen.data.lerobot import Dataset
from dreamgen.data.recordings import Recordings, recorded_clip
from dreamgen.data.writer import write_dataset
from dreamgen.stages.judge_clips import Recorded
from dreamgen.stages.train_judge import measured, three_ways
from dreamgen.stages.train_labeler import Split
from dreamgen.stages.train_labeler import held_out as by_chance
from tests.stages.test_train_judge import ROBOT, episodes


def test_episodes_of_one_first_state_are_not_parted():
    rng = np.random.default_rng(2)
    groups = [f"p{k // 4}" for k in range(160)] + [str(k) for k in range(60)]
    success = np.concatenate([rng.random(160) < np.repeat(rng.random(40), 4), np.arange(60) % 3 == 0])
    parts = three_ways(success, 0.4, 7, groups)
    assert sorted(np.concatenate(parts).tolist()) == list(range(220))
    where = [{groups[k] for k in part} for part in parts]
    assert not (where[0] & where[1] or where[0] & where[2] or where[1] & where[2])
    for part in parts[1:]:
        assert len(part) == pytest.approx(44, abs=4) and success[part].mean() == pytest.approx(success.mean(), abs=0.06)
        assert sum(k < 160 for k in part) == pytest.approx(32, abs=4)  # groups and others alike
    assert three_ways(success, 0.4, 7, [str(k) for k in range(220)]) == three_ways(success, 0.4, 7)
    with pytest.raises(ValueError, match="8 of 16 episodes, of 2 first states, are successes"):
        three_ways(np.arange(16) % 2 == 0, 0.3, 0, ["a"] * 8 + ["b"] * 8)


def test_the_pairs_of_a_recording_are_its_groups(tmp_path):
    made = [replace(episode, meta={**episode.meta, **({"pair": f"p{k // 4}"} if k < 8 else {})})
            for k, episode in enumerate(episodes()[:12])]  # fmt: skip
    write_dataset(tmp_path / "data", made, ROBOT)
    data = Dataset(tmp_path / "data", ROBOT)
    clips = Recorded([data, data], [{i: True for i in range(2, 12)}, {0: True}], "10")
    assert clips.groups == ["0 p0"] * 2 + ["0 p1"] * 4 + ["0 8", "0 9", "0 10", "0 11", "1 p0"]
    for seed in range(5):
        held = held_out(groups_of(data), 5, np.random.default_rng(seed).permutation(12).tolist())
        assert held >= {0, 1, 2, 3} or held.isdisjoint({0, 1, 2, 3})
        assert 5 <= len(held) <= 8 and held_out(groups_of(data), 0, range(12)) == set()
    assert held_out(groups_of(data), 5, [1, 0, 9]) == {0, 1, 2, 3, 9} and held_out(range(12), 2, [5, 3, 8]) == {5, 3}
    clock = Clock(robot_hz=ROBOT.robot_hz, video_hz=ROBOT.robot_hz, frames=2)
    split = Split.of(data, SimpleNamespace(clock=clock), 0.1, 0)
    assert split.apart in ([0, 1, 2, 3], [4, 5, 6, 7]) or len(split.apart) == 1
    assert sorted(split.training + split.apart) == list(range(12))
    both = Joined([data, Dataset(shutil.copytree(tmp_path / "data", tmp_path / "more"), ROBOT)])
    held = held_out(groups_of(both), 6, [1, 9, 12 + 4])
    assert held == {0, 1, 2, 3, 9, 16, 17, 18, 19}  # its namesakes are no siblings
    with pytest.raises(ValueError, match="all 4 episodes of .* that are long enough begin in one state"):
        Split.of(Dataset(tmp_path / "data", ROBOT, episodes=range(4)), SimpleNamespace(clock=clock), 0.1, 0)
    assert [recorded_clip(data, i, clock)[0].pair for i in (0, 5, 9)] == ["p0", "p1", ""]
    assert Recordings(data, clock, "data").read("episode_000007").pair == "p1"


def test_not_all_groups_are_held_out(caplog):
    assert held_out("aabb", 4, [3, 0]) == {2, 3} and not caplog.records
    assert held_out("aaaa", 1, [2, 0]) == set() and "all 4 episodes begin in one state" in caplog.text


def test_a_share_of_the_first_states_is_held_out_of_a_labelers_training(tmp_path):
    """Of a recording by fours, four times that share of the episodes would be."""
    labeler = SimpleNamespace(clock=Clock(robot_hz=ROBOT.robot_hz, video_hz=ROBOT.robot_hz, frames=2))

    def recorded(name: str, size: int) -> Dataset:
        made = [replace(e, meta={**e.meta, **({"pair": f"p{k // size}"} if size > 1 else {})})
                for k, e in enumerate(episodes()[:24])]  # fmt: skip
        write_dataset(tmp_path / name, made, ROBOT)
        return Dataset(tmp_path / name, ROBOT)

    fours, single = recorded("fours", 4), recorded("single", 1)
    for seed in range(5):
        split = Split.of(fours, labeler, 0.34, seed)
        assert len(split.apart) == 8 and len({k // 4 for k in split.apart}) == 2
        assert sorted(split.training + split.apart) == list(range(24))
        split = Split.of(single, labeler, 0.34, seed)
        assert (split.training, split.apart) == by_chance(24, 0.34, seed)
    with pytest.raises(ValueError, match="all 24 episodes of .* begin in one state; .* at least 2 first states"):
        Split.of(recorded("one", 24), labeler, 0.1, 0)


def test_an_instruction_that_a_judge_does_not_tell_is_warned_of(caplog):
    model = SimpleNamespace(threshold=0.5, rates={})
    success = np.arange(40) % 2 == 0
    probability = np.where(success, 0.9, 0.1)
    probability[20:] = 0.3
    texts = ["open"] * 20 + ["lift"] * 20
    found = measured(model, "real", probability, success, [str(k) for k in range(40)], 0, texts)
    assert found["by_instruction"] == {"lift": {"auroc": 0.5, "n": 20, "positives": 10},
                                       "open": {"auroc": 1.0, "n": 20, "positives": 10}}  # fmt: skip
    assert "hardly tells successes of 'lift'" in caplog.text and "'open'" not in caplog.text
