"""The figures of a run, gathered from the manifests of its steps under fixed keys.

    idm.r2.<part>                                  R2 of the labels on held-out real video, by action part
    replay.recorded | idm_real | idm_dream         success of actions replayed from the same first state
    policy.real | policy.real_dreams               closed-loop success without and with dreams
    difference.<policy>                            what it gains over the policy that it was evaluated against
    policy.open_loop                               error on held-out episodes, where there is no simulator
    stages.<step>.seconds | peak_mb | stage        what each step took

A success is {successes, n, rate, low, high}, the last two the 95% Wilson interval; a difference {n, won, lost,
difference, low, high, p} of the same first states (see `dreamgen.stages.pairs`). What was not measured is absent.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreamgen.core.manifest import FILE, is_complete, read_json

SUCCESS = ("successes", "n", "rate", "low", "high")


def manifests(steps: Mapping[str, Path]) -> dict[str, dict]:
    """The manifests of all finished steps, by step name and in order."""
    return {name: read_json(Path(path) / FILE) for name, path in steps.items() if is_complete(Path(path))}


def gather(found: Mapping[str, dict], policies: Mapping[str, str]) -> dict[str, Any]:
    """The content of results.json.

    found: manifests by step. policies: key under `policy` to the step that evaluated it.
    """
    results: dict[str, Any] = {}
    for manifest in found.values():
        measured = manifest["results"]
        if manifest["stage"] == "evaluate_labels":
            results |= {key: measured[key] for key in ("idm", "replay") if measured.get(key)}
    policy = {}
    for key, step in policies.items():
        measured = found.get(step, {}).get("results", {})
        if "success" in measured:
            policy[key] = {k: measured["success"][k] for k in SUCCESS}
            if "against" in measured:
                results.setdefault("difference", {})[key] = measured["against"]
        elif "open_loop" in measured:
            policy.setdefault("open_loop", {})[key] = measured["open_loop"]
    if policy:
        results["policy"] = policy
    results["stages"] = {
        name: {"stage": m["stage"], "seconds": m["seconds"], "peak_mb": m["peak_mb"]} for name, m in found.items()
    }
    return finite(results)


def finite(value: Any) -> Any:
    """Plain JSON: what is not a number (a part that never moves has no R2) becomes null."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
