"""The judge: what it looks at, what it refuses, what its answers are worth."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dreamgen.core import rotations
from dreamgen.core.clip import Clip, Labels
from dreamgen.core.embodiment import Part
from dreamgen.core.manifest import read_json, write_json
from dreamgen.core.part import ROTATIONS
from dreamgen.filters.judge import VideoJudge, told_of
from dreamgen.filters.judged import Judged
from dreamgen.filters.rates import Rates, threshold_for
from dreamgen.policies.palette import PaletteEncoder

sys.path.insert(0, str(Path(__file__).parents[1] / "policies"))
from toy import A, D, encoder, robot  # noqa: E402

RATES = {"real": dict(tpr=0.9, tnr=0.8, positives=30, negatives=50)}


def judge(**changes) -> VideoJudge:
    torch.manual_seed(3)
    known = dict(robot=robot(), encoder=encoder(), instructions=["open it", "lift the red block"], frames=4, heads=2,
                 layers=1, slope=1.5, offset=-0.25, threshold=0.4, rates=RATES)  # fmt: skip
    return VideoJudge(**{**known, **changes}).eval()


def clips(*texts: str, frames: int = 7) -> list[Clip]:
    rng = np.random.default_rng(5)
    return [Clip(id=f"c{k}", video=rng.integers(0, 256, (frames, 24, 32, 3), dtype=np.uint8), video_hz="10",
                 instruction=text) for k, text in enumerate(texts)]  # fmt: skip


def test_a_clip_is_judged_alone_and_unknown_instructions_are_not():
    one = judge()
    asked = clips("open it", "dance", "lift the red block", "open it")
    together = one.judge(asked)
    assert np.isnan(together).tolist() == [False, True, False, False]
    alone = np.concatenate([one.judge([clip]) for clip in asked])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    known = [0, 2, 3]  # judged together: batches of other sizes round differently
    logits = one.logits([asked[i] for i in known])
    np.testing.assert_allclose(together[known], 1 / (1 + np.exp(0.25 - 1.5 * logits)), atol=1e-9)
    np.testing.assert_array_equal(Judged(judge=one).score(asked, []), together)


def test_it_looks_at_the_first_and_the_last_frame_of_all_views():
    one, video = judge(), clips("open it", frames=10)[0].video
    seen = one.pictures(video)
    assert seen.shape == (4, 2, 24, 16, 3)
    np.testing.assert_array_equal(seen[[0, 3], 1], video[[0, 9]][:, :, 16:])
    np.testing.assert_array_equal(one.pictures(video[:2])[1:, 0], video[[1, 1, 1]][:, :, :16])
    with pytest.raises(ValueError, match="clip 'c0' has frames of"):
        one.judge([dataclasses.replace(clips("open it")[0], video=video[:, :8])])
    with pytest.raises(ValueError, match="at least 2 frames"):
        judge(frames=1)


def test_an_encoder_looks_at_as_many_views_as_the_robot_has(tmp_path):
    """Before it is fitted: an encoder of a policy is told by the policy."""
    eyes = PaletteEncoder(width=16, colours=3, slots=2, summary=1, hidden=16, text_width=8, buckets=16, length=4)
    one, asked = judge(encoder=eyes), clips("open it", "lift the red block")
    assert eyes.config["views"] == len(one.robot.views) == 2
    eyes.fit(torch.from_numpy(np.concatenate([one.pictures(clip.video) for clip in asked])))
    one.save(tmp_path / "judge")
    np.testing.assert_array_equal(VideoJudge.load(tmp_path / "judge").judge(asked), one.judge(asked))


MOVES = (Part(name="arm", start=0, stop=D, kind="delta", limits=(-1.0, 1.0), moves="pose", scale=0.5),
         Part(name="hand", start=D, stop=A, kind="absolute"))  # fmt: skip


def test_it_is_told_the_state_by_the_rule(tmp_path):
    one = judge(robot=robot(action=MOVES), proprioception=["pose"], frames=3)
    one.fit(np.random.default_rng(0).normal(1, 2, (50, D)).astype(np.float32))
    plain = clips("open it", frames=5)[0]
    action = np.ones((8, A), np.float32)  # 20 Hz: two steps a frame
    acted = dataclasses.replace(plain, state=np.full(D, 2, np.float32), action=action)
    np.testing.assert_allclose(one.states(acted), np.array([[2.0], [4.0], [6.0]]) * np.ones(D))
    np.testing.assert_allclose(one.states(acted, np.array([0, 1, 2]))[:, 0], [2, 3, 4])
    np.testing.assert_allclose(one.states(dataclasses.replace(acted, action=action[:5]))[:, 0], [2, 4, 4.5])
    still = dataclasses.replace(acted, action=0 * action)
    for unknown in (plain, dataclasses.replace(acted, state=np.zeros(0, np.float32))):
        assert np.isnan(one.states(unknown)).all() and np.isfinite(one.judge([unknown])).all()
    found = one.judge([plain, acted, still])
    assert len(set(found)) == 3
    np.testing.assert_allclose(found, np.concatenate([one.judge([c]) for c in (plain, acted, still)]), atol=1e-6)
    labels = [Labels(value=action, spread=action)]
    held = dataclasses.replace(plain, state=acted.state)
    np.testing.assert_allclose(Judged(judge=one).score([held], labels), found[1:2], atol=1e-6)
    one.save(tmp_path / "judge")
    np.testing.assert_array_equal(VideoJudge.load(tmp_path / "judge").judge([plain, acted, still]), found)
    with pytest.raises(ValueError, match=f"clip 'c0' comes with actions {A - 1} wide"):
        one.judge([dataclasses.replace(acted, action=action[:, 1:])])
    with pytest.raises(ValueError, match="names pose; it follows from what commands do, .* move nothing that it says"):
        judge(proprioception=["pose"])
    for wrong in ("pose", True, None):
        with pytest.raises(ValueError, match=r"expected a list of parts of the state, of \['pose'\]"):
            told_of(robot(action=MOVES), wrong)
    with pytest.raises(ValueError, match="names nose; .* move pose: mend"):
        judge(robot=robot(action=MOVES), proprioception=["pose", "nose"])


def test_it_is_told_no_more_than_the_named_parts():
    state = (Part(name="pose", start=0, stop=D - 1), Part(name="grip", start=D - 1, stop=D))
    moves = (Part(name="arm", start=0, stop=D - 1, kind="delta", moves="pose", scale=0.5),
             Part(name="hand", start=D - 1, stop=D, kind="absolute", moves="grip"),
             Part(name="rest", start=D, stop=A, kind="absolute"))  # fmt: skip
    one = judge(robot=robot(state=state, action=moves), proprioception=["grip"], frames=3)
    action = np.random.default_rng(0).normal(size=(8, A)).astype(np.float32)
    plain = dataclasses.replace(clips("open it", frames=5)[0], state=np.zeros(D, np.float32), action=action)
    assert one.states(plain).shape == (3, 1)
    elsewhere = dataclasses.replace(plain, action=np.concatenate([0 * action[:, : D - 1], action[:, D - 1 :]], 1))
    other = dataclasses.replace(plain, action=np.concatenate([action[:, : D - 1], 0 * action[:, D - 1 :]], 1))
    found = one.judge([plain, elsewhere, other])
    assert found[0] == found[1] != found[2]


def test_recordings_of_unknown_state_do_not_count():
    """They are shown all the same, as `forward` allows."""
    one, other = (judge(robot=robot(action=MOVES), proprioception=["pose"], frames=3) for _ in range(2))
    states = np.random.default_rng(0).normal(1, 2, (50, D)).astype(np.float32)
    half = np.where(np.arange(D) == 0, np.nan, states[:1])
    gaps = np.concatenate([np.full((3, D), np.nan), states, half]).astype(np.float32)
    one.fit(states)
    other.fit(gaps)
    assert torch.equal(one.normaliser.scale, other.normaliser.scale) and other.normaliser.scale.std() > 0
    with pytest.raises(ValueError, match=r"none of 3 frames .* a known state.*leave out proprioception=\['pose'\]"):
        other.fit(gaps[:3])


@pytest.mark.parametrize("rotation", ["axis_angle", "euler_xyz", "quaternion_xyzw"])
def test_one_rotation_told_otherwise_is_the_same_to_it(rotation, tmp_path):
    """A hand that points down begins as half a turn to either side, or by a quaternion of either sign."""
    wide = ROTATIONS[rotation]
    state = (Part(name="pose", start=0, stop=1), Part(name="wrist", start=1, stop=1 + wide, rotation=rotation))
    moves = (Part(name="arm", start=0, stop=1, kind="delta", moves="pose"),
             Part(name="turn", start=1, stop=4, kind="delta", rotation="axis_angle", moves="wrist"))  # fmt: skip
    one = judge(robot=robot(state=state, action=moves), proprioception=["wrist"], frames=3)
    rng, down = np.random.default_rng(0), np.array([np.pi - 0.01, 0.02, 0])
    action = rng.normal(0, 0.02, (8, 4)).astype(np.float32)
    start = rotations.tell(state[1], rotations.exp(down))
    other = -start if wide == 4 else rotations.nearest(state[1], start, np.array([-np.pi, 0, 0]))
    plain = dataclasses.replace(clips("open it", frames=5)[0], action=action)
    told = [dataclasses.replace(plain, state=np.append(0, begun).astype(np.float32)) for begun in (start, other)]
    assert np.abs(start - other).max() > 1.9
    turns = rng.normal(0, 0.1, (50, 3)) + down
    one.fit(rotations.tell(state[1], rotations.exp(turns)).astype(np.float32))
    assert one.normaliser.scale.max() < 0.5
    found = one.judge(told)
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    one.save(tmp_path / "judge")
    np.testing.assert_array_equal(VideoJudge.load(tmp_path / "judge").judge(told), found)
    bare = robot(state=tuple(dataclasses.replace(part, rotation="") for part in state), action=())
    with pytest.raises(ValueError, match=f"state 'wrist': rotation here None, saved '{rotation}'"):
        VideoJudge.load(tmp_path / "judge", robot=bare)


def test_saved_and_loaded_it_says_the_same(tmp_path):
    one, asked = judge(), clips("open it", "lift the red block")
    one.save(tmp_path / "judge")
    other = VideoJudge.load(tmp_path / "judge")
    np.testing.assert_array_equal(one.judge(asked), other.judge(asked))
    assert other.threshold == 0.4 and other.rates == {"real": Rates(**RATES["real"])}
    with pytest.raises(ValueError, match="made for another robot"):
        VideoJudge.load(tmp_path / "judge", robot=robot(robot_hz="30"))
    with pytest.raises(ValueError, match="does not exist; run train_judge"):
        VideoJudge.load(tmp_path / "none")
    config = read_json(tmp_path / "judge" / "config.json")
    write_json(tmp_path / "judge" / "config.json", {**config, "encoder": {"_target_": "os.path.join"}})
    with pytest.raises(ValueError, match="a name in a checkpoint is code"):
        VideoJudge.load(tmp_path / "judge")
    write_json(tmp_path / "judge" / "config.json", config)
    (tmp_path / "judge" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="do not load.*train_judge again"):
        VideoJudge.load(tmp_path / "judge")


def test_rates_are_counted_and_inverted():
    probability = np.array([0.9, 0.4, np.nan, 0.6, 0.1, 0.7, 0.2])
    success = np.array([1, 1, 1, 0, 0, 1, 0], bool)
    rates = Rates.measured(probability, success, 0.5)
    assert rates == Rates(tpr=2 / 3, tnr=2 / 3, positives=3, negatives=3)
    exact = Rates(tpr=0.9, tnr=0.8, positives=10**7, negatives=10**7)
    for true in (0.0, 0.3, 1.0):  # what would be observed, corrected, is the truth
        found = exact.corrected(round(10**6 * (true * 0.9 + (1 - true) * 0.2)), 10**6)
        assert found["rate"] == pytest.approx(true, abs=1e-6) and found["low"] <= true <= found["high"]
        assert found["high"] - found["low"] < 0.01
    assert exact.corrected(10, 100)["rate"] == 0.0 and exact.corrected(10, 100)["observed"] == 0.1
    with pytest.raises(ValueError, match="no more than 1: chance"):
        Rates(tpr=0.5, tnr=0.5, positives=9, negatives=9).corrected(3, 5)
    with pytest.raises(ValueError, match="got 4 and 0"):
        Rates.measured(np.ones(4), np.ones(4, bool), 0.5)


def test_the_interval_of_a_corrected_rate_by_hand():
    """Lang and Reiczigel's numbered steps (Prev. Vet. Med. 113, 2014), for 30 of 100, tpr 36/40, tnr 48/60."""
    z = 1.959963984540054
    found = Rates(tpr=0.9, tnr=0.8, positives=40, negatives=60).corrected(30, 100)
    n, ap = 100 + z**2, (30 + z**2 / 2) / (100 + z**2)
    se, sp = (36 + 1) / 42, (48 + 1) / 62
    p = (ap + sp - 1) / (se + sp - 1)
    shift = 2 * z**2 * (p * se * (1 - se) / 42 - (1 - p) * sp * (1 - sp) / 62)
    variance = (ap * (1 - ap) / n + p**2 * se * (1 - se) / 42 + (1 - p) ** 2 * sp * (1 - sp) / 62) / (se + sp - 1) ** 2
    assert found["rate"] == pytest.approx(0.1 / 0.7) and 0.1 < p < 0.2
    assert found["low"] == pytest.approx(max(0.0, p + shift - z * variance**0.5), abs=1e-9)
    assert found["high"] == pytest.approx(p + shift + z * variance**0.5, abs=1e-9)
    assert (found["low"], found["high"]) == pytest.approx((0.0, 0.31674), abs=1e-5)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng, draws = np.random.default_rng(2), 1500
    for tpr, tnr, n, m, episodes, true in ((0.9, 0.8, 40, 60, 100, 0.3), (0.85, 0.95, 30, 200, 50, 0.05)):
        hits = 0
        for _ in range(draws):
            rates = Rates(tpr=rng.binomial(n, tpr) / n, tnr=rng.binomial(m, tnr) / m, positives=n, negatives=m)
            seen = rates.corrected(rng.binomial(episodes, true * tpr + (1 - true) * (1 - tnr)), episodes)
            hits += seen["low"] <= true <= seen["high"]
        assert 0.93 <= hits / draws <= 0.99


def test_the_threshold_is_the_lowest_of_the_wanted_precision():
    p = np.array([0.9, 0.8, 0.8, 0.7, 0.6, 0.5, np.nan])
    y = np.array([1, 1, 1, 0, 1, 0, 0], bool)
    for wanted in (1.0, 0.8, 0.75, 0.5):
        threshold, reached = threshold_for(wanted, p, y)
        every = {t: y[p >= t].mean() for t in (0.9, 0.8, 0.7, 0.6, 0.5)}  # all that differ, one by one
        lowest = min(t for t, precision in every.items() if precision >= wanted)
        assert (p >= threshold)[:6].tolist() == (p >= lowest)[:6].tolist() and reached == pytest.approx(every[lowest])
    threshold, reached = threshold_for(0.9, np.array([0.9, 0.7, 0.6]), np.array([0, 1, 1], bool))
    assert reached == pytest.approx(2 / 3) and threshold < 0.6  # out of reach: the highest precision there is
    with pytest.raises(ValueError, match="at least one success"):
        threshold_for(0.9, p, np.zeros(7, bool))


def test_the_break_even_threshold_says_yes_as_often_as_there_are_successes():
    rng = np.random.default_rng(4)
    y = rng.random(4001) < 0.3
    p = 1 / (1 + np.exp(-(1.5 * rng.normal(size=4001) + 2 * y - 1.2)))
    threshold, reached = threshold_for(None, p, y)
    yes = p >= threshold
    assert yes.sum() == y.sum() and reached == y[yes].mean() == yes[y].mean()  # precision is the true positive rate
    tied, truth = np.array([0.9, 0.6, 0.6, 0.6, 0.2, np.nan]), np.array([1, 1, 0, 0, 0, 1], bool)
    assert (tied >= threshold_for(None, tied, truth)[0]).sum() == 1  # 1 or 4 yeses of 2 successes: 1 is nearer
    assert (p >= threshold_for(None, p, np.ones(4001, bool))[0]).all()
