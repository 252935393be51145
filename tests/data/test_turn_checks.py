"""What numbers give away of rotations that are told otherwise than the embodiment says."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from dreamgen.core import rotations
from dreamgen.core.embodiment import Embodiment, View
from dreamgen.core.kinematics import follow
from dreamgen.core.part import ROTATIONS, Part
from dreamgen.data.findings import Finding, Findings
from dreamgen.data.normaliser import Normaliser
from dreamgen.data.turn_checks import OFTEN
from dreamgen.data.unit_checks import Units

VIEW = View(name="eye", key="eye", height=8, width=8)


def robot(state: str, action: str, **changes) -> Embodiment:
    wrist = Part(name="wrist", start=0, stop=ROTATIONS[state], rotation=state)
    turn = Part(name="turn", start=0, stop=ROTATIONS[action], rotation=action, moves="wrist", **changes)
    return Embodiment(name="arm", robot_hz=10, views=(VIEW,), state=(wrist,), action=(turn,))


def moved(arm: Embodiment) -> tuple[np.ndarray, np.ndarray]:
    """States and actions of an episode that crosses half a turn."""
    rng, part = np.random.default_rng(0), arm.action[0]
    steps = Rotation.from_rotvec(rng.normal(0, 0.15, (80, 3)))
    start = Rotation.from_rotvec([np.pi - 0.1, 0, 0])
    if part.kind == "absolute":
        total = [start]
        for step in steps:
            total.append(step * total[-1])
        steps = Rotation.concatenate(total[1:])
    action = rotations.tell(part, np.roll(steps.as_quat(), 1, -1))
    first = rotations.tell(arm.state[0], np.roll(start.as_quat(), 1))
    return follow(arm, first, action)[0][:-1], action


def said(arm: Embodiment, state: np.ndarray, action: np.ndarray) -> list[Finding]:
    units, found = Units(arm), Findings()
    units.add(state, action)
    units.check(found)
    return [one for one in found.list() if one.level != "note"]


@pytest.mark.parametrize("changes", [{}, {"kind": "delta"}, {"kind": "delta", "frame": "tool"}])
@pytest.mark.parametrize("state", ROTATIONS)
def test_nothing_is_said_of_what_is_right(state, changes):
    for action in ROTATIONS:
        arm = robot(state, action, **changes)
        assert said(arm, *moved(arm)) == [], action


def test_entries_that_are_none_of_a_rotation():
    for kind, words in (("quaternion_xyzw", "and not of the size 1 in 100.0% of its rows (off by up to"),
                        ("rot6d", "is a 'rot6d' and not orthonormal in 100.0% of its rows")):  # fmt: skip
        arm = robot(kind, "axis_angle", kind="delta")
        state, action = moved(arm)
        (one,) = said(arm, 1.1 * state, action)
        assert words in one.what and one.level == "warning"
    for kind, words in (("euler_xyz", "is an 'euler_xyz' beyond half a turn"),
                        ("axis_angle", "is an 'axis_angle' of more than a whole turn")):  # fmt: skip
        arm = robot(kind, "axis_angle", kind="delta")
        state, action = moved(arm)
        degrees = np.rad2deg(state)
        assert any(words in one.what and one.level == "warning" for one in said(arm, degrees, action))
        tidy = replace(arm, state=(replace(arm.state[0], unit="deg"),),
                       action=(replace(arm.action[0], unit="rad", scale=180 / np.pi),))  # fmt: skip
        assert said(tidy, degrees, action) == []


@pytest.mark.parametrize("kind", ["euler_xyz", "euler_xyz_intrinsic"])
def test_a_hand_at_the_pole_of_its_angles(kind, caplog):
    arm = robot(kind, "axis_angle", kind="delta")
    rng = np.random.default_rng(0)
    action = rng.normal(0, 0.05, (80, 3))
    state = follow(arm, np.array([0.3, np.pi / 2 - 0.05, 0.1]), action)[0][:-1]
    share = np.mean(np.abs(np.abs(state[:, 1]) - np.pi / 2) < 0.1)
    (one,) = said(arm, state, action)
    assert OFTEN < share < 1 and f"near a quarter turn in {share:.0%} of its rows" in one.what and "rot6d" in one.mend
    Normaliser.fit(state, arm.state)
    assert f"'wrist' is told by euler angles whose second is near a quarter turn in {share:.0%}" in caplog.text


def test_turns_that_fit_another_frame_scale_or_telling():
    arm = robot("axis_angle", "axis_angle", kind="delta", frame="tool")
    state, action = moved(arm)
    (one,) = said(robot("axis_angle", "axis_angle", kind="delta"), state, action)
    assert "as deltas in the frame 'tool' would" in one.what and one.mend == "say frame: tool in the embodiment"
    base = robot("axis_angle", "axis_angle", kind="delta")
    (one,) = said(arm, *moved(base))
    assert one.mend == "say frame: base in the embodiment"
    (one,) = said(base, moved(base)[0], 10 * moved(base)[1].clip(-0.15, 0.15))
    assert "turns 'wrist' by 0.1" in one.what and "scale" in one.mend
    swapped = robot("quaternion_xyzw", "quaternion_wxyz")
    state, action = moved(swapped)
    (one,) = said(robot("quaternion_wxyz", "quaternion_wxyz"), state, action)
    assert "rad from the rotation 'wrist' that it sets" in one.what
