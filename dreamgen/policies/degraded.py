"""Policies made worse on purpose, around any policy: an evaluator must tell them from the good ones.

Each is a Policy itself; what it does depends on the observation and the seed alone, as everywhere.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dreamgen.core.clip import Observation
from dreamgen.core.embodiment import Embodiment
from dreamgen.core.protocols import Policy
from dreamgen.core.seeding import rng_for
from dreamgen.data.streams import late, noisy, stuck


class Degraded:
    """What all of them share: the robot, the horizon, the folder and the memory of the policy inside."""

    def __init__(self, *, policy: Policy) -> None:
        self.policy = policy
        self.path = getattr(policy, "path", None)
        self.remembers = getattr(policy, "remembers", False)

    @property
    def robot(self) -> Embodiment:
        return self.policy.robot

    @property
    def horizon(self) -> int:
        return self.policy.horizon

    def act(self, observations: Sequence[Observation], seeds: Sequence[int], **known: Any) -> np.ndarray:
        """Chunks (b, horizon, a) of the policy inside, changed. known: of a policy that remembers (`sims.rollout.ask`),
        which goes on from its own chunks: it does not know that they are changed."""
        chunks = self.policy.act(observations, seeds, **known)
        return np.stack([self.change(chunk, seed) for chunk, seed in zip(chunks, seeds, strict=True)])

    def change(self, chunk: np.ndarray, seed: int) -> np.ndarray:
        raise NotImplementedError


class Noisy(Degraded):
    """Noise of `size` (share of the half range) on every step; binary commands stay."""

    def __init__(self, *, policy: Policy, size: float) -> None:
        super().__init__(policy=policy)
        self.size = size

    def change(self, chunk: np.ndarray, seed: int) -> np.ndarray:
        return noisy(self.robot, chunk, self.size, rng_for(seed, "noisy"))


class Delayed(Degraded):
    """Every chunk begins `steps` robot steps late; the robot waits."""

    def __init__(self, *, policy: Policy, steps: int) -> None:
        super().__init__(policy=policy)
        self.steps = steps

    def change(self, chunk: np.ndarray, seed: int) -> np.ndarray:
        return late(self.robot, chunk, self.steps)


class Stuck(Degraded):
    """The gripper never leaves its low (high=false) or high command."""

    def __init__(self, *, policy: Policy, high: bool = False) -> None:
        super().__init__(policy=policy)
        self.high = high

    def change(self, chunk: np.ndarray, seed: int) -> np.ndarray:
        return stuck(self.robot, chunk, high=self.high)


class Mistaken(Degraded):
    """Hears the next one of `instructions` in place of the one that was given; the last becomes the first. ValueError
    for fewer than two, and for one that is not among them: it would not be mistaken."""

    def __init__(self, *, policy: Policy, instructions: Sequence[str] | None) -> None:
        super().__init__(policy=policy)
        if len(instructions or ()) < 2:
            raise ValueError(f"a mistaken policy needs 2 or more instructions, got {instructions}; name those that it "
                             "confuses (instructions=[...])")  # fmt: skip
        self.other = dict(zip(instructions, [*instructions[1:], instructions[0]], strict=True))

    def act(self, observations: Sequence[Observation], seeds: Sequence[int], **known: Any) -> np.ndarray:
        if strange := sorted({seen.instruction for seen in observations} - set(self.other)):
            raise ValueError(f"a mistaken policy hears {strange}, not among the instructions that it confuses, "
                             f"{list(self.other)}; add it")  # fmt: skip
        heard = [replace(seen, instruction=self.other[seen.instruction]) for seen in observations]
        return self.policy.act(heard, seeds, **known)
