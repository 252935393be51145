"""Where commands of rotations lead, composed by scipy, across half a turn and in every telling."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from dreamgen.core import rotations
from dreamgen.core.embodiment import Embodiment, View
from dreamgen.core.kinematics import clipped, command, follow, within
from dreamgen.core.part import ANGLES, ROTATIONS, Part
from tests.core.test_rotations import part, quaternions, told

VIEW = View(name="eye", key="eye", height=8, width=8)


def robot(state: str, action: str, **changes) -> Embodiment:
    turn = replace(part(action, **changes), name="turn", moves="wrist")
    return Embodiment(name="arm", robot_hz=10, views=(VIEW,), action=(turn,),
                      state=(replace(part(state), name="wrist"),))  # fmt: skip


@pytest.mark.parametrize("frame", ["base", "tool"])
@pytest.mark.parametrize("state", ROTATIONS)
@pytest.mark.parametrize("action", ROTATIONS)
def test_deltas_compose(state, action, frame):
    rng = np.random.default_rng(3)
    start = Rotation.from_rotvec([np.pi - 0.05, 0.02, 0.0])  # a hand that points down
    steps = Rotation.from_rotvec(rng.normal(0, 0.2, (30, 3)))
    arm = robot(state, action, kind="delta", frame=frame)
    found, known = follow(arm, told(state, start).astype(np.float32), told(action, steps).astype(np.float32))
    assert known.all() and found.shape == (31, ROTATIONS[state])
    true = [start]
    for step in steps:
        true.append(true[-1] * step if frame == "tool" else step * true[-1])
    expected = quaternions(Rotation.concatenate(true))
    q = rotations.read(arm.state[0], found)
    assert rotations.angle(q, expected).max() < 1e-5
    if state.startswith("quaternion"):
        assert (np.sum(found[1:] * found[:-1], 1) > 0).all()  # no change of sign
    nothing, _ = follow(arm, found[0], np.zeros((0, ROTATIONS[action])))
    np.testing.assert_array_equal(nothing, found[:1])
    still, _ = follow(arm, found[0], np.tile(arm.action[0].rest, (5, 1)))
    assert rotations.apart(arm.state[0], still, found[:1]).max() < 1e-6


@pytest.mark.parametrize("state", ROTATIONS)
@pytest.mark.parametrize("action", ROTATIONS)
def test_targets_are_reached(state, action):
    targets = Rotation.random(9, rng=4)
    arm = robot(state, action)
    found, known = follow(arm, told(state, targets[0]), told(action, targets))
    assert known.all()
    assert rotations.angle(rotations.read(arm.state[0], found[1:]), quaternions(targets)).max() < 1e-5
    if state == action:
        np.testing.assert_array_equal(found[1:], told(action, targets).astype(np.float32))


def test_degrees_and_scales_agree_on_both_sides():
    turn = np.array([[0.2, -0.1, 0.5], [0.3, 0.3, 0.0]])
    want = None
    for unit, scale, state in (("rad", 1.0, "rad"), ("deg", np.pi / 180, "rad"), ("1", 0.5, "rad"), ("deg", 1.0, "deg"),
                               ("rad", 180 / np.pi, "deg")):  # fmt: skip
        arm = Embodiment(name="arm", robot_hz=10, views=(VIEW,),
                         state=(Part(name="wrist", start=0, stop=3, rotation="euler_xyz", unit=state),),
                         action=(Part(name="turn", start=0, stop=3, rotation="axis_angle", kind="delta", unit=unit,
                                      scale=scale, moves="wrist"),))  # fmt: skip
        entry = turn / arm.action[0].radians
        found = follow(arm, np.zeros(3), entry)[0] * arm.state[0].radians
        want = found if want is None else want
        np.testing.assert_allclose(found, want, atol=1e-6)


def test_what_does_not_fit_is_explained():
    turn = dict(name="turn", start=0, stop=3)
    with pytest.raises(
        ValueError, match="absolute part 'turn' has the rotation 'rpy'; expected one of axis_angle, eul"
    ):
        Part(**turn, rotation="rpy")
    with pytest.raises(ValueError, match="binary part 'turn' has the rotation 'axis_angle'"):
        Part(**turn, rotation="axis_angle", kind="binary")
    with pytest.raises(
        ValueError, match="'turn' covers 3 entries; its rotation 'quaternion_xyzw' has 4: make it a part"
    ):
        Part(**turn, rotation="quaternion_xyzw")
    with pytest.raises(ValueError, match="'turn' has the scale 2; the entries of a 'rot6d' are no angles"):
        Part(name="turn", start=0, stop=6, rotation="rot6d", scale=2.0)
    plain, wrist = Part(name="wrist", start=0, stop=3), Part(name="wrist", start=0, stop=3, rotation="axis_angle")
    for moves, state, words in (
        (Part(**turn, rotation="axis_angle", moves="wrist"), plain, "one is a rotation: 'axis_angle' and ''; say it"),
        (Part(**turn, moves="wrist"), wrist, "one is a rotation: '' and 'axis_angle'; say it of both"),
        (Part(name="turn", start=0, stop=2, moves="wrist"), plain, "2 wide and moves 'wrist', which is 3 wide; they"),
        (Part(**turn, rotation="axis_angle", kind="delta", frame="ee", moves="wrist"), wrist,
         "delta rotation in the frame 'ee'; expected 'tool' .R D., or 'base', that of 'wrist' .D R."),
        (Part(**turn, rotation="axis_angle", unit="rad", scale=0.1, moves="wrist"), wrist, "0.1 to 'wrist' in 1; e"),
        (Part(**turn, rotation="axis_angle", scale=2.0, moves="wrist"), replace(wrist, unit="deg"), "give it the"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            Embodiment(name="arm", robot_hz=10, views=(VIEW,), state=(state,), action=(moves,))


def test_a_contract_that_does_not_tell_of_rotations_still_fits(caplog):
    arm = robot("quaternion_xyzw", "axis_angle", kind="delta", frame="tool")
    saved = arm.contract()
    assert saved["state"][0]["rotation"] == "quaternion_xyzw" and Embodiment.from_contract(saved) == arm
    older = robot("axis_angle", "axis_angle").contract()
    for key in ("state", "action"):
        older[key][0].pop("rotation")
    plain = Embodiment.from_contract(older)
    assert plain.contract() == older
    told = robot("axis_angle", "axis_angle")
    told.require(older, "the dataset there")
    assert caplog.records[0].getMessage().endswith("the rotation of state 'wrist', the rotation of action 'turn'")
    for here, there, words in ((told, older, "'axis_angle', saved None"), (plain, told.contract(), "None, saved 'ax")):
        with pytest.raises(
            ValueError, match=f"state 'wrist': rotation here {words}(.|\n)*Choose the embodiment it was"
        ):
            here.require(there, "the labeler there", learned=True)
    with pytest.raises(ValueError, match="state 'wrist': .*rotation here 'quaternion_wxyz', saved 'quaternion_xyzw'"):
        robot("quaternion_wxyz", "axis_angle", kind="delta", frame="tool").require(saved, "the dataset there")


@pytest.mark.parametrize("unit", ["deg", "rad"])
@pytest.mark.parametrize("kind", ["euler_xyz", "euler_xyz_intrinsic", "axis_angle"])
def test_limits_are_those_of_a_rotation_however_it_is_told(kind, unit):
    """A hand that points down, of a robot that reports angles up to a whole turn."""
    rng, size = np.random.default_rng(5), ANGLES[unit]
    wanted = rng.uniform(0.4, 1.2, (2, 9, 3)) + [2.8, 0.2, 0.2] if kind == "axis_angle" else (
        rng.uniform([2.8, -1.2, 3.3], [3.5, 1.2, 6.2], (2, 9, 3)) % (2 * np.pi))  # fmt: skip
    arm = robot(kind, kind, unit=unit, scale=1.0 if unit == "rad" else size, limits=(0, 2 * np.pi / size))
    wanted, turn = (wanted / size).astype(np.float32), arm.action[0]
    told = rotations.tell(turn, rotations.read(turn, wanted)).astype(np.float32)
    assert (told < 0).any()
    for found in (command(arm, told), clipped(arm, told), within(arm, told, "here")):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    for same in (command(arm, wanted), clipped(arm, wanted), within(arm, wanted, "here")):
        np.testing.assert_array_equal(same, wanted)


def test_what_no_telling_brings_inside_the_limits_is_clipped():
    narrow = robot("euler_xyz", "euler_xyz", unit="deg", scale=np.pi / 180, limits=(-90, 200))
    action = np.array([[-100, 0, 210], [-160, 195, -95], [-170, -80, 560]], np.float32)
    want = [[-90, 0, 200], [200, 195, -90], [190, -80, 200]]
    np.testing.assert_allclose(command(narrow, action), want, atol=1e-4)
    assert action[0, 0] == -100
    with pytest.raises(ValueError, match="here: action part 'turn' is 210; .* allows -90 to 200"):
        within(narrow, action[:1], "here")
    steps = replace(narrow, action=(replace(narrow.action[0], kind="delta"),))  # a step says which way it goes
    np.testing.assert_array_equal(command(steps, action), action.clip(-90, 200))
