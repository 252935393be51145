"""The numbers of a dataset: its statistics recomputed, and its units as far as numbers give them away."""

from collections.abc import Mapping

import numpy as np

from dreamgen.core.embodiment import Embodiment, Part
from dreamgen.data import statistics
from dreamgen.data.columns import BOOKKEEPING
from dreamgen.data.findings import Findings

MOMENTS = ("min", "max", "mean", "std")
CLOSE = 1e-3  # of an entry's range: what rounding and another summing order may change
LOOSE = 0.05  # of an entry's range: quantiles that were estimated (lerobot averages those of its episodes)
PICTURE = 0.05  # of full brightness: pictures that were sampled and made smaller (lerobot)
WIDE = 1.0  # of an entry's range: how far beyond the data's ends stored ones lie that are of other data
SPIKE = 30  # standard deviations between the lowest and the highest value
REMAKE = "`jobs.export` computes them anew"
# unit: (its values lie below this, then they look like that unit); radians may turn twice
BOUNDS = {"rad": (4 * np.pi, "degrees"), "m": (20.0, "millimetres or centimetres")}
FLOORS = {"deg": (2 * np.pi, "radians"), "mm": (2.0, "metres")}


def check_statistics(said: Mapping[str, Mapping], true: Mapping[str, Mapping], found: Findings, where: str,
                     episode: int | None = None) -> None:  # fmt: skip
    """Statistics as stored against those of the data, per feature; `where` names the file."""
    for name in sorted(true):
        if name not in said:
            found.add("warning", "statistics", f"{where} has none of '{name}'", REMAKE, episode)
            continue
        picture = np.ndim(true[name]["mean"]) == 3
        try:
            stored = {key: np.asarray(value, dtype=np.float64).reshape(-1) for key, value in said[name].items()}
        except (AttributeError, TypeError, ValueError):
            found.add("error", "statistics", f"{where}: '{name}' holds what are no lists of numbers", REMAKE, episode)
            continue
        own = {key: np.asarray(value, dtype=np.float64).reshape(-1) for key, value in true[name].items()}
        wrong = next((k for k, v in stored.items() if k in own and v.shape != own[k].shape), None)
        if wrong is not None:
            found.add("error", "statistics", f"{where}: '{wrong}' of '{name}' has {stored[wrong].size} entries, the "
                      f"data {own[wrong].size}", REMAKE, episode)  # fmt: skip
            continue
        if broken := [key for key, values in stored.items() if not np.isfinite(values).all()]:
            at = int(np.flatnonzero(~np.isfinite(stored[broken[0]]))[0])
            found.add("error", "statistics", f"{where}: '{broken[0]}' of '{name}' is {stored[broken[0]][at]} at entry "
                      f"{at}", REMAKE, episode)  # fmt: skip
            continue
        if contradiction := _contradiction(stored):
            found.add("error", "statistics", f"{where} contradicts itself: '{name}' {contradiction}", REMAKE, episode)
            continue
        if off := _off(stored, own, picture):
            level, words = off
            found.add(
                "warning" if name in BOOKKEEPING else level, "statistics", f"{where}: '{name}' {words}", REMAKE, episode
            )


def _contradiction(stored: Mapping[str, np.ndarray]) -> str:
    """What cannot be of any data."""
    order = [key for key in ("min", "q01", "q10", "q50", "q90", "q99", "max") if key in stored]
    slack = 1e-6 + 1e-5 * max((float(np.abs(stored[key]).max(initial=0)) for key in order), default=0.0)
    for low, high in zip(order, order[1:], strict=False):
        bad = np.flatnonzero(stored[low] > stored[high] + slack)
        if len(bad):
            at = int(bad[0])
            return f"entry {at}: {low} {stored[low][at]:.6g} is above {high} {stored[high][at]:.6g}"
    if {"min", "max", "mean", "std"} <= stored.keys():
        low, high, mean, std = (stored[key] for key in MOMENTS)
        for at in np.flatnonzero((mean < low - slack) | (mean > high + slack)).tolist()[:1]:
            return f"entry {at}: mean {mean[at]:.6g} is outside [{low[at]:.6g}, {high[at]:.6g}]"
        for at in np.flatnonzero((std < 0) | (std > (high - low) / 2 * 1.01 + slack)).tolist()[:1]:
            return f"entry {at}: std {std[at]:.6g} is impossible within [{low[at]:.6g}, {high[at]:.6g}]"
    return ""


def _off(stored: Mapping[str, np.ndarray], own: Mapping[str, np.ndarray], picture: bool) -> tuple[str, str] | None:
    """How stored statistics differ from those of the data, the worst kind first."""
    span = np.ones(3) if picture else np.maximum(own["max"] - own["min"], 1e-6)
    near = PICTURE if picture else CLOSE
    ends = (
        ("min", "error", CLOSE, 1, "; the data reach beyond what was said"),
        ("max", "error", CLOSE, -1, "; the data reach beyond what was said"),
        ("min", "warning", WIDE, -1, "; the data stay far within, and GR00T scales by the ends"),
        ("max", "warning", WIDE, 1, "; the data stay far within, and GR00T scales by the ends"),
    )
    for key, level, tolerance, way, words in (
        *(() if picture else ends),
        ("mean", "warning", near, 0, ""), ("std", "warning", near, 0, ""),
        *((key, "warning", PICTURE if picture else LOOSE, 0, "") for key in statistics.QUANTILES),
    ):  # fmt: skip
        if key not in stored:
            continue
        gap = stored[key] - own[key]
        worse = way * gap if way else np.abs(gap)
        at = int(np.argmax(worse / span))
        if worse[at] > tolerance * span[at]:
            what = f"{key} of entry {at} is {stored[key][at]:.6g}, that of the data {own[key][at]:.6g}"
            return level, what + words
    if not picture and "count" in stored and stored["count"][0] != own["count"][0]:
        return "warning", f"count is {stored['count'][0]:.0f}, the data have {own['count'][0]:.0f} rows: other data"
    return None


def check_units(robot: Embodiment, states: Mapping[int, np.ndarray], actions: Mapping[int, np.ndarray],
                found: Findings) -> None:  # fmt: skip
    """States (s d) and actions (s a) by episode against the units, limits and kinds of the robot's parts; whether they
    agree is asked of episodes that have both."""
    for kind, arrays, parts in (("state", states, robot.state), ("action", actions, robot.action)):
        if not arrays or not parts:
            continue
        values = np.concatenate([*arrays.values()]).astype(np.float64)
        if values.shape[1] != parts[-1].stop:
            continue
        for part in parts:
            _check_part(f"{kind} part '{part.name}'", part, values[:, part.slice], found, kind == "action")
    both = [(states[i], actions[i]) for i in states if i in actions]
    if both and (both[0][0].shape[1], both[0][1].shape[1]) == (robot.state_dim, robot.action_dim):
        _check_motion(robot, both, found)


def _check_part(name: str, part: Part, values: np.ndarray, found: Findings, acts: bool) -> None:
    mend = f"correct its unit in the embodiment ('{part.unit}'), or the recording"
    low, high, std = values.min(0), values.max(0), values.std(0)
    most = float(np.abs(values).max())
    if (high == low).all():
        found.add("note", "units", f"{name} never varies (it is {low[0]:.4g})", "nothing to learn there; leave it out, "
                  "or record it")  # fmt: skip
        return
    if part.unit in BOUNDS and most > BOUNDS[part.unit][0]:
        found.add("warning", "units", f"{name} is in {part.unit} and reaches {most:.4g} (std {std.max():.4g}): it "
                  f"looks like {BOUNDS[part.unit][1]}", mend)  # fmt: skip
    if part.unit in FLOORS and most <= FLOORS[part.unit][0]:
        found.add("warning", "units", f"{name} is in {part.unit} and stays within {most:.4g} (std {std.max():.4g}): it "
                  f"looks like {FLOORS[part.unit][1]}", mend)  # fmt: skip
    for at in np.flatnonzero((high - low) > SPIKE * np.maximum(std, 1e-12)).tolist()[:1]:
        if part.kind != "binary":
            found.add("warning", "units", f"{name} entry {at} ranges over {(high - low)[at] / std[at]:.0f} standard "
                      f"deviations ({low[at]:.4g} to {high[at]:.4g}): a few rows are far off",
                      "look at these rows; leave their episodes out if they are glitches")  # fmt: skip
    if part.kind == "binary" and (levels := len(np.unique(values))) > 2:
        found.add("warning", "units", f"{name} is binary and takes {levels} values",
                  "call it absolute in the embodiment, or threshold it")  # fmt: skip
    if part.limits is not None:
        _check_limits(name, part, values, found, acts)


def _check_limits(name: str, part: Part, values: np.ndarray, found: Findings, acts: bool) -> None:
    low, high = part.limits or (0.0, 0.0)
    slack = 1e-3 * (high - low)
    beyond = np.maximum(low - values, values - high)
    if (beyond > slack).any():
        worst = values.reshape(-1)[beyond.argmax()]
        level = "error" if (beyond > 0.1 * (high - low)).mean() > 0.01 else "warning"
        found.add(level, "units", f"{name} reaches {worst:.4g}, {(beyond > slack).mean():.1%} of its values lie beyond "
                  f"its limits [{low:.4g}, {high:.4g}]",
                  "correct the limits of the embodiment, or clip the recording")  # fmt: skip
    at = (np.abs(values - low) <= slack) | (np.abs(values - high) <= slack)
    if acts and part.kind != "binary" and at.mean() > 0.3:
        found.add("warning", "units", f"{name} is at its limits in {at.mean():.0%} of its values",
                  "the commands saturate; record with wider limits or smaller steps")  # fmt: skip


def _check_motion(robot: Embodiment, both: list[tuple[np.ndarray, np.ndarray]], found: Findings) -> None:
    """Do the states move as the actions of each part say? both: states (s d) and actions (s a) of each episode."""
    where = {part.name: part for part in robot.state}
    before = np.concatenate([state[:-1] for state, _ in both]).astype(np.float64)
    after = np.concatenate([state[1:] for state, _ in both]).astype(np.float64)
    acted = np.concatenate([action[:-1] for _, action in both]).astype(np.float64)
    for part in robot.action:
        if part.moves is None or part.kind == "binary" or not len(before):
            continue
        at = where[part.moves].slice
        a, u, moved = after[:, at], acted[:, part.slice], after[:, at] - before[:, at]
        spread = float(np.sqrt(((a - a.mean(0)) ** 2).mean()))
        if spread < 1e-9 or float(u.std()) < 1e-9:
            continue
        name = f"action part '{part.name}'"
        follows = _correlation(u, a)  # of the command with where the robot then is, and with how far it then went
        pushes = _correlation(u, moved)
        mend = "correct kind, unit or scale of the part in the embodiment"
        if part.kind == "delta" and follows > 0.9 and pushes < 0.5:
            found.add("warning", "units", f"{name} is a delta and follows '{part.moves}' itself (correlation "
                      f"{follows:.2f}, with its change {pushes:.2f}): it looks absolute", mend)  # fmt: skip
        elif part.kind == "delta" and pushes > 0.7:
            slope = float((u * moved).sum() / (u * u).sum())
            if not 0.2 < slope / part.scale < 5:
                found.add("warning", "units", f"{name} moves '{part.moves}' by {slope:.3g} per unit, its scale says "
                          f"{part.scale:.3g}", mend)  # fmt: skip
        elif part.kind == "absolute":
            ratio = float(u.std(0).mean() / max(a.std(0).mean(), 1e-12))
            if follows < 0.3 and pushes > 0.7:
                what = f"follows the change of '{part.moves}' (correlation {pushes:.2f}, with itself {follows:.2f})"
                found.add("warning", "units", f"{name} is absolute and {what}: it looks like a delta", mend)
            elif follows > 0.7 and not 0.1 < ratio * part.scale < 10:
                found.add("warning", "units", f"{name} varies {ratio:.3g} times as much as '{part.moves}', which it "
                          f"sets (a radian has 57.3 degrees)", mend)  # fmt: skip


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's, over the entries that vary in both, pooled."""
    keep = (x.std(0) > 1e-9) & (y.std(0) > 1e-9)
    if not keep.any():
        return 0.0
    x, y = ((v[:, keep] - v[:, keep].mean(0)) / v[:, keep].std(0) for v in (x, y))
    return float((x * y).mean())
