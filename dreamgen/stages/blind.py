"""Evaluators that do not see what a policy does here: a dream that is no better than they are evaluates nothing."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dreamgen.core.clip import Past, Prompt
from dreamgen.core.seeding import rng_for
from dreamgen.data.streams import resting
from dreamgen.worlds.env import DreamEnv, Dreamt, looked
from dreamgen.worlds.rollout import follow_prompts

BLIND = ("shuffled_actions", "first_frame", "demos", "validation")


def others(texts: Sequence[str], seed: int) -> list[int]:
    """For each of these episodes another one of the same instruction, which is its own only where there is no other."""
    order, found = rng_for(seed, "shuffled").permutation(len(texts)), np.arange(len(texts))
    for text in dict.fromkeys(texts):
        group = [int(k) for k in order if texts[k] == text]
        found[group] = np.roll(group, 1)  # one cycle: nobody keeps his own
    return found.tolist()


def shuffled_actions(env: DreamEnv, dreamt: Sequence[Dreamt], seed: int) -> list[float]:
    """Probability of success of each episode under what the policy did in another one of the same instruction; nan
    where there is no other."""
    texts = [episode.past.prompt.instruction for episode in dreamt]
    donors = others(texts, seed)
    mine = [k for k, donor in enumerate(donors) if donor != k]
    prompts = [replace(dreamt[k].past.prompt, action=dreamt[donors[k]].past.action) for k in mine]
    found = np.full(len(dreamt), np.nan)
    pasts = follow_prompts(env.world, prompts, batch_size=env.num_envs)
    found[mine] = looked(env, pasts)
    return found.tolist()


def first_frame(env: DreamEnv, prompts: Sequence[Prompt], dreamt: Sequence[Dreamt]) -> list[float]:
    """Probability of success of the first frame held, as if nothing were commanded: it does not hear what the policy
    did either."""
    robot = env.world.robot
    held = [Past(prompt=p, video=np.repeat(p.image[None], len(e.past.video), 0), state=p.state,
                 action=resting(robot, p.state, len(e.past.action)))
            for p, e in zip(prompts, dreamt, strict=True)]  # fmt: skip
    return looked(env, held).tolist()
