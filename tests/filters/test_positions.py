"""The judge of positions: outcomes that follow from where things are are told apart, and nothing else is made up."""

import numpy as np
import pytest

from dreamgen.core.clip import Clip
from dreamgen.core.manifest import read_json, write_json
from dreamgen.filters.positions import PositionJudge, logistic, summary
from dreamgen.filters.rates import Rates
from dreamgen.stages.label_scores import auroc

T, N, M = 7, 3, 42
TEXTS = ("lift it", "bring them together")


class Written:
    """The positions stand in the pictures: a row for each thing, in millimetres above -1 m, of two bytes."""

    names = ("block", "plate", "hand")

    def track(self, frames):
        assert frames.shape[1:] == (N, 3, 3)
        return (frames[..., 0] * 256.0 + frames[..., 1]) / 1000 - 1


def clip(places: np.ndarray, text: str) -> Clip:
    whole = np.round((places + 1) * 1000).astype(int)
    video = np.stack([whole // 256, whole % 256, 0 * whole], -1).astype(np.uint8)
    return Clip(id="c", video=video, video_hz="10", instruction=text)


def episodes(count: int, seed: int) -> tuple[list[Clip], np.ndarray]:
    """Things wander; the block must end 5 cm higher than it was, or within 30 cm of the plate."""
    rng, clips, success = np.random.default_rng(seed), [], []
    for k in range(count):
        places = rng.uniform(-0.2, 0.2, (1, N, 3)) + rng.normal(0, 0.05, (T, N, 3)).cumsum(0)
        places = Written().track(clip(places, "").video)  # as they can be written
        text, rise = TEXTS[k % 2], places[-1, 0, 2] - places[0, 0, 2]
        near = np.linalg.norm(places[-1, 0] - places[-1, 1])
        clips.append(clip(places, text))
        success.append(rise > 0.05 if text == TEXTS[0] else near < 0.3)
    return clips, np.array(success)


def fitted(count: int = 600) -> PositionJudge:
    judge = PositionJudge(locator=Written(), ridge=0.1)
    clips, success = episodes(count, 0)
    judge.fit(np.stack([judge.features(c) for c in clips]), success, [c.instruction for c in clips])
    return judge


def test_outcomes_that_follow_from_positions_are_told_apart() -> None:
    judge = fitted()
    clips, success = episodes(400, 1)
    told = judge.judge(clips)
    for k in range(2):
        assert auroc(told[k::2], success[k::2]) > 0.98
    assert ((told >= 0.5) == success).mean() > 0.9
    chance = np.random.default_rng(2).permutation(success[::2])  # what does not follow from positions is not told
    assert 0.3 < auroc(told[::2], chance) < 0.7


def test_it_abstains_from_what_it_never_saw() -> None:
    judge = fitted(40)
    (one, *_), _ = episodes(1, 3)
    told = judge.judge([one, clip(np.zeros((T, N, 3)), "dance"), one])
    assert np.isnan(told).tolist() == [False, True, False] and told[0] == told[2]
    features, texts = np.random.default_rng(4).normal(size=(6, M)), ["a", "a", "a", "b", "b", "b"]
    judge.fit(features, np.array([1, 0, 1, 1, 1, 1], bool), texts)
    assert judge.instructions == ("a",)  # of b there are no failures
    with pytest.raises(ValueError, match=r"of none of the instructions \['a', 'b'\] are there both"):
        judge.fit(features, np.array([1, 1, 1, 0, 0, 0], bool), texts)


def test_what_is_kept_of_positions() -> None:
    places = np.random.default_rng(5).normal(size=(T, N, 3))
    found = summary(places)
    assert found.shape == (M,) and summary(places[:, :1]).shape == (12,)
    np.testing.assert_array_equal(found[:9], places[-1].ravel())
    np.testing.assert_allclose(found[9:18], (places[-1] - places[0]).ravel())
    np.testing.assert_array_equal(found[18:36].reshape(2, N, 3), [places.max(0), places.min(0)])
    apart = [np.linalg.norm(places[:, a] - places[:, b], axis=1) for a, b in ((0, 1), (0, 2), (1, 2))]
    np.testing.assert_allclose(found[36:], [d[-1] for d in apart] + [d.min() for d in apart])
    still = summary(places[:1])
    assert (still[9:18] == 0).all() and (still[36:39] == still[39:]).all()


def test_the_regression_is_the_most_likely_one() -> None:
    rng = np.random.default_rng(6)
    z = rng.normal(size=(3000, 2))
    y = rng.random(3000) < 1 / (1 + np.exp(-(z @ [1.5, -0.5] + 0.7)))
    assert logistic(z, y, 1e-6) == pytest.approx([1.5, -0.5, 0.7], abs=0.15)
    *w, b = logistic(z, y, 50.0)  # where the gradient of the penalised loss is nought
    wrong = 1 / (1 + np.exp(-(z @ np.array(w) + b))) - y
    np.testing.assert_allclose(z.T @ wrong + 50 * np.array(w), 0, atol=0.05)
    assert wrong.sum() == pytest.approx(0, abs=0.05) and abs(w[0]) < 1.5


def test_what_is_saved_is_loaded_to_the_bit(tmp_path) -> None:
    judge, (clips, _) = fitted(60), episodes(9, 7)
    judge.threshold, judge.rates = 0.3, {"real": Rates(tpr=0.9, tnr=0.8, positives=30, negatives=50)}
    judge.save(tmp_path)
    other = PositionJudge.load(tmp_path, locator=Written())
    np.testing.assert_array_equal(other.judge(clips), judge.judge(clips))
    assert (other.threshold, other.rates, other.instructions) == (0.3, judge.rates, judge.instructions)
    assert not list(tmp_path.glob("*.p*kl*")) and other.ridge == judge.ridge

    class Fewer(Written):
        names = ("block", "hand")

    with pytest.raises(ValueError, match="fitted to positions of block, plate, hand, the tracker reads.*block, hand;"):
        PositionJudge.load(tmp_path, locator=Fewer())
    with pytest.raises(ValueError, match="does not exist; run train_judge stage=train_probe"):
        PositionJudge.load(tmp_path / "none", locator=Written())
    config = read_json(tmp_path / "positions.json")
    write_json(tmp_path / "positions.json", {**config, "instructions": ["lift it"]})
    with pytest.raises(ValueError, match=r"holds weights \(2, 43\), its positions.json says \(1, 43\)"):
        PositionJudge.load(tmp_path, locator=Written())
    (tmp_path / "positions.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="do not load"):
        PositionJudge.load(tmp_path, locator=Written())
