"""Merging: the law of the clock, and the rules against slow loops."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from scipy.spatial.transform import Rotation

from dreamgen.core import rotations
from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment, Part, View
from dreamgen.core.kinematics import follow
from dreamgen.core.part import ROTATIONS
from dreamgen.stages.label_scores import lag
from idm.merge import RULES, Windows, horizon, merge

CONF = Path(__file__).parents[2] / "conf" / "embodiment"
STRIDES = {"1": "6", "2": "3", "4": "3/2", "3/2": "4"}  # robot at 6 Hz: video rate of each stride
A = 5
ROBOT = Embodiment(
    name="arm", robot_hz="6", views=(View(name="a", key="a", height=8, width=8),),
    action=(Part(name="move", start=0, stop=3, kind="delta", scale=0.1),
            Part(name="grip", start=3, stop=4, kind="binary", limits=(-1.0, 1.0)),
            Part(name="angle", start=4, stop=5, kind="absolute")),
)  # fmt: skip


@pytest.fixture(scope="module")
def robots() -> list[Embodiment]:
    found = [ROBOT, *(turning(kind, motion) for kind in ROTATIONS for motion in ("absolute", "delta"))]
    with initialize_config_module("conf", version_base="1.3"):
        for path in sorted(CONF.glob("*.yaml")):
            found.append(instantiate(compose(f"embodiment/{path.stem}").embodiment, _convert_="all"))
    return found


def turning(rotation: str, kind: str) -> Embodiment:
    """A robot whose wrist is turned, and a second part beside it."""
    width = ROTATIONS[rotation]
    wrist, turn = (Part(name=name, start=0, stop=width, rotation=rotation, kind=how, moves=moves, frame="base")
                   for name, how, moves in (("wrist", "absolute", None), ("turn", kind, "wrist")))  # fmt: skip
    lift = Part(name="lift", start=width, stop=width + 1, kind="delta")
    return Embodiment(name=f"{kind}_{rotation}", robot_hz="6", views=ROBOT.views, state=(wrist,), action=(turn, lift))


def recorded(robot: Embodiment, steps: int) -> np.ndarray:
    rng = np.random.default_rng(steps)
    action = rng.normal(size=(steps, robot.action_dim)).astype(np.float32)
    for part in robot.action:
        if part.rotation:  # across half a turn, back and forth; the entries wrap
            swing = np.pi + rng.normal(0, 0.4, (steps, 1)) * np.array([1.0, 0.2, 0.1]) + np.array([0, -np.pi, -np.pi])
            swing = swing - np.array([np.pi, 0, 0]) if part.kind == "delta" else swing
            action[:, part.slice] = rotations.tell(part, rotations.exp(swing))
        if part.kind == "binary":
            low, high = part.limits or (0, 1)
            action[:, part.slice] = np.where(action[:, part.slice] > 0, high, low)
    return action


def oracle(action: np.ndarray, windows: Windows, samples: int) -> np.ndarray:
    """A perfect labeler: what was recorded in each window, garbage where the window sees nothing."""
    chunks = np.where(windows.mask[..., None], action[windows.steps], 1e6)
    return np.repeat(chunks[None], samples, axis=0).astype(np.float32)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("frames", [2, 5])
def test_law_a_perfect_labeler_returns_the_recorded_actions(robots, rule, stride, frames):
    for robot in robots:
        rate = robot.rate / Fraction(stride)
        clock = Clock(robot_hz=robot.robot_hz, video_hz=str(rate), frames=11)
        action = recorded(robot, clock.steps)
        windows = Windows.of(clock, frames)
        labels = merge(oracle(action, windows, 3), windows, robot, rule)
        np.testing.assert_array_equal(labels.value, action)
        assert labels.spread.max() < 1e-6
        for part in robot.action:
            assert lag([labels.value[:, part.slice]], [action[:, part.slice]]) in (0, None)
        first = np.zeros(robot.state_dim, np.float32)  # the same actions move the same state the same way
        np.testing.assert_array_equal(follow(robot, first, labels.value)[0], follow(robot, first, action)[0])


@pytest.mark.parametrize("stride", STRIDES)
def test_each_step_is_seen_by_the_windows_that_hold_it(stride):
    clock = Clock(robot_hz="6", video_hz=STRIDES[stride], frames=9)
    windows = Windows.of(clock, 4)
    for k in range(6):
        held = [int(s) for s, m in zip(windows.steps[k], windows.mask[k], strict=True) if m]
        assert held == list(range(clock.rows[k], clock.rows[k + 3]))
    assert windows.mask.shape[1] == horizon(clock, 4) == max(windows.mask.sum(1).max(), horizon(clock, 4))


@pytest.mark.parametrize("stride", STRIDES)
def test_an_episode_shows_every_frame_that_has_a_row(stride):
    clock = Clock(robot_hz="6", video_hz=STRIDES[stride], frames=99)
    for rows in range(40):
        assert clock.frames_in(rows) == (clock.rows < rows).sum()


@pytest.mark.parametrize("rule", RULES)
def test_rules_against_loops(rule):
    clock = Clock(robot_hz="6", video_hz="4", frames=7)
    windows = Windows.of(clock, 3)
    rng = np.random.default_rng(4)
    chunks = rng.normal(size=(2, *windows.mask.shape, A)).astype(np.float32)
    labels = merge(chunks, windows, ROBOT, rule)
    rows = clock.rows
    for step in range(clock.steps):
        values, weights = [], []
        for k in range(5):
            begin, end, gap = rows[k], rows[k + 2], rows[k + 1]
            if not begin <= step < end or (rule == "first" and step >= gap and k < 4):
                continue
            values += [chunks[n, k, step - begin] for n in range(2)]
            weights += [min(step - begin + 1, end - step) ** 2 if rule == "centre" else 1] * 2
        values, weights = np.array(values, np.float64), np.array(weights, np.float64)
        votes = np.where(values[:, 3] > 0, 1.0, -1.0)
        mean = (weights[:, None] * values).sum(0) / weights.sum()
        middle = np.median(values, axis=0) if rule == "median" else mean
        np.testing.assert_allclose(labels.value[step, [0, 1, 2, 4]], middle[[0, 1, 2, 4]], atol=1e-6)
        assert labels.value[step, 3] == (1 if (weights * votes).sum() > 0 else -1)
        spread = np.sqrt((weights[:, None] * (values - mean) ** 2).sum(0) / weights.sum())
        np.testing.assert_allclose(labels.spread[step, [0, 1, 2, 4]], spread[[0, 1, 2, 4]], atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_a_long_clip_is_merged_as_a_table_of_all_predictions_is(rule):
    """A table with a row for each window and sample and a column for each step, empty where nothing is said."""
    clock = Clock(robot_hz="6", video_hz="4", frames=90)
    windows, rng = Windows.of(clock, 5), np.random.default_rng(6)
    chunks = rng.normal(size=(3, *windows.mask.shape, A)).astype(np.float32)
    labels = merge(chunks, windows, ROBOT, rule)
    weights = np.broadcast_to(windows.weights(rule), chunks.shape[:3])
    table, weight = np.full((3, 86, windows.total, A), np.nan), np.zeros((3, 86, windows.total))
    for n, k, slot in np.argwhere(weights > 0):
        table[n, k, windows.steps[k, slot]], weight[n, k, windows.steps[k, slot]] = (
            chunks[n, k, slot],
            weights[n, k, slot],
        )
    table[..., 3] = np.where(np.isnan(table[..., 3]), np.nan, np.where(table[..., 3] > 0, 1.0, -1.0))
    table, share = (
        table.reshape(-1, windows.total, A),
        weight.reshape(-1, windows.total, 1) / weight.sum((0, 1))[:, None],
    )
    mean = np.nansum(share * table, 0)
    expected = np.nanmedian(table, 0) if rule == "median" else mean.copy()
    expected[:, 3] = np.where(mean[:, 3] > 0, 1.0, -1.0)
    sure = np.abs(mean[:, 3]) > 1e-9  # votes that are not tied
    np.testing.assert_allclose(labels.value[sure], expected[sure], atol=1e-6)
    np.testing.assert_allclose(labels.spread, np.sqrt(np.nansum(share * (table - mean) ** 2, 0)), atol=1e-6)


def test_errors_say_what_was_expected():
    clock = Clock(robot_hz="6", video_hz="3", frames=4)
    with pytest.raises(ValueError, match="clip of 4 frames is shorter than a window of 5"):
        Windows.of(clock, 5)
    windows = Windows.of(clock, 3)
    with pytest.raises(ValueError, match="expected one of mean, centre, median, first"):
        windows.weights("best")
    with pytest.raises(ValueError, match="chunks are"):
        merge(np.zeros((1, 2, 3, A), np.float32), windows, ROBOT)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_rotations_merge_across_half_a_turn(rule, rotation):
    """Predictions on both sides of half a turn; means and spread by scipy, in a loop."""
    robot, clock = turning(rotation, "absolute"), Clock(robot_hz="6", video_hz="4", frames=7)
    windows, rng = Windows.of(clock, 3), np.random.default_rng(5)
    swing = Rotation.from_rotvec(rng.normal(0, 0.3, (2 * windows.mask.size, 3))) * Rotation.from_rotvec([np.pi, 0, 0])
    part = robot.action[0]
    told = rotations.tell(part, np.roll(swing.as_quat(), 1, -1)) * np.array(1.0, np.float32)
    if part.width == 4:
        told = told * rng.choice([-1, 1], (len(told), 1))
    chunks = np.concatenate([told, rng.normal(size=(len(told), 1))], 1).astype(np.float32)
    chunks = chunks.reshape(2, *windows.mask.shape, robot.action_dim)
    labels = merge(chunks, windows, robot, rule)
    weights = windows.weights(rule)
    for step in range(clock.steps):
        seen = [(n, k, slot) for k, slot in zip(*np.nonzero(weights), strict=True) for n in range(2)
                if windows.steps[k, slot] == step]  # fmt: skip
        share = [weights[k, slot] for _, k, slot in seen]
        votes = swing[[np.ravel_multi_index(place, chunks.shape[:3]) for place in seen]]
        mean = votes.mean(share)
        off = (mean.inv() * votes).as_rotvec()
        spread = np.sqrt((np.array(share)[:, None] * off**2).sum() / sum(share) / 3)
        if rule == "median":
            mean = mean * Rotation.from_rotvec(np.median(off, axis=0))
        q = rotations.read(part, labels.value[step, part.slice])
        assert rotations.angle(q, np.roll(mean.as_quat(), 1)) < 1e-5
        np.testing.assert_allclose(labels.spread[step, part.slice], spread, atol=1e-5)
