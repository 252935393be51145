"""Rotations as far as numbers give away that they are told otherwise: sizes, ranges, and how the robot turns."""

import numpy as np
from jaxtyping import Float64

from dreamgen.core import rotations
from dreamgen.core.part import Part
from dreamgen.data.findings import Findings

OFF = 0.01  # by which sizes of quaternions, and of matrices' rows, may differ from 1
POLE, OFTEN = 0.1, 0.05  # radians from a quarter turn, and the share of rows from which on it matters
FAR = 0.5  # radians: commands that are further from the state that they set, on average, set another
FITS = 0.7  # correlation from which on the robot turns as it is told
SIZES = {"quaternion": "of the size 1", "rot6d": "orthonormal"}


def at_pole(part: Part, values: np.ndarray) -> float:
    """Share of rows (n width) of euler angles whose second is near a quarter turn: there the others jump."""
    euler = part.rotation.startswith("euler") and len(values)
    return float((np.abs(np.cos(values[:, 1] * part.radians)) < POLE).mean()) if euler else 0.0


class TurnForm:
    """Are the entries of a part those of a rotation?"""

    def __init__(self, part: Part) -> None:
        self.part, self.count, self.bad, self.pole, self.most = part, 0, 0, 0, 0.0

    def add(self, values: Float64[np.ndarray, "n k"]) -> None:
        """Rows of the part."""
        kind = self.part.rotation
        if kind.startswith("quaternion"):
            off, most = np.abs(np.linalg.norm(values, axis=1) - 1), OFF
        elif kind.startswith("rot6d"):
            a, b = values[:, :3], values[:, 3:]
            sizes = [np.linalg.norm(side, axis=1) - 1 for side in (a, b)]
            off, most = np.abs([*sizes, (a * b).sum(1)]).max(0), OFF
        elif kind == "axis_angle":
            off, most = np.linalg.norm(values, axis=1) * self.part.radians, 2 * np.pi + OFF
        else:  # beyond what a rotation is usually told by: half a turn, and a quarter in between
            off, most = (np.abs(values * self.part.radians) / [1, 0.5, 1]).max(1), np.pi + OFF
        self.count, self.bad = self.count + len(off), self.bad + int((off > most).sum())
        self.most = max(self.most, float(off.max(initial=0)))
        self.pole += round(at_pole(self.part, values) * len(values))

    def check(self, name: str, found: Findings) -> None:
        """Say what is wrong of all that was added."""
        if self.pole > OFTEN * self.count:
            found.add("warning", "rotations", f"{name} is an '{self.part.rotation}' whose second angle is near a "
                      f"quarter turn in {self.pole / self.count:.0%} of its rows, where the others jump",
                      "record it as rot6d or a quaternion")  # fmt: skip
        if not self.bad:
            return
        share, kind = f"{self.bad / self.count:.1%} of its rows", self.part.rotation
        mend = f"correct its rotation ('{kind}'), start or unit in the embodiment, or the recording"
        size = next((words for start, words in SIZES.items() if kind.startswith(start)), None)
        if size is not None:
            found.add("warning", "rotations", f"{name} is a '{kind}' and not {size} in {share} (off by up to "
                      f"{self.most:.3g})", mend)  # fmt: skip
        elif kind == "axis_angle":
            found.add("warning", "rotations", f"{name} is an 'axis_angle' of more than a whole turn in {share} (up to "
                      f"{self.most:.3g} rad)", mend)  # fmt: skip
        else:
            found.add("warning", "rotations", f"{name} is an '{kind}' beyond half a turn, or a quarter for its second "
                      f"angle, in {share}: unwrapped, or told otherwise", mend)  # fmt: skip


class TurnMotion:
    """Does a rotation of the state turn as an action part says?"""

    def __init__(self, part: Part, moved: Part) -> None:
        self.part, self.moved, self.count, self.far = part, moved, 0, 0.0
        self.told = self.went = 0.0  # sums of squares of the turns that are told and made, and of their products
        self.products = {"tool": 0.0, "base": 0.0}

    def add(self, state: Float64[np.ndarray, "s d"], action: Float64[np.ndarray, "s a"]) -> None:
        """One episode."""
        q, command = (rotations.read(part, rows[:, part.slice])
                      for part, rows in ((self.moved, state), (self.part, action)))  # fmt: skip
        self.count += len(q) - 1
        self.far += float(rotations.angle(command[:-1], q[1:]).sum())
        told = rotations.log(command[:-1])
        self.told += float((told**2).sum())
        for frame in self.products:
            inverse = rotations.inverse(q[:-1])
            pair = (inverse, q[1:]) if frame == "tool" else (q[1:], inverse)
            went = rotations.log(rotations.product(*pair))
            self.products[frame] += float((told * went).sum())
        self.went += float((went**2).sum())  # in either frame

    def check(self, found: Findings) -> None:
        """Say what is wrong of all that was added."""
        part, name = self.part, f"action part '{self.part.name}'"
        if part.kind == "absolute":
            if (far := self.far / self.count) > FAR:
                what = f"{name} is {far:.2g} rad from the rotation '{part.moves}' that it sets, on average"
                mend = "correct the rotation, unit, kind or frame of either in the embodiment"
                found.add("warning", "rotations", what, mend)
            return
        size = (self.told * self.went) ** 0.5
        if size < 1e-12:
            return
        own, other = ("tool", "base") if part.frame == "tool" else ("base", "tool")
        fits = {frame: products / size for frame, products in self.products.items()}
        if fits[other] > FITS and fits[own] < fits[other] - 0.2:
            say = "tool" if other == "tool" else self.moved.frame
            found.add("warning", "rotations", f"{name} turns '{part.moves}' as deltas in the frame '{say}' would "
                      f"(correlation {fits[other]:.2f}, in its own {fits[own]:.2f})",
                      f"say frame: {say} in the embodiment")  # fmt: skip
        elif fits[own] > FITS and not 0.2 < (slope := self.products[own] / self.told) < 5:
            found.add("warning", "rotations", f"{name} turns '{part.moves}' by {slope:.3g} of what it says",
                      "correct kind, unit or scale of the part in the embodiment")  # fmt: skip
