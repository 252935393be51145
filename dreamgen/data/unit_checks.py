"""The units of a robot's parts as far as numbers give them away.

States and actions are taken episode by episode, and only sums of them are kept: means and products of deviations are
merged (Chan, Golub and LeVeque 1979, eq. 2.1).
"""

import re

import numpy as np
from jaxtyping import Float64

from dreamgen.core import rotations
from dreamgen.core.embodiment import Embodiment, Part
from dreamgen.data.findings import Findings
from dreamgen.data.turn_checks import TurnForm, TurnMotion

SPIKE = 30  # standard deviations between the lowest and the highest value
LEVELS = 1000  # different values of a binary part that are counted
# unit: (its values lie below this, then they look like that unit); radians may turn twice
BOUNDS = {"rad": (4 * np.pi, "degrees"), "m": (20.0, "millimetres or centimetres")}
FLOORS = {"deg": (2 * np.pi, "radians"), "mm": (2.0, "metres")}


class Units:
    """Takes the states and actions of one episode after another; `check` says which parts look like something else."""

    def __init__(self, robot: Embodiment) -> None:
        where = {part.name: part for part in robot.state}
        self.robot = robot
        self._states, self._actions = ([_Part(part) for part in parts] for parts in (robot.state, robot.action))
        self._motions = [TurnMotion(part, where[part.moves]) if part.rotation else
                         _Motion(part, where[part.moves], robot.turning(part)[1] if part.turned_by else None)
                         for part in robot.action if part.moves is not None and part.kind != "binary"]  # fmt: skip
        alike = {part.name: part for part in robot.action if part.kind == "absolute" and not part.rotation
                 and part.moves is None and part.width == getattr(where.get(part.name), "width", 0)}  # fmt: skip
        self._motions += [_Motion(part, where[name], None) for name, part in alike.items()]

    def add(self, state: np.ndarray | None, action: np.ndarray | None) -> None:
        """One episode: states (s d) and actions (s a), None where it has none. Those of another width are passed over;
        whether the states move as the actions say is asked where there are both."""
        state, action = (
            values.astype(np.float64) if values is not None and values.shape[1] == width else None
            for values, width in ((state, self.robot.state_dim), (action, self.robot.action_dim))
        )
        for values, parts in ((state, self._states), (action, self._actions)):
            for part in parts if values is not None else ():
                part.add(values[:, part.part.slice])
        if state is not None and action is not None and len(state) > 1:
            for motion in self._motions:
                motion.add(state, action)

    def check(self, found: Findings) -> None:
        """Say what looks wrong of all that was added."""
        for kind, parts in (("state", self._states), ("action", self._actions)):
            taken = [part for part in parts if part.sums.count]
            still = [f"'{part.part.name}' ({part.low[0]:.4g})" for part in taken if (part.high == part.low).all()]
            if still:
                found.add("note", "units", f"{kind} part{'s' * (len(still) > 1)} {', '.join(still)} never "
                          f"var{'y' if len(still) > 1 else 'ies'}", "nothing to learn there; leave it out, or record it"
                          )  # fmt: skip
            for part in taken:
                part.check(f"{kind} part '{part.part.name}'", found, kind == "action")
        for motion in self._motions:
            if motion.count:
                motion.check(found)


class _Sums:
    """Number, mean (k) and products of deviations (k k) of rows that come in chunks."""

    def __init__(self, width: int) -> None:
        self.count, self.mean, self.products = 0, np.zeros(width), np.zeros((width, width))

    def add(self, values: Float64[np.ndarray, "n k"]) -> None:
        n, own = len(values), values.mean(0)
        off, total = own - self.mean, self.count + n
        self.products += (values - own).T @ (values - own) + np.outer(off, off) * (self.count * n / total)
        self.mean, self.count = self.mean + off * (n / total), total

    def covariance(self) -> Float64[np.ndarray, "k k"]:
        return self.products / self.count

    def std(self) -> Float64[np.ndarray, " k"]:
        return np.sqrt(np.diag(self.covariance()))


class _Part:
    """What is asked of the numbers of one part."""

    def __init__(self, part: Part) -> None:
        self.part, self.sums, self.levels = part, _Sums(part.width), np.zeros(0)
        self.form = TurnForm(part) if part.rotation else None
        self.low, self.high = np.full(part.width, np.inf), np.full(part.width, -np.inf)
        self.outside = self.far = self.at = 0  # values beyond the limits, far beyond them, and at them
        self.most, self.worst = 0.0, 0.0  # how far beyond the farthest value is, and the value

    def add(self, values: Float64[np.ndarray, "n k"]) -> None:
        self.sums.add(values)
        if self.form is not None:
            self.form.add(values)
        self.low, self.high = np.minimum(self.low, values.min(0)), np.maximum(self.high, values.max(0))
        if self.part.kind == "binary" and len(self.levels) < LEVELS:
            self.levels = np.union1d(self.levels, values)[:LEVELS]
        if self.part.limits is None:
            return
        low, high = self.part.limits
        slack = 1e-3 * (high - low)
        beyond = np.maximum(low - values, values - high)
        self.outside += int((beyond > slack).sum())
        self.far += int((beyond > 0.1 * (high - low)).sum())
        self.at += int(((np.abs(values - low) <= slack) | (np.abs(values - high) <= slack)).sum())
        if beyond.max() > self.most:
            self.most, self.worst = float(beyond.max()), float(values.reshape(-1)[beyond.argmax()])

    def check(self, name: str, found: Findings, acts: bool) -> None:
        part, low, high, std = self.part, self.low, self.high, self.sums.std()
        mend = f"correct its unit in the embodiment ('{part.unit}'), or the recording"
        most = float(np.maximum(np.abs(low), np.abs(high)).max())
        if self.form is not None:
            self.form.check(name, found)
        if part.unit not in (*BOUNDS, *FLOORS) and (meant := re.match("(rad|deg|mm|m)[a-z]*$", part.unit.lower())):
            found.add("warning", "units", f"{name} has the unit '{part.unit}', by which nothing is checked",
                      f"call it {meant[1]} in the embodiment")  # fmt: skip
        if (high == low).all():
            return
        if part.unit in BOUNDS and most > BOUNDS[part.unit][0]:
            found.add("warning", "units", f"{name} is in {part.unit} and reaches {most:.4g} (std {std.max():.4g}): it "
                      f"looks like {BOUNDS[part.unit][1]}", mend)  # fmt: skip
        if part.unit in FLOORS and most <= FLOORS[part.unit][0]:
            found.add("warning", "units", f"{name} is in {part.unit} and stays within {most:.4g} (std "
                      f"{std.max():.4g}): it looks like {FLOORS[part.unit][1]}", mend)  # fmt: skip
        for at in np.flatnonzero((high - low) > SPIKE * np.maximum(std, 1e-12)).tolist()[:1]:
            if part.kind != "binary":
                found.add("warning", "units", f"{name} entry {at} ranges over {(high - low)[at] / std[at]:.0f} "
                          f"standard deviations ({low[at]:.4g} to {high[at]:.4g}): a few rows are far off",
                          "look at these rows; leave their episodes out if they are glitches")  # fmt: skip
        if part.kind == "binary" and (levels := len(self.levels)) > 2:
            found.add("warning", "units", f"{name} is binary and takes {levels}{' or more' * (levels == LEVELS)} "
                      f"values", "call it absolute in the embodiment, or threshold it")  # fmt: skip
        if part.limits is not None:
            self._check_limits(name, part.limits, found, acts)

    def _check_limits(self, name: str, limits: tuple[float, float], found: Findings, acts: bool) -> None:
        size = self.sums.count * self.part.width
        if self.outside:
            level = "error" if self.far / size > 0.01 else "warning"
            found.add(level, "units", f"{name} reaches {self.worst:.4g}, {self.outside / size:.1%} of its values lie "
                      f"beyond its limits [{limits[0]:.4g}, {limits[1]:.4g}]",
                      "correct the limits of the embodiment, or clip the recording")  # fmt: skip
        if acts and self.part.kind != "binary" and self.at / size > 0.3:
            found.add("warning", "units", f"{name} is at its limits in {self.at / size:.0%} of its values",
                      "the commands saturate; record with wider limits or smaller steps")  # fmt: skip


class _Motion:
    """Does a part of the state move as an action part says, along the axes of the rotation `wrist` if there is one?"""

    def __init__(self, part: Part, moves: Part, wrist: Part | None) -> None:
        self.part, self.moves, self.wrist, self.sums = part, moves, wrist, _Sums(part.width + 2 * moves.width)

    @property
    def count(self) -> int:
        """Rows that were added."""
        return self.sums.count

    def add(self, state: Float64[np.ndarray, "s d"], action: Float64[np.ndarray, "s a"]) -> None:
        at, moved = self.moves.slice, np.diff(state[:, self.moves.slice], axis=0)
        if self.wrist is not None:
            axes = rotations.read(self.wrist, state[:-1, self.wrist.slice])
            moved = rotations.rotate(rotations.inverse(axes), moved)
        self.sums.add(np.concatenate([action[:-1, self.part.slice], state[1:, at], moved], 1))

    def check(self, found: Findings) -> None:
        part, width, mean = self.part, self.part.width, self.sums.mean
        u, a, moved = (slice(k * width, (k + 1) * width) for k in range(3))
        variance = np.diag(self.sums.covariance())
        if variance[a].mean() < 1e-18 or variance[u].mean() + mean[u].var() < 1e-18:
            return
        name = f"action part '{part.name}'"
        follows = self._correlation(u, a)  # of the command with where the robot then is, and with how far it then went
        pushes = self._correlation(u, moved)
        mend = "correct kind, unit or scale of the part in the embodiment"
        if part.moves is None and not (follows < 0.3 and pushes > 0.7):
            return
        if part.kind == "delta" and follows > 0.9 and pushes < 0.5:
            found.add("warning", "units", f"{name} is a delta and follows '{part.moves}' itself (correlation "
                      f"{follows:.2f}, with its change {pushes:.2f}): it looks absolute", mend)  # fmt: skip
        elif part.kind == "delta" and pushes > 0.7:
            both = np.diag(self.sums.covariance()[u, moved]) + mean[u] * mean[moved]
            slope = float(both.sum() / (variance[u] + mean[u] ** 2).sum())
            if not 0.2 < slope / part.scale < 5:
                found.add("warning", "units", f"{name} moves '{part.moves}' by {slope:.3g} per unit, its scale says "
                          f"{part.scale:.3g}", mend)  # fmt: skip
        elif part.kind == "absolute":
            std = self.sums.std()
            ratio = float(std[u].mean() / max(std[a].mean(), 1e-12))
            if follows < 0.3 and pushes > 0.7:
                what = (
                    f"follows the change of '{self.moves.name}' (correlation {pushes:.2f}, with itself {follows:.2f})"
                )
                found.add("warning", "units", f"{name} is absolute and {what}: it looks like a delta", mend)
            elif follows > 0.7 and not 0.1 < ratio * part.scale < 10:
                found.add("warning", "units", f"{name} varies {ratio:.3g} times as much as '{part.moves}', which it "
                          f"sets (a radian has 57.3 degrees)", mend)  # fmt: skip

    def _correlation(self, x: slice, y: slice) -> float:
        """Pearson's, the mean over the entries that vary in both."""
        std, products = self.sums.std(), np.diag(self.sums.covariance()[x, y])
        keep = (std[x] > 1e-9) & (std[y] > 1e-9)
        return float((products[keep] / (std[x] * std[y])[keep]).mean()) if keep.any() else 0.0
