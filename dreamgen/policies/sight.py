"""What a policy takes of an observation, and what it says of one that does not fit."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from dreamgen.core.clip import Observation
from dreamgen.core.embodiment import Embodiment
from dreamgen.policies.dit import KeyValue


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """Observations as the action head knows them: keys and values of the context, the state token, what is known of
    each step of the chunk (b H w), the states (b d) in units, and which body acts."""

    context: list[KeyValue | None]
    state: Tensor
    plan: Tensor
    states: Tensor
    body: Tensor


def look(encoder: nn.Module, pictures: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Visual and language tokens of pictures (uint8), or of their features by the frozen part of `encoder`."""
    return encoder(pictures, words) if pictures.dtype == torch.uint8 else encoder.project(pictures, words)


def require_same_views(body: str, other: Embodiment, robot: Embodiment) -> None:
    """ValueError where a body of a policy has other cameras than its robot; an orientation that an older contract does
    not tell is not compared."""
    told = all(x.orientation and y.orientation for x, y in zip(other.views, robot.views, strict=False))
    seen = [[v if told else replace(v, orientation="") for v in each.views] for each in (other, robot)]
    if seen[0] != seen[1]:
        raise ValueError(f"the body '{body}' is seen by {other.views}, the robot by {robot.views}; bodies of a policy "
                         f"share their cameras")  # fmt: skip


def _views(robot: Embodiment, observation: Observation) -> np.ndarray:
    """(v h w 3) uint8, views in the embodiment's order."""
    found = []
    for view in robot.views:
        if view.name not in observation.views:
            raise ValueError(f"the observation lacks view '{view.name}'; it has {sorted(observation.views)}, the "
                             f"policy was made for {[v.name for v in robot.views]}")  # fmt: skip
        picture = np.asarray(observation.views[view.name])
        if picture.shape != (view.height, view.width, 3) or picture.dtype != np.uint8:
            raise ValueError(f"view '{view.name}' of the observation is {picture.shape} {picture.dtype}; expected "
                             f"({view.height}, {view.width}, 3) uint8: resize it first")  # fmt: skip
        found.append(picture)
    return np.stack(found)


def _state(robot: Embodiment, observation: Observation) -> np.ndarray:
    state = np.asarray(observation.state, np.float32)
    if state.shape != (robot.state_dim,):
        raise ValueError(f"the state of the observation has shape {state.shape}; embodiment '{robot.name}' "
                         f"has ({robot.state_dim},); fill unknown states with NaN")  # fmt: skip
    return state


def tensors(robot: Embodiment, observations: Sequence[Observation]) -> tuple[Tensor, Tensor]:
    """Pictures (b v h w 3) uint8 and states (b d), NaN where unknown.

    Raises ValueError for an observation that lacks a view or whose view or state has another shape.
    """
    pictures = np.stack([_views(robot, o) for o in observations])
    return torch.from_numpy(pictures), torch.from_numpy(np.stack([_state(robot, o) for o in observations]))
