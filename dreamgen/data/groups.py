"""Episodes that begin in the same state (meta `pair`, as `collect stage.pairs=4` records them) say much of each other:
what is held out is held out with its siblings, and actions of another episode are those of another group."""

from collections.abc import Sequence
from pathlib import Path

from dreamgen.data.joined import Joined
from dreamgen.data.lerobot import Dataset


def group_of(dataset: Dataset | Joined, i: int) -> tuple[Path, str] | int:
    """What episode i shares with those of its dataset that begin in the same state, else its number."""
    pair = dataset.episode(i).meta.get("pair")
    own = dataset.places[i][0] if isinstance(dataset, Joined) else dataset
    return (own.root, pair) if pair else i


def with_siblings(dataset: Dataset | Joined, chosen: Sequence[int] | set[int]) -> set[int]:
    """Episodes `chosen`, and all that begin in the same state as one of them."""
    groups = {group_of(dataset, i) for i in chosen}
    return {i for i in range(len(dataset)) if group_of(dataset, i) in groups}


def others(groups: Sequence[object]) -> list[int]:
    """For each item the next one, round about, of another group; where there is none, the next one."""
    count = len(groups)
    after = [[(k + step) % count for step in range(1, count + 1)] for k in range(count)]
    return [next((k for k in around if groups[k] != own), around[0]) for own, around in zip(groups, after, strict=True)]
