"""A simulator small enough to know all answers: a point on a line that must reach 1, and a policy that goes there."""

import atexit
import os
import signal
from collections.abc import Iterator, Sequence

import numpy as np

from dreamgen.core.clip import Observation
from dreamgen.core.embodiment import Embodiment, Part, View

ROBOT = Embodiment(
    name="point", robot_hz=5, views=(View(name="eye", key="observation.images.eye", height=16, width=24),),
    state=(Part(name="place", start=0, stop=1),),
    action=(Part(name="move", start=0, stop=1, kind="delta", moves="place", limits=(-1, 1)),),
)  # fmt: skip


class Point:
    """Starts at -(seed % 3); "away" is fulfilled at -5, "home" at 1. The expert fails on seeds that 5 divides."""

    robot = ROBOT
    instructions = ("home", "away")

    def reset(self, instruction: str, seed: int) -> None:
        self.instruction, self.seed, self.place, self.closed = instruction, seed, -float(seed % 3), False

    def state(self) -> np.ndarray:
        return np.array([self.place], np.float32)

    def observe(self) -> Observation:
        picture = np.full((16, 24, 3), 128, np.uint8)
        picture[:, int(np.clip(12 + 2 * self.place, 0, 23))] = 255
        return Observation(views={"eye": picture}, state=self.state(), instruction=self.instruction)

    def step(self, action: np.ndarray) -> bool:
        self.place += float(np.clip(action, -1, 1)[0])
        return self.place >= 1 if self.instruction == "home" else self.place <= -5

    def expert(self) -> Iterator[np.ndarray]:
        speed = 0.0 if self.seed % 5 == 0 else 0.5 if self.instruction == "home" else -0.5
        while True:
            yield np.array([speed], np.float32)

    def close(self) -> None:
        self.closed = True


class Deadly(Point):
    """Its process is killed at the first reset, as by a kernel that is out of memory."""

    def reset(self, instruction: str, seed: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Loud(Point):
    """Complains when its process ends in the ordinary way, as drawing contexts do."""

    def __init__(self) -> None:
        atexit.register(os.write, 2, b"too late")


class Walker:
    """Chunks of 3 steps home; on the seeds of odd episodes it stands still. Each row depends on its seed alone."""

    robot = ROBOT
    horizon = 3

    def act(self, observations: Sequence[Observation], seeds: Sequence[int]) -> np.ndarray:
        rows = [np.full((3, 1), np.random.default_rng(seed).uniform(0.2, 0.6) if o.instruction == "home" else 0.0)
                for o, seed in zip(observations, seeds, strict=True)]  # fmt: skip
        return np.stack(rows).astype(np.float32)


class Steady(Walker):
    """Goes home at one speed, with a little noise that depends on the seed."""

    def __init__(self, speed: float) -> None:
        self.speed = speed

    def act(self, observations, seeds):
        rows = [np.full((3, 1), self.speed + 0.05 * np.random.default_rng(seed).normal()) for seed in seeds]
        return np.stack(rows).astype(np.float32)
