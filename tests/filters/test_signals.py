"""Signals whose values are known, and the map from a signal to a score."""

import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dreamgen.core.clip import Clip, Labels
from dreamgen.core.part import Part
from dreamgen.filters.cut import Cut
from dreamgen.filters.frozen import Frozen, changes
from dreamgen.filters.jerk import Jerk
from dreamgen.filters.limits import Limits
from dreamgen.filters.reference import Referenced
from dreamgen.filters.spread import Spread
from dreamgen.worlds.rollout import frame_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "idm"))
from moving_square import CLOCK, ROBOT, Squares, clip_of, draw  # noqa: E402


class Given(Referenced):
    """Signals that stand in the clips' seeds."""

    name = "given"

    def raw(self, clips, labels):  # noqa: ANN001, ANN201
        return np.array([[clip.seed / 10, 1.0] for clip in clips])


def clip(seed: int = 0, video: np.ndarray | None = None) -> Clip:
    video = np.zeros((3, 4, 6, 3), np.uint8) if video is None else video
    return Clip(id=f"c{seed}", video=video, video_hz="10", instruction="move", seed=seed)


def labels(value: np.ndarray, spread: float = 0.0) -> Labels:
    return Labels(value=value.astype(np.float32), spread=np.full(value.shape, spread, np.float32))


def test_the_map_is_monotone_and_a_half_at_the_reference():
    clips = [clip(seed) for seed in range(101)]
    one = Given(quantile=0.8, sharpness=3.0)
    with pytest.raises(ValueError, match="has no reference"):
        one.score(clips, [])
    one.fit(one.raw(clips, []))
    np.testing.assert_allclose(one.half, [8.0, 1.0])
    scores = one.score(clips, [])
    np.testing.assert_allclose(scores[80:], 1 / (1 + (np.arange(80, 101) / 80) ** 3))  # the worse signal speaks
    np.testing.assert_allclose(scores[:80], 0.5)
    best = Given(half=[2.0, 1e9])
    falling = best.score(clips, [])
    assert (np.diff(falling) < 0).all() and falling[0] == pytest.approx(1.0)
    best.better_high = True
    best.half = np.array([2.0, 1e-9])
    assert (np.diff(best.score(clips, [])) > 0).all() and best.score(clips, [])[0] == 0.0


def test_a_reference_without_a_signal_is_refused():
    with pytest.raises(ValueError, match="finds no finite signal in 0"):
        Given().fit(np.zeros((0, 2)))
    with pytest.raises(ValueError, match="expected 0 < quantile"):
        Given(quantile=1.0)


def test_spread_is_a_median_of_continuous_and_a_mean_of_binary_parts():
    value = np.zeros((5, 3), np.float32)
    spread = np.array([[0.1, 0.3, 0], [0.1, 0.3, 1], [9, 9, 0], [0.1, 0.3, 0], [0.1, 0.3, 0]], np.float32)
    one = Spread(robot=ROBOT, half=[0.2, 0.2])
    np.testing.assert_allclose(one.raw([clip()], [Labels(value=value, spread=spread)]), [[0.2, 0.2]], rtol=1e-6)
    np.testing.assert_allclose(one.score([clip()], [Labels(value=value, spread=spread)]), [0.5], rtol=1e-5)
    with pytest.raises(ValueError, match="clip 'c7' has no label spread"):
        one.score([clip(7)], [labels(value, np.nan)])


def test_limits_count_the_excess_alone():
    value = np.array([[1.5, -1, 1], [0, 0, -1], [-1.25, 1, 1], [1, -1, -1]])
    one = Limits(robot=ROBOT, half=0.75 / 8)
    np.testing.assert_allclose(one.raw([clip()], [labels(value)]), [[0.75 / 8, 0]])
    np.testing.assert_allclose(one.score([clip(), clip()], [labels(value), labels(value.clip(-1, 1))]), [0.5, 1.0])
    free = replace(ROBOT, action=tuple(replace(part, limits=None, kind="absolute") for part in ROBOT.action))
    with pytest.raises(ValueError, match="states no limits"):
        Limits(robot=free)


def test_limits_are_kept_by_a_rotation_however_it_is_told():
    wrist = Part(name="wrist", start=0, stop=3, rotation="euler_xyz", unit="deg", scale=np.pi / 180, limits=(0, 350))
    arm, value = replace(ROBOT, action=(wrist,)), np.array([[-160, 10, -90], [200, 10, -5]])
    np.testing.assert_allclose(Limits(robot=arm).raw([clip()], [labels(value)]), [[5 / 6 / 175]], rtol=1e-5)


def test_jerk_of_polynomials_and_switches():
    t = np.arange(12.0)
    delta = np.stack([0.5 * t**2, 3 * t + 1, np.where(t < 4, 1, np.where(t < 9, -1, 1))], 1)
    found = Jerk(robot=ROBOT).raw([clip()], [labels(delta)])
    np.testing.assert_allclose(found, [[np.sqrt((1 + 0) / 2), 2 / 11]], rtol=1e-5)  # second difference of t^2 / 2 is 1
    absolute = replace(ROBOT, action=(replace(ROBOT.action[0], kind="absolute"), ROBOT.action[1]))
    cubic = np.stack([t**3, t**2, np.ones(12)], 1)
    found = Jerk(robot=absolute).raw([clip()], [labels(cubic)])
    np.testing.assert_allclose(found, [[6 / np.sqrt(2), 0]], rtol=1e-5)  # third difference of t^3 is 6
    assert Jerk(robot=ROBOT).raw([clip()], [labels(delta[:2])])[0, 0] == 0.0


def test_a_gripper_that_flickers_is_found_beside_long_recordings():
    """An expert grasps or lets go every two seconds; the dream does so as often in two as the expert in thirty."""
    half_minute = np.stack([np.zeros(600), np.zeros(600), np.where(np.arange(600) // 40 % 2, -1, 1)], 1)
    one, dream = Jerk(robot=ROBOT), half_minute[:40].copy()
    one.fit(one.raw([clip()] * 3, [labels(half_minute)] * 3))
    dream[::4, 2] *= -1
    flickers, calm = one.score([clip()] * 2, [labels(dream), labels(half_minute[20:60])])
    assert flickers < 0.01 and calm == pytest.approx(0.5, abs=0.06)
    assert np.isfinite(one.raw([clip()], [labels(half_minute[:1])])).all()


def test_the_memory_of_changes_is_that_of_a_frame():
    video = np.random.default_rng(0).integers(0, 256, (40, 64, 96, 3)).astype(np.uint8)
    tracemalloc.start()
    found = changes(video)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 * video[0].size
    gaps = np.diff(video.astype(np.float64), axis=0) / 255
    np.testing.assert_allclose(found, np.sqrt((gaps**2).mean((1, 2, 3))), rtol=1e-6)
    assert changes(video[:1]).tolist() == [0]


def test_frozen_and_cut_videos_are_found():
    paths = [np.array([10, 16]) + speed * np.arange(9)[:, None] * [3, 0] for speed in (0.6, 0.7, 0.8, 0.9, 1.0, 1.1)]
    real = [clip(k, np.stack([draw(place, 1.0) for place in path])) for k, path in enumerate(paths)]
    none = [labels(np.zeros((16, 3)))] * 6
    video = real[0].video
    still = replace(real[0], video=np.repeat(video[:1], 9, axis=0))
    jump = replace(real[0], video=np.concatenate([video[:4], 255 - video[4:]]))
    frozen, cut = Frozen(), Cut()
    frozen.fit(frozen.raw(real, none))
    cut.fit(cut.raw(real, none))
    assert frozen.score([still], none[:1])[0] == 0.0 and cut.score([jump], none[:1])[0] < 0.2
    assert np.median(frozen.score(real, none)) > 0.5 and np.median(cut.score(real, none)) > 0.5
    assert cut.score([still], none[:1])[0] == 1.0
    white = np.concatenate([np.zeros((2, 3, 5, 3)), np.full((1, 3, 5, 3), 51)]).astype(np.uint8)
    np.testing.assert_allclose(changes(white), [0, 0.2], rtol=1e-6)


class Painter:
    """The squares' own world, as an action-conditioned model: it draws what the actions do."""

    robot, clock = ROBOT, CLOCK

    def __init__(self, squares: Squares) -> None:
        self.squares = squares

    def imagine(self, pasts, actions):  # noqa: ANN001, ANN201
        found = []
        for past, action in zip(pasts, actions, strict=True):
            assert len(past.video) == 1 and past.prompt.instruction == "" and action.shape == (16, 3)
            place = past.prompt.state + np.concatenate([[[0, 0]], 2 * action[:, :2].cumsum(0)])
            light = np.append(action[:, 2], self.squares.episode(int(past.prompt.id[7:])).action[16, 2])
            found.append(np.stack([draw(place[row], light[row]) for row in CLOCK.rows[1:]]))
        return found


def test_true_labels_close_the_cycle_and_others_do_not():
    module = pytest.importorskip("dreamgen.filters.cycle")
    squares = Squares(5, seed=4)
    clips = [replace(clip_of(squares, k), state=squares.episode(k).state[0]) for k in range(5)]
    true = [labels(squares.episode(k).action[:16]) for k in range(5)]
    one = module.Cycle(world_model=Painter(squares), half=0.1)
    np.testing.assert_allclose(one.raw(clips, true), 0, atol=1e-6)
    assert (one.score(clips, true) > 0.99).all() and (one.score(clips, true[1:] + true[:1]) < 0.2).all()
    with pytest.raises(ValueError, match="runs at 5 Hz, the action-conditioned model at 10"):
        one.score([replace(clips[0], video_hz="5")], true[:1])


class Chunked:
    """It holds the first frame, in latent frames of 4, and says of how many steps it was asked."""

    robot, clock, gaps = ROBOT, CLOCK, 4

    def __init__(self) -> None:
        self.asked: list[int] = []

    def imagine(self, pasts, actions):  # noqa: ANN001, ANN201
        self.asked += [len(action) for action in actions]
        return [np.repeat(past.video, len(frame_rows(self.clock, 0, len(action), 4)) - 1, 0)
                for past, action in zip(pasts, actions, strict=True)]  # fmt: skip


def test_a_cycle_goes_on_beyond_the_models_window():
    module, squares = pytest.importorskip("dreamgen.filters.cycle"), Squares(2, seed=4)
    clips, world = [replace(clip_of(squares, 0), state=squares.episode(0).state[0])], Painter(squares)
    world.clock = CLOCK.with_frames(5)  # of the clip's 9
    one, true = module.Cycle(world_model=world, half=0.1), squares.episode(0).action[:16]
    late = np.concatenate([true[:8], squares.episode(1).action[8:16]])
    assert one.raw(clips, [labels(true)])[0] == pytest.approx(0, abs=1e-6)
    assert one.raw(clips, [labels(late)])[0] > 0.1


def test_a_cycle_ends_where_the_model_can_end():
    module, world = pytest.importorskip("dreamgen.filters.cycle"), Chunked()
    squares = Squares(1, seed=4)
    whole = clip_of(squares, 0, CLOCK.with_frames(13))
    clips = [replace(whole, video=whole.video[:count]) for count in (13, 12, 9, 8, 7, 5, 4)]  # its window has 9 frames
    found = module.Cycle(world_model=world, half=0.5).score(clips, [labels(squares.episode(0).action[:24])] * 7)
    assert world.asked == [24, 16, 16, 8, 8, 8] and np.isnan(found).tolist() == [False] * 6 + [True]
    np.testing.assert_allclose(found[:6], 1 / (1 + 2**2), rtol=1e-3)  # an error of 1: nothing is predicted
