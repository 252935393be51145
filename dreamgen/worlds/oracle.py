"""A perfect action-conditioned world model: the simulator itself, replayed from the episode's first state.

With it in the place of a learned model, what is left of an evaluator's error is the judge's, and what is left of
counterfactuals is the truth.
"""

from collections.abc import Callable, Sequence

import numpy as np

from dreamgen.core.clip import Clip, Past, Prompt
from dreamgen.core.clock import Clock
from dreamgen.core.protocols import Sim
from dreamgen.sims.rollout import begin
from dreamgen.video.tiling import tile
from dreamgen.worlds.rollout import frame_rows


class OracleWorld:
    """sim: makes a simulator. Prompts must come from it: origin holds its `instruction` and `seed`."""

    def __init__(self, *, sim: Callable[[], Sim], video_hz: str | int = "10", frames: int = 17) -> None:
        self.sim = sim()
        self.robot = self.sim.robot
        self.clock = Clock(robot_hz=self.robot.robot_hz, video_hz=video_hz, frames=frames)

    def picture(self) -> np.ndarray:
        """The canvas (h w 3) now."""
        return tile(self.robot, {name: view[None] for name, view in self.sim.observe().views.items()})[0]

    def imagine(self, pasts: Sequence[Past], actions: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `ActionWorldModel.imagine`."""
        return [self._one(past, action) for past, action in zip(pasts, actions, strict=True)]

    def _one(self, past: Past, action: np.ndarray) -> np.ndarray:
        origin, now = past.prompt.origin, len(past.video) - 1
        if "seed" not in origin or "instruction" not in origin:
            raise ValueError(f"the oracle replays first states of its simulator; the origin of '{past.prompt.id}' is "
                             f"{origin}, without an instruction and a seed")  # fmt: skip
        ends = frame_rows(self.clock, now, len(action))[1:]
        begin(self.sim, origin["instruction"], int(origin["seed"]), past.prompt.state)
        for step in past.action:
            self.sim.step(step)
        frames = []
        for count, step in enumerate(action, 1):
            self.sim.step(step)
            if count in ends:
                frames.append(self.picture())
        return np.stack(frames)

    def close(self) -> None:
        """Close the simulator."""
        self.sim.close()

    def dream(self, prompts: Sequence[Prompt]) -> list[Clip]:
        """One clip per prompt, under its actions. ValueError for a prompt without actions."""
        made = []
        for prompt in prompts:
            if not prompt.action.size:
                raise ValueError(f"prompt '{prompt.id}' has no actions; the oracle only executes")
            past = Past.begin(prompt, self.robot.action_dim)
            video = np.concatenate([prompt.image[None], self._one(past, prompt.action)])
            made.append(Clip(id=prompt.id, video=video, video_hz=self.clock.video_hz, instruction=prompt.instruction,
                             seed=prompt.seed, pair=prompt.pair, state=prompt.state, origin=prompt.origin))  # fmt: skip
        return made
