"""What is drawn by motion: closed forms."""

import numpy as np
import pytest

from dreamgen.data.motion import motion_of, weights


def test_what_is_commanded_above_an_episodes_median_counts_in_units_of_its_spread():
    waits, moves = np.zeros((6, 2), np.float32), np.zeros((4, 2), np.float32)
    moves[3] = 3, -8
    waits[:, 1] = 5  # held throughout: nothing moves
    scale = np.concatenate([waits, moves]).std(0) + 1e-6
    still, moving = motion_of([waits, moves])
    np.testing.assert_array_equal(still, np.zeros(6))
    np.testing.assert_allclose(moving, [0, 0, 0, (np.array([3, 8]) / scale).mean()])


def test_a_share_is_drawn_alike_and_the_rest_by_motion():
    moved = np.array([0.0, 1.0, 3.0])
    np.testing.assert_allclose(weights(moved, 0.4), 0.4 + 0.6 * moved / moved.mean())
    assert weights(moved, 0.4).mean() == pytest.approx(1)
    np.testing.assert_array_equal(weights(moved, 1.0), np.ones(3))
    np.testing.assert_allclose(weights(np.zeros(3), 0.4), np.full(3, 0.4))  # all wait: all alike
