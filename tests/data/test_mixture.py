from fractions import Fraction

import numpy as np
import pytest

from dreamgen.core.clock import Clock
from dreamgen.data.mixture import Mixture
from dreamgen.data.windows import Windows


def test_windows_are_all_places_that_fit():
    clock = Clock(robot_hz=20, video_hz="40/3", frames=5)  # rows 0 1 3 4 6
    lengths = [9, 3, 7, 6, 20]
    windows = Windows(lengths, clock)
    expected = [(e, r) for e, n in enumerate(lengths) for r in range(n) if r + 6 < n]
    assert [windows.at(k) for k in range(len(windows))] == expected and windows.too_short == 2
    assert windows.rows(4, 2).tolist() == [2, 3, 5, 6, 8]
    hops = Windows(lengths, 4, hop=3)
    assert [hops.at(k) for k in range(len(hops))] == [(e, r) for e, n in enumerate(lengths) for r in range(0, n - 3, 3)]
    assert hops.rows(0, 3).tolist() == [3, 4, 5, 6]


def test_short_episodes():
    padded = Windows([3, 8, 2], 6, short="pad")
    assert [padded.at(k) for k in range(len(padded))] == [(0, 0), (1, 0), (1, 1), (1, 2), (2, 0)]
    assert padded.too_short == 2 and padded.rows(0, 0).tolist() == [0, 1, 2, 2, 2, 2]
    with pytest.raises(ValueError, match="no window of 9 rows fits: 2 episodes, the longest has 8"):
        Windows([3, 8], 9)
    with pytest.raises(IndexError):
        padded.at(5)


def windows_of(*counts: int) -> list[Windows]:
    return [Windows([n + 4], 5) for n in counts]


@pytest.mark.parametrize("ratio", ["1:1", "1:2", "3:1", "0.7:0.3", "1:0", "0:1"])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_ratio_holds_in_every_batch_and_in_total(ratio, batch):
    mixture = Mixture(real=windows_of(50), dreams=windows_of(30), batch_size=batch, ratio=ratio, seed=3)
    real, dream = (Fraction(x) for x in ratio.split(":"))
    share, total = dream / (real + dream), 0
    for step in range(40):
        draw = mixture.at(step)
        count = int(draw.dream.sum())
        total += count
        assert len(draw) == batch and abs(count - batch * share) < 1
        assert abs(total - (step + 1) * batch * share) <= Fraction(1, 2)
        assert np.array_equal(draw.dataset == 1, draw.dream)


def test_pure_function_of_seed_and_step():
    def draws(seed, steps):
        m = Mixture(real=windows_of(50, 9), dreams=windows_of(30), batch_size=5, seed=seed)
        return {k: np.stack([d.dataset, d.episode, d.row]) for k in steps for d in [m.at(k)]}

    forward, backward, other = draws(1, range(6)), draws(1, reversed(range(6))), draws(2, range(6))
    assert all(np.array_equal(forward[k], backward[k]) for k in range(6))
    assert any(not np.array_equal(forward[k], other[k]) for k in range(6))
    assert not np.array_equal(forward[0], forward[1])


def test_weights_and_rows():
    mixture = Mixture(real=windows_of(1000, 10), dreams=windows_of(100), batch_size=400, ratio="3:1")
    draws = [mixture.at(step) for step in range(30)]
    dataset, row = (np.concatenate([getattr(d, key) for d in draws]) for key in ("dataset", "row"))
    big, small = 1000**0.43, 10**0.43
    assert (dataset == 1).sum() / (dataset < 2).sum() == pytest.approx(small / (big + small), abs=0.02)
    counts = np.bincount(row[dataset == 1], minlength=10)
    assert len(counts) == 10 and counts.min() > 0.7 * counts.mean()
    assert row[dataset == 0].min() < 20 and 980 < row[dataset == 0].max() < 1000


def test_errors():
    real, dreams = windows_of(5), windows_of(4)
    for ratio in ("1", "1:x", "0:0", "1:-1", "1:1:1"):
        with pytest.raises(ValueError, match="expected real:dream"):
            Mixture(real=real, dreams=dreams, batch_size=4, ratio=ratio)
    with pytest.raises(ValueError, match="no real datasets"):
        Mixture(real=[], dreams=dreams, batch_size=4)
    assert not Mixture(real=real, batch_size=4).at(0).dream.any()
    assert Mixture(real=[], dreams=dreams, batch_size=4, ratio="0:1").at(0).dream.all()
