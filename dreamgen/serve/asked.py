"""What both protocols ask of a policy beside pictures and states: an instruction, a seed, and to go on from the chunk
being executed; what is required of its answer, and of where it is served."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Float32

from dreamgen.core.clip import Observation
from dreamgen.core.manifest import fingerprint
from dreamgen.core.protocols import Policy

FEW = 60  # letters of what came that an error repeats
LETTERS = 2000  # of an instruction, which encoders cut to a few dozen words in any case
BETA = 1000.0  # a stronger pull overflows; 5 is usual


def said(value: Any) -> str:
    """What came, in few letters and little memory however large it is: numbers, the first letters of a text and keys of
    a map; of all else the type."""
    if isinstance(value, str):
        return repr(value[:FEW])
    if isinstance(value, dict):
        return f"a map of {', '.join(map(said, islice(value, 8)))}" if value else "an empty map"
    return repr(value) if value is None or isinstance(value, bool | int | float) else type(value).__name__


def named(policy: Policy) -> str | None:
    """What names a policy to its clients: the hash of the run that made it; None for one that was not opened from a
    folder."""
    path = getattr(policy, "path", None)
    return None if path is None else fingerprint(path)


def require_port(port: int) -> None:
    """ValueError for a number that no port has: ZeroMQ would take it modulo 65536."""
    if not 0 <= port < 2**16:
        raise ValueError(f"cannot serve at port {port}; choose one from 0 (any free one) to {2**16 - 1}")


def instruction_of(value: Any, where: str) -> str:
    """The text under `where`. ValueError for what is none, or longer than LETTERS."""
    if not isinstance(value, str):
        raise ValueError(f"{where} is {type(value).__name__}; expected text")
    if len(value) > LETTERS:
        raise ValueError(f"{where} has {len(value)} characters; expected at most {LETTERS}")
    return value


def seed_of(value: Any, otherwise: int) -> int:
    """The seed that a client asked for, else `otherwise`."""
    if value is None:
        return otherwise
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < 2**63:
        raise ValueError(f"seed is {said(value)}; expected a whole number from 0 to 2**63 - 1")
    return int(value)


def going_on(rests: Sequence[np.ndarray], delay: int, mode: str, beta: float) -> dict[str, Any]:
    """The message that `answer` reads: what `Continuing.proceed` takes."""
    return {"rests": [np.asarray(rest, np.float32) for rest in rests], "delay": delay, "mode": mode, "beta": beta}


def _steps(rest: Any, horizon: int, width: int) -> Float32[np.ndarray, "p a"]:
    """A rest of a chunk; ValueError says what came instead."""
    fits = isinstance(rest, np.ndarray) and rest.dtype.kind in "iuf" and rest.ndim == 2
    fits = fits and rest.shape[1] == width and len(rest) <= horizon
    with np.errstate(over="ignore"):
        steps = rest.astype(np.float32) if fits else np.full((1, width), np.nan)
    if not np.isfinite(steps).all():
        got = f"{rest.shape} {rest.dtype}" if isinstance(rest, np.ndarray) else type(rest).__name__
        raise ValueError(f"a rest of a chunk is {got}; expected at most {horizon} steps of {width} finite numbers")
    return steps


def _require_going_on(asked: Any, policy: Policy, rows: int) -> dict[str, Any]:
    """`asked` as arguments of `proceed`; ValueError that names what is missing or of another type."""
    if not isinstance(asked, dict) or asked.keys() != {"rests", "delay", "mode", "beta"}:
        raise ValueError(f"realtime is {said(asked)}; expected a map of rests, delay, mode, beta")
    if getattr(policy, "prefix", None) is None:
        raise ValueError("the policy served here cannot go on from a chunk; ask without realtime")
    rests = asked["rests"]
    if not isinstance(rests, list | tuple) or len(rests) != rows:
        raise ValueError(f"realtime has no list of {rows} rests, one for each observation")
    rests = [_steps(rest, policy.horizon, policy.robot.action_dim) for rest in rests]
    delay, mode, beta = asked["delay"], asked["mode"], asked["beta"]
    number = isinstance(beta, int | float) and not isinstance(beta, bool) and 0 <= beta <= BETA
    named = isinstance(mode, str) and len(mode) <= FEW
    if isinstance(delay, bool) or not isinstance(delay, int) or not named or not number:
        raise ValueError(f"realtime has delay {said(delay)}, mode {said(mode)}, beta {said(beta)}; expected a whole "
                         f"number, a word, a number from 0 to {BETA:g}")  # fmt: skip
    return {**asked, "rests": rests}


def answer(policy: Any, seen: Sequence[Observation], seeds: Sequence[int], asked: Any) -> Float32[np.ndarray, "b h a"]:
    """The chunks of a request; asked: its `realtime`, or None. ArithmeticError for a policy whose chunks are no finite
    numbers: no robot shall be sent those."""
    known = None if asked is None else _require_going_on(asked, policy, len(seen))
    chunks = policy.act(seen, seeds) if known is None else policy.proceed(seen, seeds, **known)
    if not np.isfinite(chunks).all():
        raise ArithmeticError("its actions are not finite numbers")
    return chunks
