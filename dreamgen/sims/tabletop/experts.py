"""Scripted experts: smooth motions of the hand through a few poses, one generator per behaviour.

They steer the commanded pose (what the welded hand follows), so the same seed always gives the same actions. They go
a little beyond what success needs, so that an imprecise copy of their actions succeeds too, and then hold still with
the gripper as it was.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from dreamgen.sims.tabletop import scene
from dreamgen.sims.tabletop.tasks import Task

if TYPE_CHECKING:
    from dreamgen.sims.tabletop.sim import Tabletop

GRASP = 0.055  # height of the hand when it grasps a block on the table (m)
CLEAR = 0.065  # the open gripper passes over blocks this much higher
CARRY = 0.105  # a carried block is this high
NEAR = 0.008  # a pose is reached (m)
GAIN, FASTEST, EASE = 0.75, 0.85, 0.5  # share of the way gone in a step; largest action; its largest change in a step


class Expert:
    """One expert in one episode. `actions` yields (4,) float32 in [-1, 1]: translation and gripper (+1 closes)."""

    def __init__(self, sim: "Tabletop", task: Task) -> None:
        self.sim, self.task = sim, task
        self.last = np.zeros(3)
        self.grip = -1.0

    def actions(self) -> Iterator[np.ndarray]:
        yield from getattr(self, f"_{self.task.verb}")()
        while True:
            yield self._act(np.zeros(3), ease=False)

    def _act(self, velocity: np.ndarray, ease: bool = True) -> np.ndarray:
        velocity = velocity / max(1.0, np.abs(velocity).max() / FASTEST)
        self.last = self.last + np.clip(velocity - self.last, -EASE, EASE) if ease else velocity
        return np.array([*self.last, self.grip], np.float32)

    def _reach(self, target: Callable[[], np.ndarray], end: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """Follow `target()` with the commanded pose until that is NEAR it, or NEAR `end`."""
        while np.linalg.norm((target() if end is None else end) - self.sim.commanded) > NEAR:
            yield self._act(GAIN * (target() - self.sim.commanded) / scene.STEP)

    def _wait(self, steps: int, grip: float) -> Iterator[np.ndarray]:
        self.grip = grip
        for _ in range(steps):
            yield self._act(np.zeros(3))

    def _grasp(self) -> Iterator[np.ndarray]:
        """Over the block, down around it, close."""

        def target() -> np.ndarray:
            block = self.sim.block(self.task.colour)
            away = np.linalg.norm(block[:2] - self.sim.commanded[:2])
            return np.array([*block[:2], GRASP + CLEAR * np.clip((away - 0.008) / 0.025, 0, 1)])

        yield from self._reach(target)
        yield from self._wait(4, 1.0)

    def _carry(self, place: Callable[[], np.ndarray], height: float) -> Iterator[np.ndarray]:
        """Lift the grasped block, carry it over `place()` at `height`, set it down, let go."""
        offset = self.sim.commanded - self.sim.block(self.task.colour)
        offset[2] = GRASP - scene.BLOCK

        def target() -> np.ndarray:
            goal, at = place() + offset, self.sim.commanded
            away = np.linalg.norm(goal[:2] - at[:2])
            low = at[2] - offset[2] < 0.7 * height and away > 0.03
            z = goal[2] + (height - place()[2]) * np.clip((away - 0.01) / 0.03, 0, 1)
            return np.array([*(at[:2] if low else goal[:2]), z])

        yield from self._reach(target)
        yield from self._wait(3, -1.0)

    def _plate(self) -> Iterator[np.ndarray]:
        yield from self._grasp()
        yield from self._carry(lambda: np.array([*self.sim.plate, scene.BLOCK + 0.004]), CARRY)

    def _stack(self) -> Iterator[np.ndarray]:
        yield from self._grasp()
        yield from self._carry(lambda: self.sim.block("green") + [0, 0, 2 * scene.BLOCK + 0.004], CARRY + 0.015)

    def _drawer(self) -> Iterator[np.ndarray]:
        yield from self._grasp()
        # the open fingers do not fit into the tray: the block is dropped from just above it
        yield from self._carry(lambda: np.array([*self.sim.tray, 0.095]), CARRY + 0.015)

    def _lift(self) -> Iterator[np.ndarray]:
        yield from self._grasp()
        yield from self._reach(lambda top=self.sim.commanded + [0, 0, 0.155]: top)

    def _push(self) -> Iterator[np.ndarray]:
        self.grip = 1.0
        start = self.sim.block(self.task.colour)
        behind = np.array([start[0], start[1] - 0.07, 0.06])
        yield from self._over(behind, clearance=0.065)
        yield from self._reach(lambda: behind + [0, 0.16, 0])

    def _open(self) -> Iterator[np.ndarray]:
        # the far finger goes down between the bar and the front of the drawer
        hooked = self.sim.handle + [0, 0.035 - scene.FINGER, 0]
        hooked[2] = 0.075
        yield from self._over(hooked)
        yield from self._reach(lambda: hooked - [0, 0.13, 0])

    def _close(self) -> Iterator[np.ndarray]:
        self.grip = 1.0
        before = self.sim.handle - [0, 0.04, 0]
        before[2] = 0.075
        yield from self._over(before)
        yield from self._reach(lambda: before + [0, 0.15, 0])

    def _button(self) -> Iterator[np.ndarray]:
        self.grip = 1.0
        top = np.array([*scene.BUTTON, scene.BUTTON_TOP + scene.TIP + 0.015])
        yield from self._over(top, clearance=0.03)
        yield from self._reach(lambda: top - [0, 0, 0.05])

    def _over(self, pose: np.ndarray, clearance: float = 0.05) -> Iterator[np.ndarray]:
        """To `pose` from above; fingers that close do so before they go down."""

        def target() -> np.ndarray:
            away = np.linalg.norm(pose[:2] - self.sim.commanded[:2])
            closing = max(0.0, self.sim.opening - 0.05) if self.grip > 0 else 0.0
            return pose + [0, 0, clearance * np.clip(max((away - 0.01) / 0.03, 4 * closing), 0, 1)]

        yield from self._reach(target, end=pose)
