"""Two policies on the same first states: what their episodes say of the difference.

Paired seeds take the difficulty of a first state out of the comparison.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from dreamgen.core.intervals import difference_interval
from dreamgen.core.manifest import read_json, require_complete


def episodes_of(evaluation: Path) -> list[dict]:
    """The episodes of a finished evaluation."""
    require_complete(evaluation, "the evaluation")
    return read_json(Path(evaluation) / "episodes.json")


def _named(row: dict) -> tuple:
    return row["instruction"], row["seed"], row.get("first")  # a simulator's seed says all; a prompt's does not


def _none(where: str) -> ValueError:
    return ValueError(f"{where} has none of these episodes; evaluate both with the same seed, instructions and first "
                      "frames")  # fmt: skip


def require_shared(planned: Iterable[dict], other: Path) -> None:
    """ValueError if the evaluation `other` says of none of the episodes that are planned whether it succeeded: told
    before they run. Reads of `planned` ({instruction, seed, in a dream first}) no more than it takes to know."""
    known = {_named(row) for row in episodes_of(other) if row["success"] is not None}
    if not any(_named(row) in known for row in planned):
        raise _none(str(other))


def paired(mine: Sequence[dict], theirs: Sequence[dict], where: str = "the other evaluation") -> dict:
    """`difference_interval` over the episodes that both have and of which both say whether they succeed.

    Raises ValueError if no episode has the same instruction and seed, and in a dream the same first frame and state.
    """

    told = [[row for row in rows if row["success"] is not None] for rows in (mine, theirs)]  # a judge may abstain
    other = {_named(row): bool(row["success"]) for row in told[1]}
    pairs = [(bool(row["success"]), other[_named(row)]) for row in told[0] if _named(row) in other]
    if not pairs:
        raise _none(where)
    return difference_interval(sum(a > b for a, b in pairs), sum(a < b for a, b in pairs), len(pairs))
