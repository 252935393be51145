"""What a chunk means to the transformer: the frame that its actions are told in, and numbers of unit size.

Parts that move a state part can be told in three frames:

    recorded   as the dataset has them; deltas are summed from the chunk's first step where `cumulative` is set, so that
               small errors do not add up on the way
    relative   where they lead from the state at the chunk's start: deltas are summed, that state is taken off positions
    absolute   where they lead: deltas are summed from that state, positions stay

Binary parts, and parts that move nothing, stay as they are. A state counts in units of the action that moves it
(`Part.scale`).

Displacements that are `turned_by` another part are summed along the axes that the hand has at the chunk's start; where
they lead is told as the state is. Of rotations read composed for summed, and for a difference the turn from one to the
other: T R0 of a rotation R0, or R0 T where the part's frame is "tool". A chunk tells them without wraps and changes of
sign, from the telling on that is nearest to the offset of its first step.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor, nn

from dreamgen.core import rotations
from dreamgen.core.embodiment import Embodiment, Part
from dreamgen.core.kinematics import along, command
from dreamgen.data.normaliser import Normaliser

FRAMES = ("recorded", "relative", "absolute")
FLOOR = 1e-5  # of an entry, in units: what changes by less stands still


class Space:
    """Actions of `robot` in units, (b H a), to what the transformer works on, and back. The two normalisers are the
    policy's own modules: they lie in its checkpoint.

    Raises ValueError for an unknown frame, and for a binary part without limits (its command would have no value).
    """

    def __init__(
        self,
        robot: Embodiment,
        *,
        horizon: int,
        cumulative: bool,
        frame: str,
        state: Normaliser,
        action: Normaliser,
    ) -> None:
        if frame not in FRAMES:
            raise ValueError(f"frame is '{frame}'; expected one of {', '.join(FRAMES)}")
        self.robot, self.horizon, self.state, self.action = robot, horizon, state, action
        state.know(robot.state)
        told = {part.name: frame if part.moves is not None else "recorded" for part in robot.action}
        self.summed = [p for p in robot.action if p.kind == "delta" and (cumulative or told[p.name] != "recorded")]
        added = [p for p in robot.action if (p.kind, told[p.name]) == ("delta", "absolute")]
        taken = [p for p in robot.action if (p.kind, told[p.name]) == ("absolute", "relative")]
        moved = {part.name: part for part in robot.state}
        self.wrists = {p.name: robot.turning(p)[1] for p in added if p.turned_by}
        self.shifts = [(part, moved[str(part.moves)], sign) for parts, sign in ((added, 1.0), (taken, -1.0))
                       for part in parts]  # fmt: skip
        self.relative_to = [k for _, state, _ in self.shifts for k in range(state.start, state.stop)]
        self.turns = [part for part in robot.action if part.rotation]

    @property
    def needs_state(self) -> bool:
        """Whether chunks cannot be told without the state at their start."""
        return bool(self.shifts)

    def tellable(self, known: Bool[Tensor, "b d"]) -> Bool[Tensor, " b"]:
        """Which chunks can be told, by the entries that are known of the state at their start."""
        return known[:, self.relative_to].all(1)

    def fit(
        self,
        state: Float32[np.ndarray, "n d"],
        action: Float32[np.ndarray, "m h a"],
        start: Float32[np.ndarray, "m d"] | None = None,
        *,
        others: tuple[Float32[np.ndarray, "k h a"], Float32[np.ndarray, "k d"] | None] | None = None,
    ) -> None:
        """Take statistics from recorded rows and whole chunks, in units, with the states at which these start. Each
        step of a chunk has its own. Rows that hold NaN are left out, chunks where it stands in what they need; where no
        state is known its numbers, which are never read, stay as they are. others: chunks and starts of other data that
        are learned: an entry that stands still in the first and moves in these is free to move."""
        state = state[np.isfinite(state).all(1)]
        if self.robot.state_dim and len(state):
            self._set(self.state, state, self.robot.state)
        moved = self._moved(action, start)
        first = np.zeros(self.robot.action_dim)
        for part in self.turns:
            first[part.slice] = rotations.middle(part, moved[:, 0, part.slice].numpy())
        moved = self._straight(moved, torch.from_numpy(first))
        parts, width = [replace(part, rotation="") for part in self.robot.action], self.robot.action_dim
        parts = [replace(part, start=part.start + k * width, stop=part.stop + k * width)
                 for k in range(self.horizon) for part in parts]  # fmt: skip
        self._set(self.action, moved.flatten(1).numpy(), parts)
        if others is not None and len(others[0]):
            elsewhere = self._straight(self._moved(*others), torch.from_numpy(first)).flatten(1)
            free = (self.action.normalise(elsewhere).abs() > FLOOR).any(0) & (self.action.scale == 0)
            self.action.scale.masked_fill_(free, 1.0)

    def _moved(self, action: np.ndarray, start: np.ndarray | None) -> Tensor:
        """Chunks in the frame, still in units; those whose start is not known are left out."""
        if self.needs_state:
            if start is None:
                raise ValueError("chunks in this frame need the states at which they start: fit(state, action, start)")
            known = np.isfinite(start[:, self.relative_to]).all(1)
            action, start = action[known], start[known]
        return self._told(torch.from_numpy(action), None if start is None else torch.from_numpy(start))

    @staticmethod
    def _set(module: nn.Module, values: np.ndarray, parts: Sequence[Part]) -> None:
        module.load_state_dict(Normaliser.fit(values, parts, floor=FLOOR).state_dict())

    def _told(self, action: Float[Tensor, "b h a"], start: Float[Tensor, "b d"] | None) -> Float[Tensor, "b h a"]:
        """Actions in the frame, still in units."""
        given, action = action, action.clone() if self.summed or self.shifts or self.turns else action
        for part in self.turns:
            turn = rotations.read(part, action[..., part.slice])
            turn = rotations.composed(part, turn) if part in self.summed else turn
            for state, sign in self._shifts(part):
                now = rotations.read(state, self._start(start)[:, None, state.slice]).expand_as(turn)
                turn = rotations.turned(part, now, turn) if sign > 0 else rotations.between(part, now, turn)
            action[..., part.slice] = rotations.tell(part, turn, signed=part not in self.summed).to(action)
        for part in self.summed:
            if not part.rotation:
                action[..., part.slice] = along(self.robot, part, given).cumsum(1)
        for part, state, sign in self.shifts:
            if part.name in self.wrists:
                action[..., part.slice] = rotations.rotate(self._hand(part, start), action[..., part.slice])
            if not part.rotation:
                action[..., part.slice] += sign * self._start(start)[:, None, state.slice] / part.scale
        return action

    def _hand(self, part: Part, start: Tensor | None) -> Tensor:
        """The rotation (b 1 4) along whose axes a displacement begins to be told."""
        wrist = self.wrists[part.name]
        return rotations.read(wrist, self._start(start)[:, None, wrist.slice])

    def _shifts(self, part: Part) -> list[tuple[Part, float]]:
        return [(state, sign) for shifted, state, sign in self.shifts if shifted == part]

    def _straight(self, told: Float[Tensor, "b h a"], first: Float[Tensor, " a"]) -> Float[Tensor, "b h a"]:
        """Rotations without wraps from those entries on that are nearest to `first`; changes `told`."""
        for part in self.turns:
            told[..., part.slice] = rotations.continued(part, told[..., part.slice], first[part.slice]).to(told)
        return told

    @staticmethod
    def _start(start: Tensor | None) -> Tensor:
        if start is None:
            raise ValueError("chunks in this frame need the state at which they start; it is not known here")
        return start

    def chunk(self, action: Float[Tensor, "b h a"], start: Float[Tensor, "b d"] | None = None) -> Tensor:
        """Actions in units to what the transformer works on; start: states in units, for frames that need them."""
        told = self._straight(self._told(action, start), self.action.offset[: self.robot.action_dim].to(action))
        return self.action.normalise(told.flatten(1)).view_as(action)

    def unchunk(self, x: Float[Tensor, "b h a"], start: Float[Tensor, "b d"] | None = None) -> Float[Tensor, "b h a"]:
        """The inverse of `chunk`; angles come back within half a turn, quaternions and matrices whole.
        Quaternions go on with the sign of the data, those relative to a state with its; turns out of a sum have w >= 0.
        """
        action = self.action.denormalise(x.flatten(1)).view_as(x)
        for part, state, sign in self.shifts:
            if not part.rotation:
                action[..., part.slice] -= sign * self._start(start)[:, None, state.slice] / part.scale
            if part.name in self.wrists:
                back = rotations.inverse(self._hand(part, start))
                action[..., part.slice] = rotations.rotate(back, action[..., part.slice])
        for part in self.summed:
            if not part.rotation:
                action[:, 1:, part.slice] = action[:, :, part.slice].diff(dim=1)
        for part in self.turns:
            turn = rotations.read(part, action[..., part.slice])
            for state, sign in self._shifts(part):
                now = rotations.read(state, self._start(start)[:, None, state.slice]).expand_as(turn)
                turn = rotations.between(part, now, turn) if sign > 0 else rotations.turned(part, now, turn)
            if part in self.summed:
                turn = torch.cat([turn[:, :1], rotations.between(part, turn[:, :-1], turn[:, 1:])], 1)
            action[..., part.slice] = rotations.tell(part, turn, signed=part not in self.summed).to(action)
        for part in self.summed:  # along the hand's axes at each step again
            action[..., part.slice] = along(self.robot, part, action, back=True)
        return action

    def command(self, action: Float32[np.ndarray, "b h a"]) -> Float32[np.ndarray, "b h a"]:
        """Inside the limits; binary entries become the nearer of their two values."""
        return command(self.robot, action)
