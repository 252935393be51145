"""Two robots in the world of the moving square, at half its size and thrice its speed: one is told what to do otherwise
than the other."""

from dataclasses import replace

import numpy as np
from moving_square import ROBOT, Squares

from dreamgen.core.clip import Episode
from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment, Part, View

MOVE = replace(ROBOT.action[0], limits=(-3.0, 3.0))
SMALL = replace(
    ROBOT, action=(MOVE, ROBOT.action[1]), views=(View(name="top", key="observation.images.top", height=16, width=24),)
)
# commands the light first and the other way round; its deltas are smaller and point the other way
OTHER = Embodiment(
    name="other",
    robot_hz="10",
    views=(View(name="front", key="observation.images.front", height=16, width=24),),
    action=(
        Part(name="dark", start=0, stop=1, kind="binary", limits=(0.0, 1.0)),
        Part(name="pull", start=1, stop=3, kind="delta", scale=-0.1, moves="place"),
        Part(name="aim", start=3, stop=4, unit="px"),
    ),
    state=(Part(name="lamp", start=0, stop=1), Part(name="place", start=1, stop=3, unit="px")),
)
VIDEO = Clock(robot_hz="20", video_hz="20", frames=9)  # of which the other robot, at 10 Hz, shows every frame


class Small(Squares):
    """The square's own robot in small pictures."""

    robot, root, view = SMALL, "small", "top"

    def __init__(self, count: int, rows: int = 21, seed: int = 0) -> None:
        super().__init__(count, 3 * rows, seed)
        self.episodes = [self.told(*self.thrice(e)) for e in self.episodes]

    def thrice(self, episode: Episode) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """States, actions and pictures of every third row; moves are those of three."""
        move = episode.action[:, :2].reshape(-1, 3, 2).sum(1)
        action = np.concatenate([move, episode.action[::3, 2:]], axis=1)
        return episode.state[::3], action, episode.video["top"][::3, ::2, ::2]

    def told(self, state: np.ndarray, action: np.ndarray, video: np.ndarray) -> Episode:
        """An episode of this robot that shows the same."""
        return Episode(instruction="move", state=state, action=action, video={self.view: video})

    def canvas(self, index: int, rows: np.ndarray) -> np.ndarray:
        return self.episodes[index].video[self.view][rows]


class Others(Small):
    """The other robot in the same world."""

    robot, root, view = OTHER, "others", "front"

    def told(self, state: np.ndarray, action: np.ndarray, video: np.ndarray) -> Episode:
        lamp = np.where(action[:, 2:] > 0, 0.0, 1.0)
        aim = state[:, :1] + 2 * action[:, :1]
        told = np.concatenate([lamp, -20 * action[:, :2], aim], 1).astype(np.float32)
        return super().told(np.concatenate([lamp, state], 1).astype(np.float32), told, video)
