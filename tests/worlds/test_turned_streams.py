"""Commands of rotations that are disturbed, mirrored, late, composed for world models, slowed and exported."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from dreamgen.core import rotations
from dreamgen.core.clip import Clip, Labels
from dreamgen.core.embodiment import Embodiment, View
from dreamgen.core.kinematics import follow
from dreamgen.core.part import ROTATIONS, Part
from dreamgen.data.groot import modality, relative_stats
from dreamgen.data.streams import late, mirrored, noisy, resting, still, told
from dreamgen.data.video_rate import at_video_rate, slowed
from dreamgen.filters.jerk import jerk
from dreamgen.stages.evaluate_labels import held
from dreamgen.stages.label import labelled_episode
from dreamgen.worlds.action_frames import latent_actions

VIEW = View(name="eye", key="observation.images.eye", height=16, width=24)
STEPS = 12


def robot(rotation: str, kind: str = "delta", frame: str = "base", state: str = "quaternion_wxyz") -> Embodiment:
    wide = ROTATIONS[rotation]
    return Embodiment(
        name="arm", robot_hz=10, views=(VIEW,),
        state=(Part(name="wrist", start=0, stop=ROTATIONS[state], rotation=state),),
        action=(Part(name="turn", start=0, stop=wide, kind=kind, rotation=rotation, frame=frame, moves="wrist"),
                Part(name="lift", start=wide, stop=wide + 1, kind="delta")),
    )  # fmt: skip


def commands(arm: Embodiment, seed: int = 0) -> tuple[np.ndarray, Rotation]:
    """Actions (s a), and their turns or targets: a hand that points down."""
    rng = np.random.default_rng(seed)
    turns = Rotation.from_rotvec(rng.normal(0, 0.2, (STEPS, 3)))
    if arm.action[0].kind == "absolute":
        turns = turns * Rotation.from_rotvec([np.pi, 0, 0])
    entries = rotations.tell(arm.action[0], np.roll(turns.as_quat(), 1, -1))
    return np.concatenate([entries, rng.normal(size=(STEPS, 1))], 1).astype(np.float32), turns


def apart(arm: Embodiment, action: np.ndarray, turns: Rotation) -> float:
    part = arm.action[0]
    found = rotations.read(part, action[:, part.slice])
    return float(np.max(rotations.angle(found, np.roll(turns.as_quat(), 1, -1).reshape(-1, 4))))


@pytest.mark.parametrize("kind", ["absolute", "delta"])
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_other_streams_are_rotations_still(rotation, kind):
    arm = robot(rotation, kind)
    action, turns = commands(arm)
    rng = np.random.default_rng(1)
    noise = 0.05 * np.random.default_rng(1).normal(size=(STEPS, 3))
    found = noisy(arm, action, 0.05, rng)
    assert apart(arm, found, Rotation.from_rotvec(noise) * turns) < 1e-5
    np.testing.assert_array_equal(noisy(arm, action, 0.0, rng), action)
    assert apart(arm, told(arm, action * 3)[:, :-1], turns) < 1e-5 or ROTATIONS[rotation] == 3
    waits = late(arm, action, 3)
    first = Rotation.identity() if kind == "delta" else turns[0]
    assert apart(arm, waits, Rotation.concatenate([first, first, first, turns[:-3]])) < 1e-5
    assert apart(arm, still(arm, action), Rotation.concatenate([first] * STEPS)) < 1e-5
    last = Rotation.identity() if kind == "delta" else turns[-1]
    assert apart(arm, held(action, arm, 2), Rotation.concatenate([turns, last, last])) < 1e-5
    state = rotations.tell(arm.state[0], rotations.exp(np.array([3.1, 0.2, 0.0]))).astype(np.float32)
    rest = follow(arm, state, resting(arm, state, 4))[0]
    assert rotations.apart(arm.state[0], rest, state[None]).max() < 1e-5
    if kind == "delta":
        for entries, sign in (((1,), [1, -1, 1]), ((0, 2), [-1, 1, -1]), ((), [1, 1, 1])):
            mirror = np.diag(sign).astype(float)
            seen = Rotation.from_matrix(mirror @ turns.as_matrix() @ mirror)
            assert apart(arm, mirrored(arm, action, entries), seen) < 1e-5


@pytest.mark.parametrize("rotation", ["axis_angle", "euler_xyz"])
def test_other_streams_keep_limits_beyond_half_a_turn(rotation):
    """Of a hand that points down, told from 0 to a whole turn."""
    arm = robot(rotation, "absolute")
    arm = replace(arm, action=(replace(arm.action[0], limits=(0, 2 * np.pi)), arm.action[1]))
    entries = np.linspace([3.3, 0.3, 0.4], [3.6, 0.6, 0.9], STEPS)
    action, part = np.concatenate([entries, np.zeros((STEPS, 1))], 1).astype(np.float32), arm.action[0]
    turns = Rotation.from_quat(np.roll(rotations.read(part, entries), -1, -1))
    found = noisy(arm, action, 0.01, np.random.default_rng(1))
    noise = 0.01 * np.pi * np.random.default_rng(1).normal(size=(STEPS, 3))
    assert apart(arm, found, Rotation.from_rotvec(noise) * turns) < 1e-5
    assert found[:, :3].min() >= 0 and np.abs(found - action).max() < 0.5
    state = np.roll(turns[0].as_quat(canonical=True), 1).astype(np.float32)
    np.testing.assert_allclose(resting(arm, state, 2), action[[0, 0]], atol=1e-5)


@pytest.mark.parametrize("frame", ["base", "tool"])
@pytest.mark.parametrize("rotation", ["axis_angle", "quaternion_xyzw", "euler_xyz"])
def test_gaps_are_composed(rotation, frame):
    """In rows of pictures, and as a world model sees them; the slower robot arrives where the robot did."""
    arm = robot(rotation, frame=frame)
    action, turns = commands(arm)
    start = rotations.tell(arm.state[0], rotations.exp(np.array([3.0, 0, 0.3]))).astype(np.float32)
    state, _ = follow(arm, start, action)
    clip = Clip(id="a", video=np.zeros((7, 16, 24, 3), np.uint8), video_hz="5", instruction="turn", state=start)
    label = Labels(value=action, spread=np.ones_like(action))
    episode = labelled_episode(arm, clip, label, state[:-1], np.ones_like(state[:-1]), {})
    found, rows = at_video_rate(episode, arm)
    gaps = [turns[k] * turns[k + 1] if frame == "tool" else turns[k + 1] * turns[k] for k in range(0, STEPS, 2)]
    assert apart(arm, found.action, Rotation.concatenate(gaps)) < 1e-5
    ends = follow(slowed(arm, "5"), start, found.action)[0]
    assert rotations.apart(arm.state[0], ends, state[[*rows, STEPS]]).max() < 1e-5
    part = arm.action[0]
    seen = latent_actions(arm, np.arange(0, 13, 2), action, gaps=3).reshape(2, 3, arm.action_dim)
    for k in range(2):
        total = Rotation.identity()
        for gap in range(3):
            total = total * gaps[3 * k + gap] if frame == "tool" else gaps[3 * k + gap] * total
            q = rotations.read(part, seen[k, gap, part.slice] + np.array(part.rest))
            assert rotations.angle(q, np.roll(total.as_quat(), 1)) < 1e-5


def test_targets_are_seen_relative_to_where_the_hand_is():
    arm = robot("euler_xyz", "absolute")
    action, turns = commands(arm)
    start = Rotation.from_rotvec([3.0, 0, 0.3])
    state = rotations.tell(arm.state[0], np.roll(start.as_quat(), 1)).astype(np.float32)
    for known, before in ((state, start), (None, turns[0])):
        seen = latent_actions(arm, np.arange(0, 13, 2), action, gaps=3, state=known).reshape(6, -1)[:, :3]
        for gap, found in enumerate(seen):
            since = before if gap < 3 else turns[5]
            assert (Rotation.from_euler("xyz", found).inv() * turns[2 * gap + 1] * since.inv()).magnitude() < 1e-5


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_an_even_spin_has_no_jerk(rotation):
    part = Part(name="turn", start=0, stop=ROTATIONS[rotation], rotation=rotation)
    spin = rotations.exp(np.linspace(0, 9, 30)[:, None] * np.array([0.6, 0.0, 0.8]))
    assert jerk(rotations.tell(part, spin), part) < 1e-6
    faster = rotations.exp((np.arange(30)[:, None] ** 3 / 6e3) * np.array([0.6, 0.0, 0.8]))  # third difference 1e-3
    assert jerk(rotations.tell(part, faster), part) == pytest.approx(1e-3 / 3**0.5, rel=1e-4)
    delta = replace(part, kind="delta")
    assert jerk(rotations.tell(delta, np.tile(spin[1], (9, 1))), delta) < 1e-6


def test_groot_is_told_what_it_has_a_name_for():
    names = {kind: modality(robot(kind), [], [])["action"]["turn"].get("rotation_type") for kind in ROTATIONS}
    assert names == {"axis_angle": "axis_angle", "euler_xyz": None, "euler_xyz_intrinsic": "euler_angles_rpy",
                     "quaternion_xyzw": None, "quaternion_wxyz": "quaternion", "rot6d": "rotation_6d",
                     "rot6d_columns": None}  # fmt: skip
    arm = robot("axis_angle", "absolute", state="axis_angle")
    assert relative_stats(arm, [np.zeros((9, 3))], [np.zeros((9, 4))], 4) == {}
