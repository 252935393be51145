"""The bodies of a policy: which robot each belongs to, and what its states and actions mean.

A policy has its own robot, to which every body belongs that `robots` does not name. Of another robot `robots` has the
embodiment, under the name of its first body; further bodies of it, such as its dreams, are given that name, and share
its statistics. Rows of narrower robots are padded with zeros to the widest.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from dreamgen.core.embodiment import Embodiment
from dreamgen.policies.space import Space

Robots = Mapping[str, "Embodiment | dict | str"]


def owner(body: str, robots: Robots | None) -> str | None:
    """The name under which `robots` has the robot of a body; None for the policy's own robot. ValueError for a body
    that is given the name of one of which `robots` has no embodiment."""
    told = (robots or {}).get(body)
    if not isinstance(told, str):
        return None if told is None else body
    if told not in (robots or {}) or isinstance((robots or {})[told], str):
        known = [name for name, robot in (robots or {}).items() if not isinstance(robot, str)]
        raise ValueError(f"robots says that the body '{body}' is of the robot of '{told}', and has no embodiment of "
                         f"'{told}'; it has those of {known}")  # fmt: skip
    return told


def require_one_size(body: str, other: Embodiment, robot: Embodiment) -> None:
    """ValueError where the pictures of a body have another size than those of the policy's own robot."""
    sizes = [(each.views[0].height, each.views[0].width) for each in (other, robot)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the body '{body}' is seen at {sizes[0][0]}x{sizes[0][1]} pixels, the robot '{robot.name}' "
                         f"at {sizes[1][0]}x{sizes[1][1]}; pictures of one policy have one size: set height and width "
                         f"of the views of '{other.name}' to {sizes[1][0]} and {sizes[1][1]}")  # fmt: skip


class Spaces:
    """The space of each body, by its number."""

    def __init__(self, each: Sequence[Space]) -> None:
        self.each = list(each)
        self.alone = all(space is self.each[0] for space in self.each)
        self.widths = [space.robot.action_dim for space in self.each]
        self.action_dim = max(self.widths)
        self.state_dim = max(space.robot.state_dim for space in self.each)

    def of(self, body: int) -> Space:
        """The space of a body."""
        return self.each[body]

    def widen(self, state: Float[Tensor, "b d"], action: Float[Tensor, "b h a"]) -> tuple[Tensor, Tensor]:
        """Both padded to the widest robot."""
        if self.alone:
            return state, action
        return (F.pad(state, (0, self.state_dim - state.shape[1])),
                F.pad(action, (0, self.action_dim - action.shape[2])))  # fmt: skip

    def _each(self, body: Tensor) -> Iterator[tuple[Space, Tensor]]:
        yield from ((self.of(k), body == k) for k in body.unique().tolist())

    def chunk(self, action: Float[Tensor, "b h a"], state: Float[Tensor, "b d"], body: Int64[Tensor, " b"]) -> Tensor:
        """Actions in units to what the transformer works on, row by row in the space of its body."""
        if self.alone:
            return self.each[0].chunk(action, state)
        x = torch.zeros_like(action)
        for space, rows in self._each(body):
            a, d = space.robot.action_dim, space.robot.state_dim
            x[rows, :, :a] = space.chunk(action[rows, :, :a], state[rows, :d])
        return x

    def tellable(self, known: Bool[Tensor, "b d"], body: Int64[Tensor, " b"]) -> Bool[Tensor, " b"]:
        """Which chunks can be told, row by row in the space of its body; see `Space.tellable`."""
        if self.alone:
            return self.each[0].tellable(known)
        found = torch.ones_like(body, dtype=torch.bool)
        for space, rows in self._each(body):
            found[rows] = space.tellable(known[rows])
        return found

    def states(self, state: Float[Tensor, "b d"], body: Int64[Tensor, " b"] | int) -> Float[Tensor, "b d"]:
        """States in units to numbers of unit size; body: of each row, or one for all."""
        if self.alone:
            return self.each[0].state.normalise(state)
        if isinstance(body, int):
            d = self.of(body).robot.state_dim
            return F.pad(self.of(body).state.normalise(state[:, :d]), (0, state.shape[1] - d))
        x = torch.zeros_like(state)
        for space, rows in self._each(body):
            d = space.robot.state_dim
            x[rows, :d] = space.state.normalise(state[rows, :d])
        return x

    def entries(self, body: Int64[Tensor, " b"] | int, device: torch.device) -> Float[Tensor, "b 1 a"] | None:
        """1 where an action of each row's body has an entry, 0 where it is padded; None where all are full. body: of
        each row, or one for all."""
        if min(self.widths) == self.action_dim:
            return None
        each = torch.tensor(self.widths, device=device)[body].view(-1, 1)
        return (torch.arange(self.action_dim, device=device) < each).float()[:, None]
