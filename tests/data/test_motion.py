"""What is drawn by motion: closed forms."""

import numpy as np
import pytest

from dreamgen.core import rotations
from dreamgen.core.embodiment import Part
from dreamgen.data.motion import motion_of, weights

MOVE = Part(name="move", start=0, stop=2, kind="delta")


def test_what_is_commanded_above_an_episodes_median_counts_in_units_of_its_spread():
    waits, moves = np.zeros((6, 2), np.float32), np.zeros((4, 2), np.float32)
    moves[3] = 3, -8
    waits[:, 1] = 5  # held throughout: nothing moves
    scale = np.concatenate([waits, moves]).std(0) + 1e-6
    still, moving = motion_of([MOVE], [waits, moves])
    np.testing.assert_array_equal(still, np.zeros(6))
    np.testing.assert_allclose(moving, [0, 0, 0, (np.array([3, 8]) / scale).mean()])


@pytest.mark.parametrize("zero", [0.0, -3.0])
def test_of_absolute_parts_the_change_counts_wherever_their_zero_lies(zero):
    """A joint that goes out and back, and one that is held far out; nothing of it is posture."""
    place = Part(name="place", start=0, stop=2)
    action = np.full((9, 2), zero)
    action[3:6, 0] += [1, 3, 0]
    action[:, 1] += 7
    way = np.array([0, 0, 0, 1, 2, 3, 0, 0, 0])
    scale = np.diff(action[:, 0], prepend=zero).std() + 1e-6
    np.testing.assert_allclose(motion_of([place], [action])[0], way / scale / 2)


def test_commands_are_no_motion():
    parts = [MOVE, Part(name="hand", start=2, stop=3, kind="binary", limits=(0, 255))]
    action = np.array([[0, 0, 0], [0, 0, 255], [1, 0, 255], [0, 0, 0]], np.float32)
    np.testing.assert_allclose(motion_of(parts, [action])[0] > 0, [False, False, True, False])
    signs = np.where(action[:, 2:] > 0, 1, -1).astype(np.float32)
    size = np.abs((told := np.concatenate([action[:, :2], signs], 1)) / (told.std(0) + 1e-6))
    # commands of -1 and 1 have one size, which is its own median: they never were motion, to the bit
    wanted = (size - np.median(size, axis=0)).clip(0).mean(1)
    np.testing.assert_array_equal(motion_of(parts, [told])[0], wanted)


@pytest.mark.parametrize("rotation", ["euler_xyz", "quaternion_wxyz", "rot6d"])
def test_absolute_rotations_move_by_their_turns(rotation):
    """Through the place where the telling wraps or changes its sign."""
    wide = {"euler_xyz": 3, "quaternion_wxyz": 4, "rot6d": 6}[rotation]
    part = Part(name="turn", start=0, stop=wide, rotation=rotation)
    angle = np.array([0, 0, 0, 1, 3, 4, 4, 4, 4])
    told = rotations.tell(part, rotations.exp(angle[:, None] * [0, 0, 1.0]))
    way = np.array([0, 0, 0, 1, 2, 1, 0, 0, 0])
    np.testing.assert_allclose(motion_of([part], [told])[0], way / (way.std() + 1e-6), rtol=1e-5)


def test_a_share_is_drawn_alike_and_the_rest_by_motion():
    moved = np.array([0.0, 1.0, 3.0])
    np.testing.assert_allclose(weights(moved, 0.4), 0.4 + 0.6 * moved / moved.mean())
    assert weights(moved, 0.4).mean() == pytest.approx(1)
    np.testing.assert_array_equal(weights(moved, 1.0), np.ones(3))
    np.testing.assert_allclose(weights(np.zeros(3), 0.4), np.full(3, 0.4))  # all wait: all alike
