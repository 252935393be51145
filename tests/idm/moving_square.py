"""A robot whose inverse dynamics is plain: a square moved by 2-d deltas, its brightness a binary command."""

import numpy as np

from dreamgen.core.clip import Clip, Episode
from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment, Part, View

ROBOT = Embodiment(
    name="square",
    robot_hz="20",
    views=(View(name="top", key="observation.images.top", height=32, width=48),),
    action=(
        Part(name="move", start=0, stop=2, kind="delta", scale=2.0, limits=(-1.0, 1.0), moves="place"),
        Part(name="light", start=2, stop=3, kind="binary", limits=(-1.0, 1.0)),
    ),
    state=(Part(name="place", start=0, stop=2, unit="px"),),
)
CLOCK = Clock(robot_hz="20", video_hz="10", frames=9)


def draw(place: np.ndarray, light: float) -> np.ndarray:
    """One frame (32 48 3): a soft square of 8 pixels at `place` (x, y), bright or dark."""
    y, x = np.mgrid[:32, :48]
    inside = np.clip(4.5 - np.abs(x - place[0]), 0, 1) * np.clip(4.5 - np.abs(y - place[1]), 0, 1)
    shade = np.array([240, 220, 200]) if light > 0 else np.array([10, 30, 40])
    return (110 + inside[..., None] * (shade - 110)).astype(np.uint8)


class Squares:
    """Episodes in memory with the face of a dataset."""

    robot = ROBOT
    root = "squares"

    def __init__(self, count: int, rows: int = 27, seed: int = 0) -> None:
        self.episodes = []
        for index in range(count):
            rng = np.random.default_rng([seed, index])
            place, action, state, light, frames = rng.uniform((12, 10), (36, 22)), [], [], -1.0, []
            velocity = np.zeros(2)
            for _ in range(rows):
                velocity = np.clip(0.7 * velocity + rng.normal(0, 0.35, 2), -1, 1)
                velocity = np.where((place + 2 * velocity < 6) | (place + 2 * velocity > (41, 25)), 0, velocity)
                light = -light if rng.random() < 0.15 else light
                state.append(place)
                frames.append(draw(place, light))
                action.append([*velocity, light])
                place = place + 2 * velocity
            self.episodes.append(
                Episode(
                    instruction="move",
                    state=np.array(state, np.float32),
                    action=np.array(action, np.float32),
                    video={"top": np.stack(frames)},
                )
            )

    def __len__(self) -> int:
        return len(self.episodes)

    def length(self, index: int) -> int:
        return len(self.episodes[index].action)

    def episode(self, index: int) -> Episode:
        return self.episodes[index]

    def canvas(self, index: int, rows: np.ndarray) -> np.ndarray:
        return self.episodes[index].video["top"][rows]


def clip_of(squares: Squares, index: int, clock: Clock = CLOCK, start: int = 0) -> Clip:
    return Clip(id=f"square_{index}", video=squares.canvas(index, start + clock.rows), video_hz=clock.video_hz,
                instruction="move")  # fmt: skip
