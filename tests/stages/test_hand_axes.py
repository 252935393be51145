"""Displacements along the hand's own axes, against poses multiplied by scipy: every stage that sums them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from dreamgen.core import rotations
from dreamgen.core.clip import Clip, Labels
from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment, View
from dreamgen.core.kinematics import along, follow
from dreamgen.core.part import Part
from dreamgen.data.findings import Findings
from dreamgen.data.normaliser import Normaliser
from dreamgen.data.unit_checks import Units
from dreamgen.data.video_rate import at_video_rate, slowed
from dreamgen.policies.space import Space
from dreamgen.stages.label import labelled_episode, pseudo_states
from dreamgen.stages.label_scores import score_labels
from dreamgen.worlds.action_frames import latent_actions
from idm.heads import Heads
from idm.merge import RULES, Windows, merge

PLACE = Part(name="place", start=0, stop=3, unit="m")
WRIST = Part(name="wrist", start=3, stop=7, rotation="quaternion_xyzw")
MOVE = Part(name="move", start=0, stop=3, kind="delta", scale=0.5, frame="tool", moves="place", turned_by="turn")
TURN = Part(name="turn", start=3, stop=6, kind="delta", rotation="axis_angle", frame="tool", moves="wrist")
ARM = Embodiment(name="arm", robot_hz=10, views=(View(name="eye", key="observation.images.eye", height=16, width=24),),
                 state=(PLACE, WRIST), action=(MOVE, TURN))  # fmt: skip
STEPS = 24


def recorded(seed: int = 0, steps: int = STEPS, size: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """States (s + 1, d) and actions (s a) of a hand that points down, pose by pose."""
    rng = np.random.default_rng(seed)
    move, turn = rng.normal(0, 0.1, (steps, 3)), Rotation.from_rotvec(rng.normal(0, size, (steps, 3)))
    place, hand = [rng.normal(size=3)], [Rotation.from_rotvec([np.pi - 0.1, 0.1, 0])]
    for d, one in zip(move, turn, strict=True):
        place.append(place[-1] + hand[-1].apply(0.5 * d))
        hand.append(hand[-1] * one)
    state = np.concatenate([place, Rotation.concatenate(hand).as_quat(canonical=True)], 1)
    return state.astype(np.float32), np.concatenate([move, turn.as_rotvec()], 1).astype(np.float32)


def off(found: np.ndarray, true: np.ndarray) -> float:
    """How far states are apart, in m and rad."""
    turned = rotations.apart(WRIST, found[..., WRIST.slice], true[..., WRIST.slice])
    return float(max(np.abs(found[..., :3] - true[..., :3]).max(), turned.max()))


def clip(state: np.ndarray, frames: int, hz: str) -> Clip:
    return Clip(id="a", video=np.zeros((frames, 16, 24, 3), np.uint8), video_hz=hz, instruction="go", state=state[0])


@pytest.mark.parametrize("hz", ["10", "5", "20/3"])
def test_a_perfect_labeler_returns_what_was_recorded_and_where_it_led(hz):
    state, action = recorded()
    clock = Clock(robot_hz="10", video_hz=hz, frames=9)
    state, action = state[: clock.steps + 1], action[: clock.steps]
    found, known = follow(ARM, state[0], action)
    assert known.all() and off(found, state) < 1e-5
    windows = Windows.of(clock, 3)
    for rule in RULES:
        chunks = np.where(windows.mask[..., None], action[windows.steps], 1e6)[None].astype(np.float32)
        label = merge(chunks, windows, ARM, rule)
        np.testing.assert_array_equal(label.value, action)
        ((pseudo, sure),) = pseudo_states(ARM, [clip(state, 9, hz)], [label], None)
        assert sure.all() and off(pseudo, state[:-1]) < 1e-5
    drift = score_labels([label], [action], ARM, clock)["drift"]["move"]
    assert max(drift.values()) < 1e-6


@pytest.mark.parametrize("hz", ["5", "20/3"])
def test_the_slower_robot_arrives_where_the_robot_did(hz):
    state, action = recorded()
    clock = Clock(robot_hz="10", video_hz=hz, frames=9)
    state, action = state[: clock.steps + 1], action[: clock.steps]
    label = Labels(value=action, spread=np.ones_like(action))
    episode = labelled_episode(ARM, clip(state, 9, hz), label, state[:-1], np.ones_like(state[:-1]), {})
    found, rows = at_video_rate(episode, ARM)
    assert len(rows) == 8 and off(follow(slowed(ARM, hz), state[0], found.action)[0], state[clock.rows]) < 1e-5
    seen = latent_actions(ARM, clock.rows, action, gaps=4).reshape(2, 4, 6)
    hand = Rotation.from_quat(state[:, WRIST.slice])
    for k, start in enumerate(clock.rows[[0, 4]]):
        ends = state[clock.rows[4 * k + 1 : 4 * k + 5], :3] - state[start, :3]
        np.testing.assert_allclose(seen[k, :, :3], hand[start].inv().apply(ends), atol=1e-5)


@pytest.mark.parametrize("frame", ["recorded", "relative", "absolute"])
def test_chunks_are_where_the_hand_goes_and_come_back(frame):
    runs = [recorded(seed, 6) for seed in range(30)]
    start, action = np.stack([s[0] for s, _ in runs]), np.stack([a for _, a in runs])
    space = Space(ARM, horizon=6, cumulative=True, frame=frame, state=Normaliser(7, ARM.state), action=Normaliser(36))
    assert space.relative_to == (list(range(7)) if frame == "absolute" else [])
    space.fit(start, action, start if frame == "absolute" else None)
    given, begun = torch.from_numpy(action), torch.from_numpy(start)
    x = space.chunk(given, begun)
    torch.testing.assert_close(space.unchunk(x, begun), given, atol=1e-4, rtol=1e-4)
    told = space.action.denormalise(x.flatten(1)).view_as(given).numpy()
    for (state, _), chunk in zip(runs, told, strict=True):
        want = state[1:, :3] if frame == "absolute" else Rotation.from_quat(state[0, 3:]).inv().apply(
            state[1:, :3] - state[0, :3])  # fmt: skip
        np.testing.assert_allclose(0.5 * chunk[:, :3], want, atol=1e-4)


def test_labels_are_corrected_along_the_axes_of_the_hand():
    clock, runs = Clock(robot_hz="10", video_hz="5", frames=31), [recorded(seed, 60, 0.15) for seed in range(4)]
    heads, rng = Heads(ARM, 8), np.random.default_rng(9)
    heads.fit([a for _, a in runs], [s[:-1] for s, _ in runs])
    np.testing.assert_allclose(heads.response[0].numpy(), [1, 0, 0, 0], atol=5e-3)
    biased = [a + np.float32([0.03, -0.02, 0.04, 0.01, 0, -0.01]) for _, a in runs]
    read = [s[clock.rows] + rng.normal(0, 1e-4, (31, 7)).astype(np.float32) for s, _ in runs]
    heads.calibrate(biased, [a for _, a in runs], read, [s[clock.rows] for s, _ in runs])
    (state, action), given = runs[0], Labels(value=biased[0], spread=0 * biased[0])
    mended = heads.corrected(given, read[0], clock, 1.0).value
    assert np.abs(follow(ARM, state[0], biased[0])[0] - state)[-1, :3].max() > 0.2
    assert off(follow(ARM, state[0], mended)[0][clock.rows], state[clock.rows]) < 5e-3
    assert np.abs(mended - action)[:, :3].mean() < 0.5 * np.abs(biased[0] - action)[:, :3].mean()
    exact = heads.corrected(replace(given, value=action), state[clock.rows], clock, 1.0).value
    np.testing.assert_allclose(exact, action, atol=2e-3)


def test_drift_is_that_of_the_hand():
    (state, action), wrong = recorded(), recorded()[1]
    wrong[:, 5] += 0.05
    end = follow(ARM, state[0], wrong)[0][-1, :3] - state[-1, :3]
    scores = score_labels([Labels(value=wrong, spread=0 * wrong)], [action], ARM, Clock(robot_hz="10", video_hz="5",
                                                                                       frames=13))  # fmt: skip
    assert scores["drift"]["move"]["end"] == pytest.approx(np.linalg.norm(end), rel=1e-4)


def test_without_a_state_they_are_one_motion_still():
    bare = replace(ARM, state=(), action=(replace(MOVE, moves=None), replace(TURN, moves=None)))
    state, action = recorded()
    ends = along(bare, bare.action[0], action).sum(0) * 0.5
    want = Rotation.from_quat(state[0, 3:]).inv().apply(state[-1, :3] - state[0, :3])
    np.testing.assert_allclose(ends, want, atol=1e-5)
    assert Embodiment.from_contract(ARM.contract()) == ARM and "turned_by" not in str(
        replace(ARM, action=(replace(MOVE, frame="base", turned_by=None), TURN)).contract())  # fmt: skip


def test_units_are_looked_at_along_the_axes_of_the_hand():
    state, action = recorded(steps=300)
    for arm, words in (
        (ARM, None),
        (replace(ARM, action=(replace(MOVE, scale=20.0), TURN)), "moves 'place' by 0.5 per"),
    ):
        units, found = Units(arm), Findings()
        units.add(state[:-1], action)
        units.check(found)
        told = [one.what for one in found.list() if one.level != "note"]
        assert told == [] if words is None else words in told[0]


def test_what_turns_the_axes_must_be_said():
    words = r"'move' of embodiment 'arm' .* turned_by {}; a displacement of 3 entries .* of \['turn'\]; both move parts"
    for changes, told in ((dict(turned_by=None), "None"), (dict(turned_by="spin"), "'spin'"),
                          (dict(frame="base"), "'turn'"), (dict(kind="absolute"), "'turn'")):  # fmt: skip
        with pytest.raises(ValueError, match=words.format(told)):
            replace(ARM, action=(replace(MOVE, **changes), TURN))
    for wrong in (replace(TURN, frame="base"), replace(TURN, kind="absolute")):
        with pytest.raises(ValueError, match=r"has turned_by 'turn'; .* of \[\]; both"):
            replace(ARM, action=(MOVE, wrong))
    for part, state in ((replace(TURN, moves=None), ARM.state), (TURN, (replace(PLACE, frame="camera"), WRIST))):
        with pytest.raises(ValueError, match="both move parts of the state in one frame, or neither does"):
            replace(ARM, action=(MOVE, part), state=state)
