"""How good are labels? Predicted against recorded actions, part by part; no labeler is run here."""

import math
from collections.abc import Sequence

import numpy as np

from dreamgen.core import rotations
from dreamgen.core.clip import Labels
from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment, Part
from dreamgen.core.kinematics import along

REACH = 12  # robot steps by which labels are looked for before and after


def r2(predicted: np.ndarray, true: np.ndarray, part: Part | None = None) -> float:
    """Explained variance, pooled over the entries of (n k), of the angles of a part that is a rotation; nan where the
    truth never changes."""
    if part is None or not part.rotation:
        wrong, varies = ((predicted - true) ** 2).sum(), ((true - true.mean(0)) ** 2).sum()
    else:
        wrong, varies = ((errors(part, a, true) ** 2).sum() for a in (predicted, middle(part, true)))
    return float(1 - wrong / varies) if varies > 1e-12 else float("nan")


def errors(part: Part, predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Absolute errors (... k) of a part's entries, of a rotation the angle (... 1), in the part's unit (else rad)."""
    return rotations.apart(part, predicted, true)[..., None] if part.rotation else np.abs(predicted - true)


def middle(part: Part, values: np.ndarray) -> np.ndarray:
    """The mean (k,) of a part's rows (n k)."""
    return rotations.middle(part, values) if part.rotation else values.mean(0)


def auroc(score: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive scores above a negative, ties counting half; nan without both kinds."""
    from scipy.stats import rankdata

    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return float("nan")
    return float((rankdata(score)[positive].sum() - n * (n + 1) / 2) / (n * m))


def votes(labels: Labels, part: Part) -> np.ndarray:
    """Share of the votes for the higher command (s k), recovered from the merged command and its spread."""
    low, high = part.limits or (0.0, 1.0)
    margin = np.sqrt(np.clip(0.25 - (labels.spread[:, part.slice] / (high - low)) ** 2, 0, None))
    return np.where(labels.value[:, part.slice] > (low + high) / 2, 0.5 + margin, 0.5 - margin)


def lag(predicted: Sequence[np.ndarray], true: Sequence[np.ndarray], reach: int = REACH) -> int | None:
    """Robot steps by which labels (s k) come late: the shift up to `reach`, and up to half of a clip, with the highest
    correlation of how they leave their mean over the clip. None where that cannot be said: nothing moves, or the
    highest is the last that was looked at.
    """
    predicted, true = ([each - each.mean(0, dtype=np.float64) for each in side] for side in (predicted, true))
    reach = min(reach, (max(map(len, true)) - 1) // 2)
    best = {}
    for shift in range(-reach, reach + 1):
        pairs = [(p[max(0, shift) : len(p) + min(0, shift)], t[max(0, -shift) : len(t) - max(0, shift)])
                 for p, t in zip(predicted, true, strict=True) if len(p) > 2 * reach]  # fmt: skip
        p, t = (np.concatenate(side).ravel() for side in zip(*pairs, strict=True))
        scale = p.std() * t.std()
        if scale > 1e-12:
            best[shift] = float(((p - p.mean()) * (t - t.mean())).mean() / scale)
    found = max(best, key=lambda shift: (round(best[shift], 6), -abs(shift)), default=None)
    return None if found is None or 0 < abs(found) == reach else found


def drift(predicted: Sequence[np.ndarray], true: Sequence[np.ndarray], part: Part) -> dict[str, float]:
    """Mean distance between the integrals of labels and actions (s k), along axes that do not turn (see `along`),
    in units of the state, by share of the clip; of rotations the angle between what the turns make of one, in the
    part's unit (else rad)."""
    if part.rotation:
        ends = [[rotations.composed(part, rotations.read(part, a)) for a in side] for side in (predicted, true)]
        gaps = [rotations.angle(p, t) / part.radians for p, t in zip(*ends, strict=True)]
    else:
        gaps = [np.linalg.norm(np.cumsum(p - t, axis=0) * part.scale, axis=1)
                for p, t in zip(predicted, true, strict=True)]  # fmt: skip
    at = {"quarter": 0.25, "half": 0.5, "end": 1.0}
    return {name: float(np.mean([gap[max(0, int(share * len(gap)) - 1)] for gap in gaps]))
            for name, share in at.items()}  # fmt: skip


def calibration(spread: np.ndarray, error: np.ndarray, bins: int = 5) -> dict:
    """Does spread foretell error? Both (n,): rank correlation; per fifth of the spread its mean and the RMS error."""
    from scipy.stats import spearmanr

    if len(spread) < bins or spread.std() < 1e-12 or error.std() < 1e-12:
        return {"spearman": float("nan"), "spread": [], "error": []}
    parts = np.array_split(np.argsort(spread, kind="stable"), bins)
    return {"spearman": float(spearmanr(spread, error).statistic),
            "spread": [float(spread[part].mean()) for part in parts],
            "error": [float(np.sqrt((error[part] ** 2).mean())) for part in parts]}  # fmt: skip


def score_labels(labels: Sequence[Labels], actions: Sequence[np.ndarray], robot: Embodiment, clock: Clock) -> dict:
    """All scores of labels (s a) against recorded actions (s a), by name and part; plain JSON, None where undefined.

    clock: of the clips, any number of frames.
    r2, mae, control_mae (the mean action instead), lag (robot steps, looked for over two frame gaps and `REACH` at
    least) for every part; drift for deltas that move a state part; auroc and accuracy for binary parts; calibration of
    the spread. The error of a rotation is the angle, in the part's unit (else rad).
    """
    predicted, true = [label.value for label in labels], list(actions)
    found: dict[str, dict] = {key: {} for key in ("r2", "mae", "control_mae", "lag", "drift", "auroc", "accuracy",
                                                  "calibration")}  # fmt: skip
    for part in robot.action:
        p, t = ([a[:, part.slice] for a in side] for side in (predicted, true))
        flat_p, flat_t = np.concatenate(p), np.concatenate(t)
        error, control = errors(part, flat_p, flat_t), errors(part, middle(part, flat_t), flat_t)
        found["r2"][part.name] = r2(flat_p, flat_t, part)
        found["mae"][part.name] = float(error.mean())
        found["control_mae"][part.name] = float(control.mean())
        if part.rotation:  # about their mean, from where none of them wraps
            centre = rotations.read(part, middle(part, flat_t))
            p, t = ([rotations.vectors(part, a, centre) for a in side] for side in (p, t))
        found["lag"][part.name] = lag(p, t, max(REACH, math.ceil(2 * clock.stride)))
        spread = np.concatenate([label.spread[:, part.slice] for label in labels])[:, : error.shape[1]]
        found["calibration"][part.name] = calibration(spread.ravel(), error.ravel())
        if part.kind == "binary":
            half = sum(part.limits or (0.0, 1.0)) / 2
            share = np.concatenate([votes(label, part) for label in labels])
            found["auroc"][part.name] = auroc(share.ravel(), flat_t.ravel() > half)
            found["accuracy"][part.name] = float(((flat_p > half) == (flat_t > half)).mean())
        elif part.kind == "delta" and part.moves:
            whole = ([along(robot, part, a) for a in side] for side in (predicted, true))
            found["drift"][part.name] = drift(*whole, part)
    return _plain(found)


def _plain(value: object) -> object:
    """The same with None for what is not a number, which JSON cannot say."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and value != value else value
