"""Other streams of actions from one moment."""

import numpy as np
import pytest

from dreamgen.core.embodiment import Embodiment, Part, View
from dreamgen.data.streams import late, mirrored, noisy, still, stuck


def test_streams_in_closed_form() -> None:
    view = View(name="eye", key="observation.images.eye", height=8, width=8)
    arm = Embodiment(name="arm", robot_hz=5, views=[view],
                     action=[Part(name="move", start=0, stop=3, kind="delta", limits=(-1, 1)),
                             Part(name="joint", start=3, stop=4),
                             Part(name="grip", start=4, stop=5, kind="binary", limits=(0, 1))])  # fmt: skip
    action = np.arange(20, dtype=np.float32).reshape(4, 5) / 20
    action[:, 4] = [0, 1, 1, 0]
    assert np.allclose(mirrored(arm, action) * [1, -1, 1, 1, 1], action)
    assert stuck(arm, action, high=True)[:, 4].tolist() == [1] * 4 and stuck(arm, action)[:, 4].tolist() == [0] * 4
    moved = late(arm, action, 1)
    assert np.allclose(moved[1:], action[:3]) and moved[0].tolist() == [0, 0, 0, action[0, 3], 0]
    assert np.allclose(still(arm, action), [[0, 0, 0, action[0, 3], 0]] * 4)
    long = np.zeros((4000, 5), np.float32)
    drawn = noisy(arm, long, 0.2, np.random.default_rng(0), smooth=0.5)
    assert np.allclose(drawn[:, :4].std(0), 0.2, atol=0.02) and (drawn[:, 4] == 0).all()
    assert np.corrcoef(drawn[1:, 3], drawn[:-1, 3])[0, 1] == pytest.approx(0.5, abs=0.05)
    assert np.abs(noisy(arm, long, 3.0, np.random.default_rng(0))[:, :3]).max() == 1
