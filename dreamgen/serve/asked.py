"""What both protocols ask of a policy beside an observation: a seed, and to go on from the chunk being executed."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from dreamgen.core.clip import Observation
from dreamgen.core.protocols import Policy


def seed_of(value: Any, otherwise: int) -> int:
    """The seed that a client asked for, else `otherwise`."""
    if value is None:
        return otherwise
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < 2**63:
        raise ValueError(f"seed is {value!r:.60}; expected a whole number from 0 to 2**63 - 1")
    return int(value)


def going_on(rests: Sequence[np.ndarray], delay: int, mode: str, beta: float) -> dict[str, Any]:
    """The message that `answer` reads: what `Continuing.proceed` takes."""
    return {"rests": [np.asarray(rest, np.float32) for rest in rests], "delay": delay, "mode": mode, "beta": beta}


def _require_going_on(asked: Any, policy: Policy, rows: int) -> dict[str, Any]:
    """`asked` as arguments of `proceed`; ValueError that names what is missing or of another type."""
    if not isinstance(asked, dict) or asked.keys() != {"rests", "delay", "mode", "beta"}:
        got = sorted(map(str, asked)) if isinstance(asked, dict) else type(asked).__name__
        raise ValueError(f"realtime is {got!s:.80}; expected a map of rests, delay, mode, beta")
    if getattr(policy, "prefix", None) is None:
        raise ValueError("the policy served here cannot go on from a chunk; ask without realtime")
    rests, width = asked["rests"], policy.robot.action_dim
    if not isinstance(rests, list | tuple) or len(rests) != rows:
        raise ValueError(f"realtime has no list of {rows} rests, one for each observation")
    for rest in rests:
        if not isinstance(rest, np.ndarray) or rest.dtype.kind not in "iuf" or rest.ndim != 2 or (
            rest.shape[1] != width or len(rest) > policy.horizon or not np.isfinite(rest).all()
        ):  # fmt: skip
            got = f"{rest.shape} {rest.dtype}" if isinstance(rest, np.ndarray) else type(rest).__name__
            raise ValueError(f"a rest of a chunk is {got}; expected at most {policy.horizon} steps of {width} finite "
                             f"numbers")  # fmt: skip
    delay, mode, beta = asked["delay"], asked["mode"], asked["beta"]
    number = isinstance(beta, int | float) and not isinstance(beta, bool) and math.isfinite(beta)
    if isinstance(delay, bool) or not isinstance(delay, int) or not isinstance(mode, str) or not number:
        raise ValueError(f"realtime has delay {delay!r:.40}, mode {mode!r:.40}, beta {beta!r:.40}; expected a whole "
                         f"number, text, a finite number")  # fmt: skip
    return {**asked, "rests": [rest.astype(np.float32) for rest in rests]}


def answer(policy: Any, seen: Sequence[Observation], seeds: Sequence[int], asked: Any) -> Float32[np.ndarray, "b h a"]:
    """The chunks of a request; asked: its `realtime`, or None."""
    if asked is None:
        return policy.act(seen, seeds)
    known = _require_going_on(asked, policy, len(seen))
    return policy.proceed(seen, seeds, **known)
