"""Evaluators that do not see what a policy does here."""

import sys
from pathlib import Path

import numpy as np

from dreamgen.core.clip import Past
from dreamgen.stages.blind import others, shuffled_actions
from dreamgen.worlds.env import DreamEnv, dream_episodes, looked
from tests.stages.test_correlation import Column, oracle, prompt

sys.path.insert(0, str(Path(__file__).parents[1] / "sims"))
from point import Steady  # noqa: E402


def test_others_do_the_same_task() -> None:
    texts = ["home", "away", "home", "once", "home", "away"]
    for seed in range(4):
        found = others(texts, seed)
        assert sorted(found) == list(range(6)) and [texts[k] for k in found] == texts
        assert [k for k, other in enumerate(found) if k == other] == [3]  # there is no other


def test_other_actions_may_be_shorter_or_longer() -> None:
    env = DreamEnv(world=oracle(), judge=Column(), num_envs=4, steps=6, execute=3, looks="every")
    dreamt = dream_episodes(env, Steady(0.6), [prompt(seed=k) for k in range(9)], range(9))
    lengths = [len(episode.past.action) for episode in dreamt]
    assert set(lengths) == {3, 6}  # from near the home a part of a chunk is enough
    found, donors = shuffled_actions(env, dreamt, 3), others(["home"] * 9, 3)
    ends = [-(k % 3) + 0.6 * lengths[donors[k]] for k in range(9)]
    assert [p >= 0.5 for p in found] == [end >= 1 for end in ends] and {True, False} == {p >= 0.5 for p in found}


def test_all_evaluators_look_when_the_dream_is_looked_at() -> None:
    """An episode that is at home after three steps and away again after six."""
    video = np.zeros((7, 16, 16, 3), np.uint8)
    for row, column in enumerate((9, 11, 13, 14, 13, 11, 9)):
        video[row, :, column] = 255
    past = Past(prompt=prompt(seed=0), video=video, action=np.zeros((6, 1), np.float32))
    every, last = (
        DreamEnv(world=oracle(), judge=Column(), steps=6, execute=3, looks=looks) for looks in ("every", "last")
    )
    assert looked(every, [past])[0] > 0.5 > looked(last, [past])[0]
    assert looked(every, [past], Column(lenient=-2))[0] < 0.5  # another judge, at the same times
