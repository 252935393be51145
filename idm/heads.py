"""What belongs to one robot: action encoder and decoder, state reader, statistics, response; saved with the weights."""

import numpy as np
import torch
from torch import Tensor, nn

from dreamgen.core.clip import Labels
from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment, Part
from dreamgen.data.normaliser import Normaliser
from idm.smooth import correct, fit_response

TAPS = 4


class Heads(nn.Module):
    """Everything of the labeler that is one robot's own."""

    def __init__(self, robot: Embodiment, width: int) -> None:
        super().__init__()
        self.robot = robot
        self.encoder = nn.Linear(robot.action_dim, width)
        self.decoder = nn.Linear(width, robot.action_dim)
        self.reader = nn.Linear(width, robot.state_dim)
        self.action, self.state = Normaliser(robot.action_dim), Normaliser(robot.state_dim)
        # calibrated: a command's effect over the next steps, and the errors on episodes held out
        self.register_buffer("response", torch.zeros(len(robot.action), TAPS, dtype=torch.float64))
        self.register_buffer("sigma_action", torch.ones(len(robot.action), dtype=torch.float64))
        self.register_buffer("sigma_state", torch.ones(len(robot.action), dtype=torch.float64))

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
                found = fit_response([a[:, part.slice] for a in actions], [s[:, moved.slice] for s in states],
                                     part.scale, TAPS)  # fmt: skip
                self.response[index] = torch.from_numpy(found)

    def calibrate(self, labels: list[np.ndarray], actions: list[np.ndarray], read: list[np.ndarray],
                  states: list[np.ndarray]) -> dict[str, float]:  # fmt: skip
        """Root mean square errors of labels (s a) against actions and of read states (f d), if any, against states."""
        found = {}
        wrong = np.concatenate(labels) - np.concatenate(actions)
        astray = np.concatenate(read) - np.concatenate(states) if read else None
        for index, part in enumerate(self.robot.action):
            found[f"sigma_{part.name}"] = sigma = float(np.sqrt((wrong[:, part.slice] ** 2).mean())) + 1e-6
            self.sigma_action[index] = sigma
            if part.moves and astray is not None:
                moved = self._moved(part)
                found[f"sigma_{moved.name}"] = sigma = float(np.sqrt((astray[:, moved.slice] ** 2).mean())) + 1e-6
                self.sigma_state[index] = sigma
        return found

    def _moved(self, part: Part) -> Part:
        return next(p for p in self.robot.state if p.name == part.moves)

    def corrected(self, labels: Labels, states: np.ndarray, clock: Clock, strength: float) -> Labels:
        """Labels whose deltas agree with the states (c d) read from the frames, within limits, binaries untouched."""
        value = labels.value.copy()
        for index, part in enumerate(self.robot.action):
            if part.kind == "delta" and part.moves and strength and self.response[index].abs().sum() > 0:
                value[:, part.slice] = correct(
                    value[:, part.slice], states[:, self._moved(part).slice], clock.rows,
                    self.response[index].cpu().numpy(), part.scale,
                    sigma_action=float(self.sigma_action[index]),
                    sigma_position=float(self.sigma_state[index]) / strength**0.5)  # fmt: skip
            if part.limits and part.kind != "binary":
                value[:, part.slice] = value[:, part.slice].clip(*part.limits)
        return Labels(value=value, spread=labels.spread)
