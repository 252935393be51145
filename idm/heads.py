"""What belongs to one robot: action encoder and decoder, state reader, statistics, response; saved with the weights."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dreamgen.core import rotations
from dreamgen.core.clip import Labels
from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment, Part
from dreamgen.core.kinematics import command
from dreamgen.data.normaliser import Normaliser
from idm.smooth import correct, correct_turns, fit_response, turned_by

TAPS = 4
QUATERNION = Part(name="", start=0, stop=4, rotation="quaternion_wxyz")


class Heads(nn.Module):
    """Everything of the labeler that is one robot's own."""

    def __init__(self, robot: Embodiment, width: int) -> None:
        super().__init__()
        self.robot = robot
        self.encoder = nn.Linear(robot.action_dim, width)
        self.decoder = nn.Linear(width, robot.action_dim)
        self.reader = nn.Linear(width, robot.state_dim)
        self.action = Normaliser(robot.action_dim, robot.action)
        self.state = Normaliser(robot.state_dim, robot.state)
        # calibrated: a command's effect over the next steps, and the errors on episodes held out; of states 0 till then
        self.register_buffer("response", torch.zeros(len(robot.action), TAPS, dtype=torch.float64))
        self.register_buffer("sigma_action", torch.ones(len(robot.action), dtype=torch.float64))
        self.register_buffer("sigma_state", torch.zeros(len(robot.action), dtype=torch.float64))

    def embed(self, x: Tensor) -> Tensor:
        """Noisy actions (... a), normalised, to (... width)."""
        with torch.autocast(x.device.type, enabled=False):
            return self.encoder(x.float())

    def decode(self, hidden: Tensor) -> Tensor:
        """(... width) to (... a), the size of normalised actions."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.decoder(hidden.float())

    def read_state(self, summary: Tensor) -> Tensor:
        """Normalised state (... d) from a frame's summary token (... width)."""
        with torch.autocast(summary.device.type, enabled=False):
            return self.reader(summary.float())

    def fit(self, actions: list[np.ndarray], states: list[np.ndarray]) -> None:
        """Statistics and responses from training episodes, (s a) and (s d) each."""
        self.action = Normaliser.fit(np.concatenate(actions), self.robot.action)
        if self.robot.state_dim:
            self.state = Normaliser.fit(np.concatenate(states), self.robot.state)
        for index, part in enumerate(self.robot.action):
            if part.kind == "delta" and part.moves:
                moved = self._moved(part)
                pairs = [(a[:, part.slice], s[:, moved.slice]) for a, s in zip(actions, states, strict=True)]
                if part.rotation:
                    pairs = [(rotations.vectors(part, a), turned_by(part, moved, s)) for a, s in pairs]
                elif part.turned_by:
                    wrist = self._moved(self.robot.turning(part)[0])
                    hands = [rotations.read(wrist, s[:, wrist.slice]) for s in states]
                    pairs = [(rotations.rotate(q, a), s) for q, (a, s) in zip(hands, pairs, strict=True)]
                scale = 1.0 if part.rotation else part.scale
                found = fit_response([a for a, _ in pairs], [s for _, s in pairs], scale, TAPS)
                self.response[index] = torch.from_numpy(found)

    def calibrate(self, labels: list[np.ndarray], actions: list[np.ndarray], read: list[np.ndarray],
                  states: list[np.ndarray]) -> dict[str, float]:  # fmt: skip
        """Root mean square errors of labels (s a) against actions and of read states (f d), if any, against states; of
        rotations about an axis, in the part's unit."""
        found = {}
        for index, part in enumerate(self.robot.action):
            found[f"sigma_action_{part.name}"] = sigma = _error(part, labels, actions)
            self.sigma_action[index] = sigma
            if part.moves and read:
                moved = self._moved(part)
                found[f"sigma_state_{moved.name}"] = sigma = _error(moved, read, states)
                self.sigma_state[index] = sigma
        return found

    def _moved(self, part: Part) -> Part:
        return next(p for p in self.robot.state if p.name == part.moves)

    def corrected(self, labels: Labels, states: np.ndarray, clock: Clock, strength: float) -> Labels:
        """Labels whose deltas agree with the states (c d) read from the frames, within limits, binaries untouched.
        Until the errors are calibrated nothing says how much they should, and deltas stay."""
        value = labels.value.copy()
        for index, part in sorted(enumerate(self.robot.action), key=lambda each: not each[1].rotation):
            known = self.response[index].abs().sum() > 0 and self.sigma_state[index] > 0
            if part.kind == "delta" and part.moves and strength and known:
                moved, response = self._moved(part), self.response[index].cpu().numpy()
                sigma, sigma_state = float(self.sigma_action[index]), float(self.sigma_state[index]) / strength**0.5
                axes = self._axes(part, value, states, clock) if part.turned_by else None
                entry = value[:, part.slice] if axes is None else rotations.rotate(axes, value[:, part.slice])
                given = entry, states[:, moved.slice], clock.rows, response
                if part.rotation:
                    value[:, part.slice] = correct_turns(part, moved, *given, sigma_action=sigma * part.radians,
                                                         sigma_position=sigma_state * moved.radians)  # fmt: skip
                else:
                    mended = correct(*given, part.scale, sigma_action=sigma, sigma_position=sigma_state)
                    value[:, part.slice] = (mended if axes is None else
                                            rotations.rotate(rotations.inverse(axes), mended))  # fmt: skip
        return Labels(value=command(self.robot, value), spread=labels.spread)

    def _axes(self, part: Part, value: np.ndarray, states: np.ndarray, clock: Clock) -> np.ndarray:
        """The hand's rotation (s 4) before each step, along whose axes a displacement is told: where the turns lead,
        evenly turned to what the states (c d) say at the frames."""
        turn = self.robot.turning(part)[0]
        wrist = self._moved(turn)
        led = rotations.before(turn, rotations.read(turn, np.concatenate([value[:, turn.slice], [turn.rest]])))
        begun = rotations.product(rotations.read(wrist, states[:, wrist.slice]), rotations.inverse(led[clock.rows]))
        begun = rotations.along(QUATERNION, clock.rows, begun, np.arange(clock.steps))
        return rotations.product(begun, led[:-1])


def _error(part: Part, found: list[np.ndarray], true: list[np.ndarray]) -> float:
    """Root mean square error of a part of rows (s k), of a rotation about an axis."""
    a, b = np.concatenate(found)[:, part.slice], np.concatenate(true)[:, part.slice]
    square = rotations.apart(part, a, b) ** 2 / 3 if part.rotation else (a - b) ** 2
    return float(np.sqrt(square.mean())) + 1e-6


def between_frames(parts: Sequence[Part], clock: Clock, seen: np.ndarray) -> np.ndarray:
    """States (s + 1, d) at the robot steps between frames from those (c d) at the frames: even motion, even turns."""
    steps = np.arange(clock.steps + 1)
    found = np.stack([np.interp(steps, clock.rows, column) for column in seen.T], axis=1)
    for part in parts:
        if part.rotation:
            found[:, part.slice] = rotations.along(part, clock.rows, seen[:, part.slice], steps)
    return found.astype(np.float32)
