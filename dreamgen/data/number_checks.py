"""The statistics that a dataset stores against those of its data."""

from collections.abc import Callable, Mapping

import numpy as np

from dreamgen.data import statistics
from dreamgen.data.findings import Findings

MOMENTS = ("min", "max", "mean", "std")
ROUNDED = 1e-6  # of an entry's size: what is left of it in float32, where it does not vary
CLOSE = 1e-3  # of an entry's range: what rounding and another summing order may change
LOOSE = 0.05  # of an entry's range: quantiles that were estimated (lerobot averages those of its episodes)
PICTURE = 0.05  # of full brightness: pictures that were sampled and made smaller (lerobot)
WIDE = 1.0  # of an entry's range: how far beyond the data's ends stored ones lie that are of other data
REMAKE = "`dreamgen export` computes them anew"


def check_statistics(said: Mapping[str, Mapping], true: Mapping[str, Mapping], found: Findings, where: str,
                     level: Callable[[str], str], episode: int | None = None) -> None:  # fmt: skip
    """Statistics as stored against those of the data, per feature. where: names the file; level: of what is wrong with
    a feature."""
    if lacks := sorted(true.keys() - said.keys()):
        found.add("warning", "statistics", f"{where} has none of {', '.join(map(repr, lacks))}", REMAKE, episode)
    for name in sorted(true.keys() & said.keys()):
        picture, worst = np.ndim(true[name]["mean"]) == 3, level(name)
        try:
            stored = {key: np.asarray(value, dtype=np.float64).reshape(-1) for key, value in said[name].items()}
        except (AttributeError, TypeError, ValueError):
            found.add(worst, "statistics", f"{where}: '{name}' holds what are no lists of numbers", REMAKE, episode)
            continue
        own = {key: np.asarray(value, dtype=np.float64).reshape(-1) for key, value in true[name].items()}
        wrong = next((k for k, v in stored.items() if k in own and v.shape != own[k].shape), None)
        if wrong is not None:
            found.add(worst, "statistics", f"{where}: '{wrong}' of '{name}' has {stored[wrong].size} entries, the "
                      f"data {own[wrong].size}", REMAKE, episode)  # fmt: skip
            continue
        if broken := [key for key, values in stored.items() if not np.isfinite(values).all()]:
            at = int(np.flatnonzero(~np.isfinite(stored[broken[0]]))[0])
            found.add(worst, "statistics", f"{where}: '{broken[0]}' of '{name}' is {stored[broken[0]][at]} at entry "
                      f"{at}", REMAKE, episode)  # fmt: skip
            continue
        if contradiction := _contradiction(stored):
            found.add(worst, "statistics", f"{where} contradicts itself: '{name}' {contradiction}", REMAKE, episode)
            continue
        if off := _off(stored, own, picture):
            kind, words = off
            found.add(worst if kind == "error" else kind, "statistics", f"{where}: '{name}' {words}", REMAKE, episode)


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
    slack = ROUNDED * np.maximum(np.abs(own["min"]), np.abs(own["max"]))
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
        worse = (way * gap if way else np.abs(gap)) - slack
        at = int(np.argmax(worse / span))
        if worse[at] > tolerance * span[at]:
            what = f"{key} of entry {at} is {stored[key][at]:.6g}, that of the data {own[key][at]:.6g}"
            return level, what + words
    if not picture and "count" in stored and stored["count"][0] != own["count"][0]:
        return "warning", f"count is {stored['count'][0]:.0f}, the data have {own['count'][0]:.0f} rows: other data"
    return None
