"""Two policies on the same first states: what their episodes say of the difference.

Paired seeds take the difficulty of a first state out of the comparison.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamgen.core.intervals import difference_interval
from dreamgen.core.manifest import differences, read_json, require_complete

# settings that two evaluations must share; how a policy executes its chunks is its own, but a model dreams part by part
SAME = {"evaluate": ("sim", "steps"), "evaluate_dreamt": ("world_model", "judge", "steps", "execute", "looks")}


def require_comparable(mine: Mapping, theirs: Mapping, where: str) -> None:
    """ValueError names what two evaluations ({stage, config}, as their manifests say) have of the settings that both
    must share. where: how the other one is called."""
    told = [{"stage": one["stage"]} | {key: one["config"].get(key) for key in SAME[mine["stage"]]}
            for one in (theirs, mine)]  # fmt: skip
    told = [one | {"sim": _played(one.get("sim"))} for one in told]
    if other := differences(*told):
        raise ValueError(f"{where} is of other settings ({other}); two policies are compared in one simulator, or in "
                         "one world model by one judge, in episodes of one length: evaluate both with the same "
                         "ones")  # fmt: skip


def _played(setting: Any, key: str = "") -> Any:
    """What of a simulator's settings decides on an episode: not by which cameras a policy sees it, nor of which
    instructions it was told."""
    if not isinstance(setting, Mapping):
        return setting
    kept = ("robot_hz",) if key == "robot" else setting.keys() - {"instructions"}
    return {name: _played(setting.get(name), name) for name in kept}


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
