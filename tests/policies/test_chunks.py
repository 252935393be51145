"""Chunks of synthetic episodes: what is masked, held, left out, weighed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dreamgen.core.clip import Episode
from dreamgen.data.lerobot import Dataset
from dreamgen.policies.chunks import Chunks, collate
from tests.policies.toy import STEPS, A, D, H, W, encoder, robot

LENGTHS = (9, 7, 13)


class Recorded(Dataset):
    """A dataset in memory. The pictures of a row hold its episode and row number."""

    def __init__(self, *episodes: Episode) -> None:
        self.episodes, self.robot, self.root = episodes, robot(), Path("recorded")

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


def test_idle_observations_are_bounded():
    still = np.zeros((20, A), np.float32)
    still[:4, 0], still[:, 6] = 0.5, 1
    still[2:, 6] = -1
    data = Recorded(replace(episode(20), action=still))
    assert len(Chunks(data, horizon=STEPS)) == 20
    assert [row for _, row in Chunks(data, horizon=STEPS, keep_idle=2)] == [0, 1, 2, 3, 4, 5]
    assert [row for _, row in Chunks(data, horizon=STEPS, keep_idle=0)] == [0, 1, 2, 3]


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


def test_a_horizon_longer_than_an_episode_is_named():
    with pytest.raises(ValueError, match=r"episode 41 of recorded has 7 rows, the policy's horizon is 8"):
        Chunks(recorded(), horizon=8)
    with pytest.raises(ValueError, match="past_end is 'pad'"):
        Chunks(recorded(), horizon=STEPS, past_end="pad")
