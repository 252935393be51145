"""Which policies answer over the network: their addresses say where, and their servers which."""

import logging
from collections.abc import Mapping
from typing import Any

log = logging.getLogger(__name__)


def served(policies: Mapping[str, Any]) -> dict[str, dict[str, str | None]]:
    """What belongs to a stage's configuration beside its record: {"served": {name: what the server of the policy, or of
    the one inside, calls it}}; {} where none is served. A server that does not say is warned of."""
    found: dict[str, str | None] = {}
    for name, policy in policies.items():
        inner = policy
        while not hasattr(inner, "served") and hasattr(inner, "policy"):
            inner = inner.policy
        if not hasattr(inner, "served"):
            continue
        found[name] = inner.served
        if inner.served is None:
            log.warning("%s does not say which policy it serves: results of another one behind the same address would "
                        "be taken for its own; write each to a folder of its own", inner.address)  # fmt: skip
    return {"served": found} if found else {}
