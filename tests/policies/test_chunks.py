"""Chunks of synthetic episodes: what is masked, held, left out, weighed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from dreamgen.core import rotations
from dreamgen.core.clip import Episode
from dreamgen.core.embodiment import Embodiment, Part
from dreamgen.core.part import ROTATIONS
from dreamgen.data.lerobot import Dataset
from dreamgen.policies.chunks import Chunks, collate
from tests.policies.toy import STEPS, A, D, H, W, encoder, robot

LENGTHS = (9, 7, 13)


class Recorded(Dataset):
    """A dataset in memory. The pictures of a row hold its episode and row number."""

    def __init__(self, *episodes: Episode, of: Embodiment | None = None) -> None:
        self.episodes, self.robot, self.root = episodes, of or robot(), Path("recorded")
        self.has_actions = True

    def __len__(self) -> int:
        return len(self.episodes)

    def index(self, i: int) -> int:
        return 40 + i  # the first forty were left out

    def length(self, i: int) -> int:
        return len(self.episodes[i].action)

    def episode(self, i: int) -> Episode:
        return self.episodes[i]

    def views(self, i: int, rows) -> dict[str, np.ndarray]:
        frames = np.stack([np.full((H, W, 3), 16 * i + row, np.uint8) for row in rows])
        return {"front": frames, "wrist": 255 - frames}


def episode(length: int, seed: int = 0, **fields) -> Episode:
    rng = np.random.default_rng(seed)
    action = rng.uniform(-1, 1, (length, A)).astype(np.float32)
    state = rng.normal(size=(length, D)).astype(np.float32)
    return Episode(instruction=f"do {seed}", state=state, action=action, **fields)


def recorded(**fields) -> Recorded:
    return Recorded(*(episode(n, k, **fields) for k, n in enumerate(LENGTHS)))


def test_every_row_is_an_observation_and_the_end_is_masked():
    data = recorded()
    chunks = Chunks(data, horizon=STEPS)
    assert list(chunks) == [(i, row) for i, n in enumerate(LENGTHS) for row in range(n)]
    action, valid, weight = chunks.actions(1, 4)
    assert valid.tolist() == [True] * 3 + [False] * 3 and (weight == 1).all()
    np.testing.assert_array_equal(action[:3], data.episode(1).action[4:])
    assert (action[3:] == 0).all()


def test_hold_stands_still():
    data = recorded()
    action, valid, _ = Chunks(data, horizon=STEPS, past_end="hold").actions(1, 4)
    assert valid.all() and (action[3:, :6] == 0).all()
    np.testing.assert_array_equal(action[3:, 6], np.repeat(data.episode(1).action[-1, 6], 3))


def test_dreams_are_seen_where_their_video_has_frames():
    dream = replace(episode(9), meta={"frame_rows": [0, 2, 4, 6, 8]})
    chunks = Chunks(Recorded(dream), horizon=STEPS, future_steps=3)
    assert [row for _, row in chunks] == [0, 2, 4, 6, 8]
    assert chunks.pictures(0, 4)[0, 0, 0, 0] == 4 and chunks.pictures(0, 4)[1, 0, 0, 0] == 251
    batch = chunks.batch([(0, 2), (0, 6)])
    assert batch["future"][0, 0, 0, 0, 0] == 4  # row 5 has no picture of its own: the frame before it
    assert batch["future_known"].tolist() == [True, False]
    assert not Chunks(Recorded(dream), horizon=STEPS, future_steps=1).batch([(0, 2)])["future_known"][0]  # the same one


@pytest.mark.parametrize("steps", [1, 9])
def test_where_no_future_is_shown_alignment_has_nothing_to_learn(steps, caplog):
    dream = replace(episode(9), meta={"frame_rows": [0, 2, 4, 6, 8]})
    said = f"for {steps} rows after an observation no episode shows a new picture; the longest has 9 rows"
    Chunks(Recorded(dream), horizon=STEPS, future_steps=steps)
    assert said in caplog.text
    video = Recorded(dream)
    video.has_actions = False
    with pytest.raises(ValueError, match=said):
        Chunks(video, horizon=STEPS, future_steps=steps)
    caplog.clear()
    Chunks(video, horizon=STEPS, future_steps=8)
    assert not caplog.text


def test_idle_observations_are_bounded():
    still = np.zeros((20, A), np.float32)
    still[:4, 0], still[:, 6] = 0.5, 1
    still[2:, 6] = -1
    data = Recorded(replace(episode(20), action=still))
    assert len(Chunks(data, horizon=STEPS)) == 20
    assert [row for _, row in Chunks(data, horizon=STEPS, keep_idle=2)] == [0, 1, 2, 3, 4, 5]
    assert [row for _, row in Chunks(data, horizon=STEPS, keep_idle=0)] == [0, 1, 2, 3]
    asleep = Recorded(replace(episode(20), action=np.zeros((20, A), np.float32)))
    with pytest.raises(ValueError, match="in none of the 20 observations of .* anything moves, and keep_idle is 0"):
        Chunks(asleep, horizon=STEPS, keep_idle=0)


@pytest.mark.parametrize("limits", [(0.0, 0.04), (-1.0, 1.0), (0.0, 255.0)])
def test_a_change_of_command_is_no_rest_whatever_its_values(limits):
    action = np.zeros((20, A), np.float32)
    action[:, 6] = np.array(limits)[(np.arange(20) >= 12).astype(int)]
    hand = replace(robot().action[1], limits=limits)
    data = Recorded(replace(episode(20), action=action), of=robot(action=(robot().action[0], hand)))
    assert [row for _, row in Chunks(data, horizon=4, keep_idle=0)] == [9, 10, 11]


def reach(scale: float) -> Recorded:
    """An arm that rests, reaches, and rests again, its places absolute and its turns deltas, both without limits; an
    entry that is never used; in metres and radians times `scale`."""
    parts = (Part(name="place", start=0, stop=2), Part(name="turn", start=2, stop=4, kind="delta"),
             Part(name="hand", start=4, stop=A, kind="binary", limits=(0.0, 1.0)))  # fmt: skip
    time = np.arange(40.0)
    action = np.zeros((40, A), np.float32)
    action[:, 0] = 0.3 + 0.2 / (1 + np.exp(20 - time))  # most of its way between rows 16 and 24
    action[:, 2] = 0.01 * np.exp(-(((time - 20) / 4) ** 2))
    action[:, 1], action[:, 3] = 0.25, 0.0
    action[:, :4] *= scale
    return Recorded(replace(episode(40), action=action), of=robot(action=parts))


def test_what_stands_still_does_not_depend_on_units(caplog):
    found = [Chunks(reach(scale), horizon=STEPS, keep_idle=0) for scale in (1.0, 1000.0, 1e-3)]
    places = [row for _, row in found[0]]
    assert [row for _, row in found[1]] == [row for _, row in found[2]] == places
    assert places == list(range(places[0], places[-1] + 1)) and 5 < places[0] <= 14 and 25 < places[-1] <= 31
    assert found[0].idle_left_out == 40 - len(places)
    assert caplog.text.count(f"recorded: {40 - len(places)} of 40 observations are left out") == 3
    assert Chunks(reach(1.0), horizon=STEPS).idle_left_out == 0


def test_limits_measure_deltas_that_have_them():
    """As a tabletop has them; the rest of the data has no say."""
    rng = np.random.default_rng(4)
    action = np.where(rng.random((60, 1)) < 0.4, rng.uniform(-1, 1, (60, A)), 0.05 * rng.uniform(-1, 1, (60, A)))
    action[:, 6] = np.repeat([-1, 1, -1], 20)
    data = Recorded(replace(episode(60), action=action.astype(np.float32)))
    idle = [bool((np.abs(data.episode(0).action[k : k + 2, :6]) <= 0.05).all()) and k not in (19, 39)
            for k in range(60)]  # fmt: skip
    chunks = Chunks(data, horizon=2, keep_idle=3)
    assert 3 < sum(idle) < 50 and chunks.idle_left_out == sum(idle) - 3
    assert [row for _, row in chunks] == [k for k in range(60) if not idle[k] or sum(idle[: k + 1]) <= 3]


@pytest.mark.parametrize("kind", ["absolute", "delta"])
@pytest.mark.parametrize("rotation", ["axis_angle", "euler_xyz", "quaternion_wxyz", "rot6d"])
def test_turns_are_idle_where_nothing_turns(kind, rotation):
    """A hand that points down, told on both sides of half a turn, and turns in the middle of the episode alone."""
    width = ROTATIONS[rotation]
    part = Part(name="turn", start=0, stop=width, kind=kind, rotation=rotation)
    turns = np.zeros((40, 3))
    turns[18:22, 0] = 0.3
    if kind == "absolute":
        turns = turns.cumsum(0) + [np.pi - 0.6, 0, 0] + np.random.default_rng(0).normal(0, 1e-5, (40, 3))
    action = rotations.tell(part, rotations.exp(turns)).astype(np.float32)
    data = Recorded(replace(episode(40), action=action), of=robot(action=(part,)))
    rows = [row for _, row in Chunks(data, horizon=STEPS, keep_idle=0)]
    assert rows == list(range(18 - STEPS + 1, 22 - (kind == "absolute")))
    action, valid, _ = Chunks(data, horizon=STEPS, past_end="hold").actions(0, 38)
    held = part.rest if kind == "delta" else data.episode(0).action[-1]
    np.testing.assert_allclose(action[2:], np.tile(np.array(held, np.float32), (STEPS - 2, 1)))


def test_trust_falls_with_the_spread_of_the_labels():
    spread = np.zeros((9, A), np.float32)
    spread[1], spread[2] = 0.5, 1.0
    data = Recorded(episode(9, extra={"label_spread": spread}))
    weight = Chunks(data, horizon=STEPS, spread_scale=0.5, action_scale=np.full(A, 2.0)).actions(0, 0)[2]
    np.testing.assert_allclose(weight, [1, 1 / (1 + 0.25), 1 / (1 + 1), 1, 1, 1], rtol=1e-6)
    assert (Chunks(data, horizon=STEPS).actions(0, 0)[2] == 1).all()


def test_states_may_be_unknown_and_actions_missing():
    known = np.ones((9, D), np.float32)
    known[3, 1] = 0
    data = Recorded(episode(9, extra={"state_known": known}), episode(9, 1, meta={"action_known": False}))
    places = [(0, 2), (0, 3), (1, 0)]
    batch = Chunks(data, horizon=STEPS, body=1).batch(places)
    assert batch["state_known"].tolist() == [True, False, True] and batch["body"].tolist() == [1, 1, 1]
    assert batch["valid"].any(1).tolist() == [True, True, False]
    assert not Chunks(data, horizon=STEPS, state="masked").batch(places)["state_known"].any()


def partly(entry: int) -> Recorded:
    """Dreams of which one entry of the state is known at the first row alone; 0 stands where none is."""
    made = []
    for k, n in enumerate(LENGTHS):
        known = np.ones((n, D), np.float32)
        known[1:, entry] = 0
        dream = episode(n, k, extra={"state_known": known})
        made.append(replace(dream, state=np.where(known == 1, dream.state + 5, 0).astype(np.float32)))
    return Recorded(*made)


def test_observations_whose_chunks_cannot_be_told_are_left_out_and_counted(caplog):
    chunks = Chunks(partly(2), horizon=STEPS, relative_to=[2])
    assert list(chunks) == [(0, 0), (1, 0), (2, 0)] and chunks.unknown_left_out == sum(LENGTHS) - 3
    assert chunks.idle_left_out == 0 and "recorded: 26 of 29 observations are left out because the policy tells" in (
        caplog.text
    )
    caplog.clear()
    whole = Chunks(partly(2), horizon=STEPS, relative_to=[0, 1])  # those it needs are known
    assert len(whole) == sum(LENGTHS) and whole.unknown_left_out == 0 and not caplog.text
    batch = whole.batch([(0, 0), (0, 1)])
    assert batch["entries_known"].tolist() == [[True] * 3, [True, True, False]]
    assert batch["state_known"].tolist() == [True, False]
    assert np.isnan(whole.starts()).sum() == len(whole.whole()) - 3 and np.isfinite(whole.starts()[:, :2]).all()
    silent = Recorded(replace(partly(2).episode(0), meta={"action_known": False}))  # nothing is told of it
    assert len(Chunks(silent, horizon=STEPS, relative_to=[2])) == LENGTHS[0]
    with pytest.raises(ValueError, match="29 of 29 observations .* state at their start, .*policy.frame=recorded"):
        Chunks(recorded(extra={}), horizon=STEPS, relative_to=[1], state="masked")


def test_placeholders_are_no_states():
    found = Chunks(partly(0), horizon=STEPS).states()
    assert found.shape == (29, D) and np.isfinite(found[[0, 9, 16]]).all() and np.isnan(found[:, 0]).sum() == 26
    assert found[1:9, 1:].min() > 1 and found.dtype == np.float32


def test_parts_of_several_datasets_become_one_batch():
    parts = [Chunks(recorded(), horizon=STEPS, body=k).batch([(k, 1), (2, k)]) for k in range(2)]
    batch = collate(parts, encoder().words)
    assert batch["body"].tolist() == [0, 0, 1, 1] and batch["pictures"].shape == (4, 2, H, W, 3)
    assert torch.equal(batch["words"], encoder().words(["do 0", "do 2", "do 1", "do 2"]))


def test_whole_chunks_for_statistics():
    data = recorded()
    found = Chunks(data, horizon=STEPS).whole()
    want = [e.action[k : k + STEPS] for e in data.episodes for k in range(len(e.action) - STEPS + 1)]
    np.testing.assert_array_equal(found, np.stack(want))


def test_shuffled_labels_are_never_an_episodes_own():
    for n in range(2, 40):
        donor = Chunks(Recorded(*[episode(7)] * n), horizon=STEPS, labels="shuffled").donor.tolist()
        walked, i = [], 0
        while not walked or i:  # one cycle passes through all
            walked.append(i)
            i = donor[i]
        assert sorted(walked) == list(range(n))
    firsts = {Chunks(recorded(), horizon=STEPS, labels="shuffled").donor[0] for _ in range(5)}
    assert len(firsts) == 1
    with pytest.raises(ValueError, match="labels is 'shuffled', and recorded has one episode"):
        Chunks(Recorded(episode(7)), horizon=STEPS, labels="shuffled")


def test_episodes_shorter_than_the_horizon_are_left_out_and_counted(caplog):
    chunks = Chunks(recorded(), horizon=8)
    assert {i for i, _ in chunks} == {0, 2} and chunks.short_left_out == 1 and len(chunks) == 9 + 13
    assert "recorded: 1 of 3 episodes are shorter than the policy's horizon, 8 rows" in caplog.text
    assert chunks.batch([(2, 1)])["pictures"][0, 0, 0, 0, 0] == 33 and len(chunks.whole()) == 2 + 6
    assert Chunks(recorded(), horizon=7).short_left_out == 0
    with pytest.raises(ValueError, match=r"no episode of recorded is as long as .*, 14 rows; the longest has 13"):
        Chunks(recorded(), horizon=14)
    with pytest.raises(ValueError, match="past_end is 'pad'"):
        Chunks(recorded(), horizon=STEPS, past_end="pad")


def test_limits_of_the_entries_of_a_rotation_are_no_angles():
    """A hand that turns by .05 rad a step, told as rot6d, whose entries lie in [-1, 1]; and limits on one side."""
    turn = Part(name="turn", start=0, stop=6, kind="delta", rotation="rot6d", limits=(-1.0, 1.0))
    hand = Part(name="hand", start=6, stop=A, kind="delta", limits=(-0.2, 0.01))
    half = Rotation.from_rotvec(np.outer(0.02 * (np.arange(20) > 9), [0, 0, 1])).as_matrix()
    action = np.concatenate([half[:, :, 0], half[:, :, 1], np.zeros((20, A - 6))], 1).astype(np.float32)
    data = Recorded(replace(episode(20), action=action), of=robot(action=(turn, hand)))
    assert [row for _, row in Chunks(data, horizon=4, keep_idle=0)] == list(range(7, 20))
    action[:, :6], action[12:, 6] = [1, 0, 0, 0, 1, 0], -0.009  # less than a twentieth of .2
    with pytest.raises(ValueError, match="in none of the 20 observations of .* anything moves"):
        Chunks(Recorded(replace(episode(20), action=action), of=robot(action=(turn, hand))), horizon=4, keep_idle=0)
