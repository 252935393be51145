"""Search for actions that fail, close to those that should succeed: what would a judge see go wrong first?

A population of small, smooth changes of the actions is dreamt and judged; the next is drawn about the ones that look
least like success (cross-entropy method, de Boer et al. 2005). Changes are never larger than `size`.
"""

from collections.abc import Sequence

import numpy as np

from dreamgen.core.clip import Past, Prompt
from dreamgen.core.protocols import ActionWorldModel, Judge
from dreamgen.core.seeding import rng_for
from dreamgen.data.streams import axes, disturbed, half_range
from dreamgen.engine.precision import place
from dreamgen.worlds.env import judged
from dreamgen.worlds.rollout import extend


class AdversarialSearch:
    """size: largest change as a share of an entry's half range; knots: free points in time, between them is linear."""

    def __init__(self, *, world: ActionWorldModel, judge: Judge, size: float = 0.3, knots: int = 4, rounds: int = 3,
                 population: int = 8, elite: int = 2) -> None:  # fmt: skip
        if not 0 < elite < population or rounds < 1 or knots < 2:
            raise ValueError(f"elite is {elite}, population {population}, rounds {rounds}, knots {knots}; expected 0 < "
                             "elite < population, at least 1 round and 2 knots")  # fmt: skip
        world.robot.require_same(judge, "the judge")
        self.world, self.judge, self.size, self.knots = world, judge, size, knots
        self.rounds, self.population, self.elite = rounds, population, elite

    def place(self) -> None:
        """To the best device."""
        place(self.world, self.judge)

    def changed(self, action: np.ndarray, free: np.ndarray) -> np.ndarray:
        """Actions (s a) moved by knots (k a) in [-1, 1]; binary parts stay."""
        made, at = np.array(action, np.float32), np.linspace(0, len(action) - 1, self.knots)
        for part in self.world.robot.action:
            if part.kind == "binary":
                continue
            own = free[:, part.start : part.start + axes(part)].clip(-1, 1)
            by = np.stack([np.interp(np.arange(len(action)), at, column) for column in own.T], 1)
            made[:, part.slice] = disturbed(part, made[:, part.slice], self.size * half_range(part) * by)
        return made

    def probability(self, prompt: Prompt, actions: Sequence[np.ndarray]) -> np.ndarray:
        """What the judge says of each stream, dreamt. ValueError where it abstains: it proves no failure."""
        pasts = [Past.begin(prompt, self.world.robot.action_dim) for _ in actions]
        found = judged(self.judge, extend(self.world, pasts, list(actions)), self.world.clock.video_hz)
        if np.isnan(found).any():
            raise ValueError(f"the judge abstains on '{prompt.instruction}', so a search for failure has nothing to go "
                             "by; train it on this instruction, choose others, or leave out 'adversarial'")  # fmt: skip
        return found

    def __call__(self, prompt: Prompt, action: np.ndarray, seed: int) -> tuple[np.ndarray, float]:
        """The stream that fails best and its probability of success; never one that fails less than `action`. Where
        no change makes the judge doubt more, that is `action` itself."""
        rng, shape = rng_for(seed, "adversarial"), (self.knots, self.world.robot.action_dim)
        mean, spread = np.zeros(shape), np.full(shape, 0.6)
        best, least = np.array(action, np.float32), float(self.probability(prompt, [action])[0])
        for _ in range(self.rounds):
            free = (mean + spread * rng.normal(size=(self.population, *shape))).clip(-1, 1)
            streams = [self.changed(action, row) for row in free]
            found = self.probability(prompt, streams)
            order = np.argsort(found, kind="stable")[: self.elite]
            mean, spread = free[order].mean(0), np.maximum(free[order].std(0), 0.1)
            if found[order[0]] < least:
                best, least = streams[order[0]], float(found[order[0]])
        return best, least
