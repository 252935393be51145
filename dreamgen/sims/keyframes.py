"""Episodes that begin in the middle: the expert's first steps are executed before the episode counts as begun."""

from collections.abc import Callable, Iterator

import numpy as np

from dreamgen.core.clip import Observation
from dreamgen.core.protocols import Sim


class FromKeyframe:
    """A simulator whose first states are those after `steps` steps of the expert; all else is the simulator's own."""

    def __init__(self, *, sim: Callable[[], Sim], steps: int) -> None:
        if steps < 0:
            raise ValueError(f"steps is {steps}; expected 0 or more")
        self.sim, self.steps = sim(), steps
        self.robot, self.instructions = self.sim.robot, self.sim.instructions

    def reset(self, instruction: str, seed: int) -> None:
        """ValueError if the expert fulfils the instruction within these steps: nothing would be left to do."""
        self.sim.reset(instruction, seed)
        actions = self.sim.expert()
        for _ in range(self.steps):
            if self.sim.step(next(actions)):
                raise ValueError(f"'{instruction}' is fulfilled within the first {self.steps} steps; begin earlier")

    def observe(self) -> Observation:
        return self.sim.observe()

    def state(self) -> np.ndarray:
        return self.sim.state()

    def objects(self) -> dict[str, np.ndarray]:
        return self.sim.objects()

    def step(self, action: np.ndarray) -> bool:
        return self.sim.step(action)

    def expert(self) -> Iterator[np.ndarray]:
        return self.sim.expert()

    def close(self) -> None:
        self.sim.close()
