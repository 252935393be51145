"""The time contract: every conversion between robot steps and video frames.

Frame k of a window that starts at row s shows row `s + floor(k * robot_hz / video_hz)`. Gap k, between frames k and
k + 1, spans the robot steps `[rows[k], rows[k + 1])`, so each action belongs to exactly one gap, also where the rates
do not divide. Windows have a constant rate: a clip of another length never changes the speed of time.
"""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Rates of a robot and of a video of `frames` frames; rates are exact ("10", "50/3")."""

    robot_hz: str | int
    video_hz: str | int
    frames: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "robot_hz", str(self.robot_hz))
        object.__setattr__(self, "video_hz", str(self.video_hz))
        if self.frames < 2:
            raise ValueError(f"a clock needs at least 2 frames, got {self.frames}")
        if not 0 < Fraction(self.video_hz) <= Fraction(self.robot_hz):
            raise ValueError(f"video_hz is {self.video_hz}, robot_hz is {self.robot_hz}; expected 0 < video_hz <= "
                             f"robot_hz: a frame needs a row of its own")  # fmt: skip

    @property
    def stride(self) -> Fraction:
        """Robot steps in one frame gap."""
        return Fraction(self.robot_hz) / Fraction(self.video_hz)

    @property
    def rows(self) -> np.ndarray:
        """Row of each frame relative to the first, (frames,) int64."""
        stride = self.stride
        return np.arange(self.frames, dtype=np.int64) * stride.numerator // stride.denominator

    @property
    def steps(self) -> int:
        """Robot steps that the whole window spans; it needs steps + 1 rows, or steps rows and a final picture."""
        return int(self.rows[-1])

    def gaps(self) -> list[tuple[int, int]]:
        """First and one past the last robot step of each frame gap, frames - 1 pairs."""
        rows = self.rows
        return [(int(a), int(b)) for a, b in zip(rows[:-1], rows[1:], strict=True)]

    def frames_in(self, rows: int) -> int:
        """How many frames of this rate an episode of `rows` rows shows."""
        return int(-(-rows // self.stride))

    def with_frames(self, frames: int) -> "Clock":
        """The same rates over another number of frames."""
        return Clock(robot_hz=self.robot_hz, video_hz=self.video_hz, frames=frames)

    def spec(self) -> dict:
        """Plain JSON, for manifests and checkpoints."""
        return {"robot_hz": self.robot_hz, "video_hz": self.video_hz, "frames": self.frames}
