"""The cells of a policy experiment in one table: success with n and interval, and the difference to a cell it answers.

A cell is an evaluation of one policy in closed loop, or of several trainings of it. Evaluations that are not there yet,
and those on which a judge abstained throughout, are left out, and their cells counted; the table is always made anew.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from dreamgen.core.intervals import pooled, pooled_difference
from dreamgen.core.manifest import FILE, Stage, is_complete, read_json
from dreamgen.stages.pairs import SAME, episodes_of, paired, require_comparable

log = logging.getLogger("dreamgen.policy_table")


def policy_table(
    cells: Mapping[str, str | Sequence[str]],
    *,
    out: Path,
    folder: Path,
    against: Mapping[str, str] | None = None,
    seed: int = 0,
    record: dict,
) -> dict:
    """Write `table.txt` and log it. cells: name to step, below `folder`, or to those that evaluated its trainings;
    against: name of a cell to that of the cell with which it is compared on the same first states, training by
    training.

    Results: table (text), cells {name: {successes, n, rate, low, high, trainings?, against?}}, see
    `dreamgen.core.intervals.pooled`, and missing. Raises ValueError for a comparison with a cell that is not named or
    has another number of trainings, a cell that is no evaluation in closed loop, a comparison of cells in other
    settings (`pairs.SAME`), and if there is no cell at all.
    """
    folder, against = Path(folder), dict(against or {})
    steps = {name: [one] if isinstance(one, str) else list(one) for name, one in cells.items()}
    for name, other in against.items():
        if name not in cells or other not in cells:
            raise ValueError(f"against compares '{name}' with '{other}'; the cells are {list(cells)}")
        if len(steps[name]) != len(steps[other]):
            raise ValueError(f"against compares '{name}', {len(steps[name])} trainings, with '{other}', "
                             f"{len(steps[other])}; training k is compared with training k: give as many")  # fmt: skip
    made = {step: read_json(folder / step / FILE) for each in steps.values() for step in each
            if is_complete(folder / step)}  # fmt: skip
    for name, step in ((name, step) for name, each in steps.items() for step in each if step in made):
        if made[step]["stage"] not in SAME:
            raise ValueError(f"the cell '{name}' is {folder / step}, made by the stage '{made[step]['stage']}'; a "
                             "cell says how often a policy succeeds: give a step that runs `evaluate`, in a simulator "
                             "or with stage=dreamt")  # fmt: skip
    there = [step for step in made if made[step]["results"]["success"]]
    if not there:
        raise ValueError(f"none of the evaluations {list(cells.values())} in {folder} says how often its "
                         "policy succeeds; run the experiment's steps")  # fmt: skip
    asked = {name: [(a, b) for a, b in zip(steps[name], steps[other], strict=True) if {a, b} <= set(there)]
             for name, other in against.items()}  # fmt: skip
    for name, pairs in asked.items():
        for a, b in pairs:
            require_comparable(made[a], made[b], f"the cell '{against[name]}', with which '{name}' is compared,")
    parents = {f"cell_{k}": folder / step for k, step in enumerate(there)}
    with Stage(out, "policy_table", config=record, parents=parents, seed=seed, anew=True) as run:
        found = {name: pooled([made[step]["results"]["success"] for step in each if step in there])
                 for name, each in steps.items() if set(each) & set(there)}  # fmt: skip
        for name, pairs in asked.items():
            if pairs:
                told = [paired(*(episodes_of(folder / step) for step in pair)) for pair in pairs]
                found[name]["against"] = {"cell": against[name], **pooled_difference(told)}
        text = table(found)
        (run.out / "table.txt").write_text(text + "\n")
        log.info("\n%s", text)
        missing = [name for name, each in steps.items() if not set(each) <= set(there)]
        return run.finish(table=text, cells=found, missing=missing)


def table(cells: Mapping[str, Mapping]) -> str:
    """Names, rates, intervals and paired differences in columns; where there are several trainings, Student's interval
    of the mean over these."""
    width = max(len(name) for name in cells)
    lines = [f"{'policy':<{width}}   rate   95% interval    n   difference on the same first states"]
    for name, s in cells.items():
        line = f"{name:<{width}}  {s['rate']:5.1%}  {s['low']:6.1%} to {s['high']:6.1%}  {s['n']:>3}"
        if pair := s.get("against"):
            line += (f"   {100 * pair['difference']:+.1f} [{100 * pair['low']:+.1f}, {100 * pair['high']:+.1f}] "
                     f"p {pair['p']:.3f} to {pair['cell']}")  # fmt: skip
            if each := pair.get("trainings"):
                line += (f"; of {len(each)} trainings [{100 * pair['trainings_low']:+.1f}, "
                         f"{100 * pair['trainings_high']:+.1f}]")  # fmt: skip
        lines.append(line)
    return "\n".join(lines)
