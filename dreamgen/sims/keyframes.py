"""Episodes that begin in the middle: the expert's first steps are executed before the episode counts as begun."""

from collections.abc import Callable

from dreamgen.core.protocols import Sim


class FromKeyframe:
    """A simulator whose first states are those after `steps` steps of the expert; all else is the simulator's own."""

    def __init__(self, *, sim: Callable[[], Sim], steps: int) -> None:
        if steps < 0:
            raise ValueError(f"steps is {steps}; expected 0 or more")
        self.sim, self.steps = sim(), steps
        for name in ("robot", "instructions", "observe", "state", "objects", "step", "expert", "close"):
            if hasattr(self.sim, name):  # not every simulator tells where its objects are
                setattr(self, name, getattr(self.sim, name))

    def reset(self, instruction: str, seed: int, *, scene_of: str | None = None) -> None:
        """scene_of: begin as an episode of that instruction does, where the simulator can.

        ValueError if the instruction is fulfilled within these steps: nothing would be left to do.
        """
        other = scene_of is not None and scene_of != instruction
        self.sim.reset(instruction, seed, **({"scene_of": scene_of} if other else {}))
        actions = self.sim.expert(*([scene_of] if other else []))
        for _ in range(self.steps):
            if self.sim.step(next(actions)):
                raise ValueError(f"'{instruction}' is fulfilled within the first {self.steps} steps; begin earlier")
