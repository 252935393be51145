"""What a policy takes of an observation, and what it says of one that does not fit."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
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
    body: int


def look(encoder: nn.Module, pictures: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Visual and language tokens of pictures (uint8), or of their features by the frozen part of `encoder`."""
    return encoder(pictures, words) if pictures.dtype == torch.uint8 else encoder.project(pictures, words)


def by_count(pictures: Tensor, seen: Int64[Tensor, " b"]) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows (b,) bool that have equally many pictures, or features, and these without padding; seen: how many."""
    for count in seen.unique().tolist():
        yield seen == count, pictures[seen == count, :count]


def joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Float[Tensor, "b n c"], Bool[Tensor, "b n"]]:
    """The rows of a batch from those of its parts, padded with zeros to the longest, and what of it is there."""
    rows, first = parts[0]
    tokens = first.new_zeros(len(rows), max(part.shape[1] for _, part in parts), first.shape[2])
    there = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    for rows, part in parts:
        tokens[rows, : part.shape[1]], there[rows, : part.shape[1]] = part, True
    return tokens, there


def tokens_of(
    encoder: nn.Module, pictures: Tensor, words: Tensor, seen: Int64[Tensor, " b"] | None = None
) -> tuple[Float[Tensor, "b n c"], Bool[Tensor, "b n"] | None]:
    """Visual tokens, then language tokens, and which of them are there: all (None), or where rows have pictures of
    `seen` views, the rest being padding, those that an encoder gives of so many."""
    if seen is None:
        return torch.cat(look(encoder, pictures, words), 1), None
    return joined([(rows, torch.cat(look(encoder, some, words[rows]), 1)) for rows, some in by_count(pictures, seen)])


def _views(robot: Embodiment, observation: Observation) -> np.ndarray:
    """(v h w 3) uint8, views in the embodiment's order."""
    found = []
    for view in robot.views:
        if view.name not in observation.views:
            raise ValueError(f"the observation lacks view '{view.name}'; it has {sorted(observation.views)}, the "
                             f"policy was made for {[v.name for v in robot.views]}")  # fmt: skip
        picture = np.asarray(observation.views[view.name])
        view.require(picture)
        found.append(picture)
    return np.stack(found)


def _state(robot: Embodiment, observation: Observation) -> np.ndarray:
    state = np.asarray(observation.state, np.float32)
    robot.require_state(state.shape)
    return state


def tensors(robot: Embodiment, observations: Sequence[Observation]) -> tuple[Tensor, Tensor]:
    """Pictures (b v h w 3) uint8 and states (b d), NaN where unknown.

    Raises ValueError for an observation that lacks a view or whose view or state has another shape.
    """
    pictures = np.stack([_views(robot, o) for o in observations])
    return torch.from_numpy(pictures), torch.from_numpy(np.stack([_state(robot, o) for o in observations]))
