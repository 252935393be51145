"""Clips of several lengths and sizes: what each episode gives, and batches of one shape under a budget of tokens."""

import numpy as np
import pytest

from dreamgen.core.clip import Episode
from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment, Part, View
from dreamgen.core.seeding import rng_for
from dreamgen.data.buckets import Buckets, ClipPool, moved
from dreamgen.data.lerobot import Dataset
from dreamgen.data.writer import write_dataset

CLOCK = Clock(robot_hz="20", video_hz="10", frames=9)  # of 17 rows; five frames have 9, three have 5


def made(root, lengths, width, robot_hz="20") -> Dataset:
    robot = Embodiment(name=f"toy{width}", robot_hz=robot_hz,
                       views=[View(name="front", key="observation.images.front", height=16, width=width)],
                       action=[Part(name="move", start=0, stop=3)],
                       state=[Part(name="pose", start=0, stop=2)])  # fmt: skip
    rng = np.random.default_rng(width)
    write_dataset(root, [
        Episode(instruction=f"task {i}", state=rng.normal(size=(n, 2)).astype(np.float32),
                action=rng.normal(size=(n, 3)).astype(np.float32),
                video={"front": np.full((n, 16, width, 3), 10 * i, np.uint8)}, meta={})
        for i, n in enumerate(lengths)
    ], robot)  # fmt: skip
    return Dataset(root, robot)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    root = tmp_path_factory.mktemp("buckets")
    return [made(root / "a", [19, 6, 11, 3], 32), made(root / "b", [17, 4], 48)]


def test_an_episode_gives_clips_of_the_longest_length_that_fits(datasets):
    pool = ClipPool(datasets, CLOCK, lengths=[3, 9, 5])
    assert pool.counts() == {"9x16x32": 3, "5x16x32": 3, "3x16x32": 2, "9x16x48": 1}
    assert pool.too_short == 2 and pool.padded == 0
    for k in range(len(pool)):
        number, episode = pool.episode(k)
        assert pool.frames(k).shape == (*pool.shape(k), 3) and pool.instruction(k) == f"task {episode}"
        assert abs(int(pool.frames(k).mean()) - 10 * episode) < 4 and pool.shape(k)[2] == (32, 48)[number]


def test_short_episodes_are_padded_where_asked(datasets):
    pool = ClipPool(datasets, CLOCK, lengths=[9, 5], short="pad")
    assert pool.counts() == {"9x16x32": 3, "5x16x32": 3 + 2, "9x16x48": 1, "5x16x48": 1}
    assert (pool.too_short, pool.padded) == (3, 3)
    with pytest.raises(ValueError, match="no window of 41 rows fits: 4 episodes, the longest has 19"):
        ClipPool(datasets, CLOCK.with_frames(21))


def test_each_dataset_has_the_rate_of_its_robot(datasets, tmp_path, monkeypatch):
    """Clips of 9 frames at 10 Hz span .8 s: 16 steps at 20 Hz, 40 at 50 Hz, and at 15 Hz one or two a frame."""
    fast, odd = made(tmp_path / "fast", [42, 17], 32, "50"), made(tmp_path / "odd", [13, 12], 48, "15")
    pool, asked = ClipPool([datasets[0], fast, odd], CLOCK), []
    assert pool.counts() == {"9x16x32": 3 + 2, "9x16x48": 1} and pool.too_short == 3 + 1 + 1
    views = Dataset.views
    monkeypatch.setattr(Dataset, "views", lambda self, i, rows: asked.append((self, [*rows])) or views(self, i, rows))
    for k in (0, 3, 5):
        pool.frames(k)
        assert pool.robot(k) is asked[-1][0].robot
    steps = [list(range(0, 17, 2)), list(range(0, 41, 5)), [0, 1, 3, 4, 6, 7, 9, 10, 12]]
    assert asked == list(zip(pool.datasets, steps, strict=True))
    with pytest.raises(ValueError, match="no window of 41 rows fits: 2 episodes, the longest has 18"):
        ClipPool([made(tmp_path / "short", [9, 18], 32, "50"), made(tmp_path / "few", [4], 48)], CLOCK)
    with pytest.raises(ValueError, match="slow has 5 rows a second, fewer than the 10 frames of a clip; lower"):
        ClipPool([datasets[0], made(tmp_path / "slow", [40], 32, "5")], CLOCK)


def test_copies_are_moved_by_whole_pixels_and_the_clips_themselves_stay(tmp_path):
    dataset = made(tmp_path / "a", [19, 18], 32)
    view = np.random.default_rng(0).integers(0, 256, (9, 16, 32, 3), np.uint8)
    plain, pool = ClipPool([dataset], CLOCK), ClipPool([dataset], CLOCK, copies=9, shift=2)
    n = len(plain)
    assert len(pool) == 10 * n and pool.counts() == {"9x16x32": 10 * n}
    dataset.views = lambda i, rows: {"front": view}
    clips = [pool.frames(k) for k in range(len(pool))]
    for k, clip in enumerate(clips):
        assert (pool.episode(k), pool.instruction(k)) == (plain.episode(k % n), plain.instruction(k % n))
        found = [(y, x) for y in range(-2, 3) for x in range(-2, 3)
                 if np.array_equal(clip[:, 2 + y : 14 + y, 2 + x : 30 + x], view[:, 2:14, 2:30])]  # fmt: skip
        assert found == [(0, 0)] if k < n else len(found) == 1
    assert len({clip.tobytes() for clip in clips}) > 10 and np.array_equal(clips[-1], pool.frames(len(pool) - 1))
    with pytest.raises(ValueError, match="copies is 3, shift is 0; expected copies >= 0"):
        ClipPool([dataset], CLOCK, copies=3)
    assert np.array_equal(moved(view, 1, -2)[:, 0, 0], view[:, 0, 2]) and moved(view, 0, 40).std(2).max() == 0


def test_a_batch_has_one_shape_and_keeps_to_its_budget():
    shapes = [(9, 4, 4)] * 30 + [(5, 4, 4)] * 10 + [(5, 8, 4)] * 20
    tokens = {(9, 4, 4): 12, (5, 4, 4): 8, (5, 8, 4): 16}
    buckets = Buckets(np.arange(60), shapes, batch_size=1, budget=48, tokens=tokens.__getitem__)
    assert dict(zip(buckets.shapes, buckets.sizes, strict=True)) == {(5, 4, 4): 6, (5, 8, 4): 3, (9, 4, 4): 4}
    seen = np.zeros(60)
    for step in range(3000):
        chosen = buckets.batch(rng_for(0, "test", step))
        assert len({shapes[k] for k in chosen}) == 1 and sum(tokens[shapes[k]] for k in chosen) == 48
        np.add.at(seen, chosen, 1)
    assert np.array_equal(buckets.batch(rng_for(0, "test", 7)), buckets.batch(rng_for(0, "test", 7)))
    of = [seen[a:b].mean() for a, b in ((0, 30), (30, 40), (40, 60))]
    assert max(of) / min(of) < 1.2  # every clip is as likely as any other


def test_a_clip_over_the_budget_is_said():
    with pytest.raises(ValueError, match=r"token_budget is 9; one clip of .* \(9, 4, 4\) has 144 tokens"):
        Buckets(np.arange(2), [(9, 4, 4)] * 2, batch_size=1, budget=9)
