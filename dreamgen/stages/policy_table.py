"""The cells of a policy experiment in one table: success with n and interval, and the difference to a cell it answers.

A cell is an evaluation of one policy in closed loop. Cells that are not there yet, and those on which a judge abstained
throughout, are left out and counted; the table is always made anew.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

from dreamgen.core.manifest import FILE, Stage, is_complete, read_json
from dreamgen.stages.pairs import SAME, episodes_of, paired, require_comparable

log = logging.getLogger("dreamgen.policy_table")


def policy_table(
    cells: Mapping[str, str],
    *,
    out: Path,
    folder: Path,
    against: Mapping[str, str] | None = None,
    seed: int = 0,
    record: dict,
) -> dict:
    """Write `table.txt` and log it. cells: name to step, below `folder`; against: name of a cell to that of the cell
    with which it is compared on the same first states.

    Results: table (text), cells {name: {successes, n, rate, low, high, against?}}, missing. Raises ValueError for a
    comparison with a cell that is not named, a cell that is no evaluation in closed loop, a comparison of cells in
    other settings (`pairs.SAME`), and if there is no cell at all.
    """
    folder, against = Path(folder), dict(against or {})
    for name, other in against.items():
        if name not in cells or other not in cells:
            raise ValueError(f"against compares '{name}' with '{other}'; the cells are {list(cells)}")
    made = {name: read_json(folder / step / FILE) for name, step in cells.items() if is_complete(folder / step)}
    for name, manifest in made.items():
        if manifest["stage"] not in SAME:
            raise ValueError(f"the cell '{name}' is {folder / cells[name]}, made by the stage '{manifest['stage']}'; a "
                             "cell says how often a policy succeeds: give a step that runs `evaluate`, in a simulator "
                             "or with stage=dreamt")  # fmt: skip
    there = {name: folder / cells[name] for name, manifest in made.items() if manifest["results"]["success"]}
    if not there:
        raise ValueError(f"none of the evaluations {list(cells.values())} in {folder} says how often its "
                         "policy succeeds; run the experiment's steps")  # fmt: skip
    asked = [(name, other) for name, other in against.items() if name in there and other in there]
    for name, other in asked:
        require_comparable(made[name], made[other], f"the cell '{other}', with which '{name}' is compared,")
    parents = {f"cell_{k}": path for k, path in enumerate(there.values())}
    with Stage(out, "policy_table", config=record, parents=parents, seed=seed, anew=True) as run:
        found = {name: dict(made[name]["results"]["success"]) for name in there}
        for name, other in asked:
            found[name]["against"] = {"cell": other, **paired(episodes_of(there[name]), episodes_of(there[other]))}
        text = table(found)
        (run.out / "table.txt").write_text(text + "\n")
        log.info("\n%s", text)
        return run.finish(table=text, cells=found, missing=[name for name in cells if name not in there])


def table(cells: Mapping[str, Mapping]) -> str:
    """Names, rates, intervals and paired differences in columns."""
    width = max(len(name) for name in cells)
    lines = [f"{'policy':<{width}}   rate   95% interval    n   difference on the same first states"]
    for name, s in cells.items():
        line = f"{name:<{width}}  {s['rate']:5.1%}  {s['low']:6.1%} to {s['high']:6.1%}  {s['n']:>3}"
        if pair := s.get("against"):
            line += (f"   {100 * pair['difference']:+.1f} [{100 * pair['low']:+.1f}, {100 * pair['high']:+.1f}] "
                     f"p {pair['p']:.3f} to {pair['cell']}")  # fmt: skip
        lines.append(line)
    return "\n".join(lines)
