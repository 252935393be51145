"""Is a dataset what it says? A table for people, `findings.json` for programs; nothing is changed."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dreamgen.core.embodiment import Embodiment
from dreamgen.core.manifest import Stage, write_json
from dreamgen.data.findings import LEVELS, table
from dreamgen.data.inspection import excused, inspect
from dreamgen.data.layout import locate
from dreamgen.data.recordings import noted


def validate(root: str, *, robot: Embodiment, out: Path, pictures: bool = True, episodes: Sequence[int] | None = None,
             actions: bool = True, skip_bad: bool = False, revision: str | None = None, workers: int = 1,
             record: dict) -> dict:  # fmt: skip
    """Check the dataset at `root` (a folder, or a hub id) as data of `robot`; write `findings.json` to `out`.

    pictures: decode every frame, on `workers` threads. episodes: look at these alone, by the dataset's own numbers.
    actions: False for video alone (`data=video`), which may lack actions and states. skip_bad: errors of episodes that
    the reader leaves out are warnings. The results hold "table", the number of errors, warnings and notes, and
    `skipped`, the episodes that are left out. A dataset with errors leaves no manifest: steps after it do not start. It
    is always checked anew.

    Raises ValueError if there is no such dataset, and for episodes that it does not list.
    """
    path = locate(root, revision)
    with Stage(out, "validate", config=record, parents={"data": path}, anew=True) as run:
        found, counts = inspect(path, robot, pictures=pictures, episodes=episodes, actions=actions, workers=workers)
        found, reader = excused(found, path, robot, episodes, actions=actions) if skip_bad else (found, None)
        numbers = {f"{level}s": sum(finding.level == level for finding in found) for level in LEVELS}
        skipped = noted(reader)["skipped"]
        left = f", {len(skipped)} left out" if skipped else ""
        title = f"{root} ({counts['episodes']} episodes, {counts['frames']} rows{left})"
        results = {**counts, **numbers, "table": table(found, title), "skipped": skipped}
        write_json(out / "findings.json", {**results, "root": str(root), "findings": [asdict(f) for f in found]})
        return run.finish(**results) if not numbers["errors"] else {"results": results}
