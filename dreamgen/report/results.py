"""The figures of a run, gathered from the manifests of its steps under fixed keys.

    idm.r2.<part>                                  R2 of the labels on held-out real video, by action part
    replay.recorded | idm_real | idm_dream         success of actions replayed from the same first state
    policy.real | policy.real_dreams               closed-loop success without and with dreams, over all trainings
    difference.<policy>                            what it gains over the policy that it was evaluated against
    policy.open_loop                               error on held-out episodes, where there is no simulator
    stages.<step>.seconds | peak_mb | stage        what each step took

A success is {successes, n, rate, low, high}, the last two the 95% Wilson interval; a difference {n, won, lost,
difference, low, high, p} of the same first states (see `dreamgen.core.intervals`). Where a policy was trained several
times, both add up what all trainings did and have `trainings`, a list of the rates or differences of each; give each
training first states of its own, and the intervals hold for these trainings. A difference also has `trainings_low` and
`trainings_high`, Student's 95% interval of the mean over trainings. What was not measured is absent.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamgen.core.intervals import pooled, pooled_difference
from dreamgen.core.manifest import FILE, is_complete, read_json


def manifests(steps: Mapping[str, Path]) -> dict[str, dict]:
    """The manifests of all finished steps, by step name and in order."""
    return {name: read_json(Path(path) / FILE) for name, path in steps.items() if is_complete(Path(path))}


def gather(found: Mapping[str, dict], policies: Mapping[str, str | Sequence[str]]) -> dict[str, Any]:
    """The content of results.json.

    found: manifests by step. policies: key under `policy` to the step that evaluated it, or to those that evaluated
    its trainings.
    """
    results: dict[str, Any] = {}
    for manifest in found.values():
        measured = manifest["results"]
        if manifest["stage"] == "evaluate_labels":
            results |= {key: measured[key] for key in ("idm", "replay") if measured.get(key)}
    policy: dict[str, Any] = {}
    for key, steps in policies.items():
        measured = evaluations(found, steps)
        if rates := [one["success"] for one in measured if one.get("success")]:
            policy[key] = pooled(rates)
            if against := [one["against"] for one in measured if "against" in one]:
                results.setdefault("difference", {})[key] = pooled_difference(against)
        elif errors := [one["open_loop"] for one in measured if "open_loop" in one]:
            policy.setdefault("open_loop", {})[key] = averaged(errors)
    if policy:
        results["policy"] = policy
    results["stages"] = {
        name: {"stage": m["stage"], "seconds": m["seconds"], "peak_mb": m["peak_mb"]} for name, m in found.items()
    }
    return finite(results)


def averaged(errors: Sequence[Mapping]) -> dict[str, Any]:
    """Open-loop errors of all trainings: their means, and the mean absolute error of each where there are several."""

    def mean(values: Sequence[Any]) -> Any:
        if isinstance(values[0], Mapping):
            return {key: mean([value[key] for value in values]) for key in values[0]}
        if isinstance(values[0], list | tuple):
            return [mean(each) for each in zip(*values, strict=True)]
        return None if None in values else sum(values) / len(values)

    return mean(errors) | ({"trainings": [one["mae"] for one in errors]} if len(errors) > 1 else {})


def evaluations(found: Mapping[str, dict], steps: str | Sequence[str]) -> list[dict]:
    """The results of those of `steps` that are there."""
    return [found[step]["results"] for step in ([steps] if isinstance(steps, str) else steps) if step in found]


def finite(value: Any) -> Any:
    """Plain JSON: what is not a number (a part that never moves has no R2) becomes null."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
