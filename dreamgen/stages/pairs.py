"""Two policies on the same first states: what their episodes say of the difference.

Paired seeds take the difficulty of a first state out of the comparison. The test is McNemar's, exact: of the episodes
that only one of them won, each is as likely to be the other's if the policies are equally good.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dreamgen.core.manifest import read_json, require_complete
from dreamgen.sims.rollout import Z


def episodes_of(evaluation: Path) -> list[dict]:
    """The episodes of a finished evaluation."""
    require_complete(evaluation, "the evaluation")
    return read_json(Path(evaluation) / "episodes.json")


def paired(mine: Sequence[dict], theirs: Sequence[dict], where: str = "the other evaluation") -> dict:
    """{n, won, lost, difference, low, high, p}: episodes that both have, won by mine alone and by theirs alone, the
    difference of success rates with its 95% interval (Wald with one half added to each cell; Bonett and Price 2012),
    and McNemar's exact p.

    Raises ValueError if no episode has the same instruction and seed.
    """
    from scipy.stats import binomtest

    other = {(row["instruction"], row["seed"]): bool(row["success"]) for row in theirs}
    pairs = [(bool(row["success"]), other[row["instruction"], row["seed"]]) for row in mine
             if (row["instruction"], row["seed"]) in other]  # fmt: skip
    if not pairs:
        raise ValueError(f"{where} has none of these episodes; evaluate both with the same seed and instructions")
    n, won, lost = len(pairs), sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    p1, p2 = (won + 1) / (n + 2), (lost + 1) / (n + 2)
    half = Z * np.sqrt((p1 + p2 - (p1 - p2) ** 2) / (n + 2))
    return {"n": n, "won": won, "lost": lost, "difference": (won - lost) / n, "low": float(max(-1.0, p1 - p2 - half)),
            "high": float(min(1.0, p1 - p2 + half)),
            "p": float(binomtest(won, won + lost).pvalue) if won + lost else 1.0}  # fmt: skip
