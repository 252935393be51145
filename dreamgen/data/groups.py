"""Episodes that begin in the same state (meta `pair`, as `collect stage.pairs=4` records them) say much of each other:
what is held out is held out with its siblings, and actions of another episode are those of another group."""

import logging
from collections.abc import Hashable, Sequence
from pathlib import Path

from dreamgen.data.joined import Joined
from dreamgen.data.lerobot import Dataset

log = logging.getLogger(__name__)


def group_of(dataset: Dataset | Joined, i: int) -> tuple[Path, str] | int:
    """What episode i shares with those of its dataset that begin in the same state, else its number."""
    pair = dataset.episode(i).meta.get("pair")
    own = dataset.places[i][0] if isinstance(dataset, Joined) else dataset
    return (own.root, pair) if pair else i


def groups_of(dataset: Dataset | Joined) -> list[tuple[Path, str] | int]:
    """See `group_of`, of each episode."""
    return [group_of(dataset, i) for i in range(len(dataset))]


def held_out(groups: Sequence[Hashable], count: int, order: Sequence[int]) -> set[int]:
    """Numbers of `count` episodes to hold out, or of a few more, whose groups these are: whole groups, as `order` comes
    to them, but never all. Of a single group none is, which is warned of."""
    held, left = set(), set(groups)
    if count and len(left) == 1:
        log.warning("all %d episodes begin in one state: none is held out", len(groups))
    for k in order:
        if len(held) >= count or len(left) < 2:
            break
        if groups[k] in left:
            left.remove(groups[k])
            held |= {i for i, group in enumerate(groups) if group == groups[k]}
    return held


def others(groups: Sequence[object]) -> list[int]:
    """For each item the next one, round about, of another group; where there is none, the next one."""
    count = len(groups)
    after = [[(k + step) % count for step in range(1, count + 1)] for k in range(count)]
    return [next((k for k in around if groups[k] != own), around[0]) for own, around in zip(groups, after, strict=True)]
