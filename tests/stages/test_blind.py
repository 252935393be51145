"""Evaluators that do not see what a policy does here."""

import sys
from pathlib import Path

from dreamgen.stages.blind import others, shuffled_actions
from dreamgen.worlds.env import DreamEnv, dream_episodes
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
