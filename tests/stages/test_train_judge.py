"""Training a judge of a square that must end bright: it learns, is calibrated, resumes, refuses."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dreamgen.core.clip import Clip, Episode
from dreamgen.core.clock import Clock
from dreamgen.core.manifest import is_complete
from dreamgen.data.lerobot import Dataset
from dreamgen.data.writer import write_dataset
from dreamgen.filters.judge import VideoJudge
from dreamgen.policies.encoder import TinyEncoder
from dreamgen.policies.palette import PaletteEncoder
from dreamgen.stages.judge_clips import Batches, Recorded, jittered, moved, shown_by
from dreamgen.stages.train_judge import platt, read_labels, three_ways, train_judge

sys.path.insert(0, str(Path(__file__).parents[1] / "idm"))
from moving_square import ROBOT, draw  # noqa: E402

COUNT, ROWS = 48, 9
TEXTS = ("make it bright", "make it dark")


def lit(place: np.ndarray, light: float) -> np.ndarray:
    """A frame whose whole ground is as bright as its square."""
    return np.where(draw(place, light) == 110, 170 if light > 0 else 40, draw(place, light)).astype(np.uint8)


def episodes(meta: bool = True, told: bool = True) -> list[Episode]:
    """The square turns bright or dark in the middle, or does not; the instruction asks for one of both.

    Where it is not told, bright is what both instructions ask for.
    """
    found, rng = [], np.random.default_rng(4)
    for k in range(COUNT):
        place, first, last = rng.uniform((8, 8), (40, 24)), rng.choice([-1.0, 1.0]), rng.choice([-1.0, 1.0])
        video = np.stack([lit(place, first if row < 5 else last) for row in range(ROWS)])
        success = (last > 0) == (k % 2 == 0 or not told)
        found.append(
            Episode(
                instruction=TEXTS[k % 2],
                state=np.zeros((ROWS, 2), np.float32),
                video={"top": video},
                action=np.array([[0, 0, first if row < 4 else last] for row in range(ROWS)], np.float32),
                meta={"success": bool(success)} if meta else {},
            )
        )
    return found


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    root = tmp_path_factory.mktemp("outcomes")
    write_dataset(root, episodes(), ROBOT)
    return Dataset(root, ROBOT)


def tiny(instructions: list[str]) -> VideoJudge:
    encoder = TinyEncoder(width=16, channels=(4, 8), halvings=2, keypoints=2, colours=2, patches=2, text_width=8,
                          buckets=31, length=4)  # fmt: skip
    return VideoJudge(robot=ROBOT, encoder=encoder, instructions=instructions, frames=3, layers=1, heads=2, dropout=0.0)


OPTIONS = {"video_hz": "10", "held_out_share": 0.4, "steps": 60, "batch_size": 8, "lr": 5e-3, "warmup": 5, "ema": 0.9,
           "precision": "fp32", "record": {}}  # fmt: skip


def test_it_learns_and_knows_what_its_answers_are_worth(tmp_path):
    write_dataset(tmp_path / "data", episodes(told=False), ROBOT)
    dataset = Dataset(tmp_path / "data", ROBOT)
    found = train_judge(tiny, [dataset], out=tmp_path / "judge", swapped=0.0, **OPTIONS)["results"]
    held_out = found["held_out"]
    assert held_out["auroc"] > 0.9 and sum(found["episodes"]) == COUNT
    judge = VideoJudge.load(tmp_path / "judge", robot=ROBOT)
    rates = judge.rates["real"]
    assert (rates.tpr, rates.tnr) == (held_out["tpr"], held_out["tnr"]) and judge.threshold == found["threshold"]
    assert rates.positives + rates.negatives == found["episodes"][2] == held_out["n"]
    assert not (tmp_path / "judge" / "training").exists()
    bright, dark = (np.stack([lit(np.array([20, 16]), light) for light in (-1, -1, last, last)]) for last in (1, -1))
    asked = [Clip(id="c", video=video, video_hz="10", instruction=text)
             for video, text in ((bright, TEXTS[0]), (dark, TEXTS[0]), (bright, "dance"))]  # fmt: skip
    yes, no, unknown = judge.judge(asked)
    assert yes > no and np.isnan(unknown)


def test_commands_tell_what_no_picture_shows(tmp_path):
    """All pictures are alike; success is to have been sent to the right."""
    made, rng = [], np.random.default_rng(6)
    for _ in range(COUNT):
        right = bool(rng.integers(2))
        action = np.tile(np.array([0.5 if right else -0.5, 0, 0], np.float32), (ROWS, 1))
        made.append(
            Episode(
                instruction=TEXTS[0],
                state=np.zeros((ROWS, 2), np.float32),
                action=action,
                video={"top": np.full((ROWS, 32, 48, 3), 90, np.uint8)},
                meta={"success": right},
            )
        )
    write_dataset(tmp_path / "data", made, ROBOT)
    dataset, found = Dataset(tmp_path / "data", ROBOT), {}
    for told in (["place"], []):

        def judge(instructions: list[str], told: list[str] = told) -> VideoJudge:
            torch.manual_seed(0)
            sizes = dict(frames=3, layers=1, heads=2, dropout=0.0, proprioception=told)
            return VideoJudge(robot=ROBOT, encoder=tiny([]).encoder, instructions=instructions, **sizes)

        made = train_judge(judge, [dataset], out=tmp_path / str(len(told)), **OPTIONS)
        found[len(told)] = made["results"]["held_out"]
    assert found[1]["auroc"] == 1.0 and found[1]["brier"] < 0.1 and found[0]["brier"] > 0.2


class Autoencoder:
    """It returns pictures as they are, or all grey."""

    def __init__(self, share: float) -> None:
        self.share = share

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        assert frames.shape[1] % 4 == 1
        return frames

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return (128 + self.share * (latents.float() - 128)).to(torch.uint8)


def test_what_an_autoencoder_takes_from_a_judge_is_measured(dataset, tmp_path):
    found = {}
    for name, share in (("whole", 1.0), ("grey", 0.0)):
        options = dict(OPTIONS, world_model=Autoencoder(share), degraded=0.0)
        found[name] = train_judge(tiny, [dataset], out=tmp_path / name, **options)["results"]
        assert "decoded" in VideoJudge.load(tmp_path / name, robot=ROBOT).rates
    assert found["whole"]["held_out"] == found["grey"]["held_out"]
    assert found["whole"]["decoded"]["n"] == found["whole"]["held_out"]["n"] < 128
    assert found["whole"]["decoded"]["auroc"] > 0.9 and found["grey"]["decoded"]["auroc"] < 0.9


class Inverted:
    """Actions move it, but what it dreams is dark where the robot's light is on."""

    robot, clock, gaps = ROBOT, Clock(robot_hz="20", video_hz="10", frames=5), 4

    def __init__(self) -> None:
        self.asked: list[int] = []

    def imagine(self, pasts, actions):  # noqa: ANN001, ANN201
        self.asked.append(len(pasts))
        assert {len(action) for action in actions} == {8}
        return [np.stack([lit(np.array([20, 16]), -light) for light in action[1::2, 2]]) for action in actions]


def test_a_judge_of_dreams_learns_from_dreams_of_known_outcome(tmp_path):
    write_dataset(tmp_path / "data", episodes(told=False), ROBOT)
    dataset, world = Dataset(tmp_path / "data", ROBOT), Inverted()
    options = OPTIONS | {"swapped": 0.0, "world_model": world, "degraded": 1.0}
    found = train_judge(tiny, [dataset], out=tmp_path / "dreams", **options)["results"]
    assert found["imagined"]["auroc"] > 0.9 and found["held_out"]["auroc"] < 0.5
    assert sum(world.asked) == COUNT and max(world.asked) == 16
    judge = VideoJudge.load(tmp_path / "dreams", robot=ROBOT)
    assert set(judge.rates) == {"real", "imagined"} and judge.rates["imagined"].tpr == found["imagined"]["tpr"]
    assert found["imagined"]["precision"] >= 0.9  # the threshold is chosen on dreams


def test_dreams_are_replayed_somewhere(dataset, tmp_path):
    with pytest.raises(ValueError, match="come from replaying these dreams and the recipe has no simulator"):
        train_judge(tiny, [dataset], out=tmp_path, dreams=dataset, record={})


def test_dreams_of_recordings_follow_their_actions_whatever_the_batch(dataset, tmp_path):
    clips = Recorded([dataset], [{i: True for i in range(COUNT)}], "10")
    some = [clips[k] for k in (3, 1, 2)]
    many, one = (shown_by(Inverted(), tmp_path / str(size), 0, size)(some) for size in (16, 1))
    for clip, video, alone in zip(some, many, one, strict=True):
        assert np.array_equal(video, alone) and np.array_equal(video[0], clip.video[0]) and len(video) == 5
        assert (video[-1].max() > 200) == (clip.action[7, 2] < 0)


def test_clips_that_a_world_model_cannot_dream_are_named(dataset, tmp_path):
    shown = shown_by(Inverted(), tmp_path, 0)
    fast, slow = (Recorded([dataset], [{0: True}], hz)[0] for hz in ("10", "5"))
    with pytest.raises(ValueError, match="'episode_000000' is seen at 5 Hz, the action-conditioned model dreams at 10"):
        shown([slow])
    with pytest.raises(ValueError, match="shows 3 frames, the action-conditioned model dreams 4 at a time"):
        shown([replace(fast, video=fast.video[:3])])


def test_an_encoder_that_is_fitted_to_pictures_is(dataset, tmp_path):
    def palette(instructions: list[str]) -> VideoJudge:
        torch.manual_seed(0)
        encoder = PaletteEncoder(width=16, colours=4, slots=3, hidden=16, text_width=8, buckets=31, length=4)
        return VideoJudge(robot=ROBOT, encoder=encoder, instructions=instructions, frames=3, layers=1, heads=2)

    train_judge(palette, [dataset], out=tmp_path / "judge", **OPTIONS | {"steps": 1})
    judge, plain = VideoJudge.load(tmp_path / "judge", robot=ROBOT), palette(list(TEXTS))
    assert not torch.equal(judge.encoder.palette, plain.encoder.palette)
    shown = np.concatenate([dataset.canvas(i, range(ROWS)) for i in range(COUNT)]).reshape(-1, 3)
    near = np.abs(shown[None].astype(np.float32) - judge.encoder.palette[:, None].numpy()).sum(-1).min(1)
    assert (near < 30).all()  # every colour that it looks for is one of the recordings


@pytest.mark.parametrize("world_model", [None, Inverted()])
def test_a_killed_training_ends_in_the_same_bits(dataset, tmp_path, monkeypatch, world_model):
    options = OPTIONS | {"steps": 4, "checkpoint_every": 2, "seed": 3, "world_model": world_model}
    train_judge(tiny, [dataset], out=tmp_path / "whole", **options)
    loss, calls = VideoJudge.loss, []

    def dies(self, batch):  # noqa: ANN001, ANN202
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss(self, batch)

    monkeypatch.setattr(VideoJudge, "loss", dies)
    with pytest.raises(KeyboardInterrupt):
        train_judge(tiny, [dataset], out=tmp_path / "killed", **options)
    assert not is_complete(tmp_path / "killed")
    monkeypatch.setattr(VideoJudge, "loss", loss)
    train_judge(tiny, [dataset], out=tmp_path / "killed", **options)
    for file in ("model.safetensors", "config.json", "scores.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes()


def test_batches_hold_both_outcomes_and_swapped_instructions(dataset):
    clips = Recorded([dataset], [{i: bool(dataset.episode(i).meta["success"]) for i in range(COUNT)}], "10")
    model = tiny(list(TEXTS))
    clips.degrade(lambda clips: [np.full_like(clip.video[:5], 9) for clip in clips], [0])
    assert clips.returned[0].shape == (5, 32, 48, 3)  # as many as a causal autoencoder takes
    batches = Batches(model, clips, range(1, COUNT), batch_size=8, swapped=0.25, shift=2, degraded=0.0, seed=1)
    first, again = batches(5), batches(5)
    assert all((first[key] == again[key]).all() for key in first)
    assert first["pictures"].shape == (8, 3, 1, 32, 48, 3) and first["success"].sum() == 3  # 2 of 8 are swapped
    for pictures, words, success in zip(first["pictures"].numpy(), first["words"], first["success"], strict=True):
        asked = TEXTS[int((words != model.encoder.words([TEXTS[0]])[0]).any())]
        bright = pictures[-1].max() > 200
        assert bool(success) == (bright == (asked == TEXTS[0]))


def test_a_share_of_a_batch_is_as_a_world_model_shows_it(dataset):
    success = {i: bool(dataset.episode(i).meta["success"]) for i in range(COUNT)}
    clips, model = Recorded([dataset], [success], "10"), tiny(list(TEXTS))
    few = [next(i for i in success if success[i] == kind) for kind in (True, False)]  # of 48
    clips.degrade(lambda clips: [np.full_like(clip.video[:5], 9) for clip in clips], few)
    for share in (0.0, 0.5, 1.0):
        batches = Batches(model, clips, range(COUNT), batch_size=40, swapped=0.25, shift=0, degraded=share, seed=1)
        shown = np.concatenate([(batches(k)["pictures"] == 9).flatten(1).all(1).numpy() for k in range(10)])
        assert shown.mean() == pytest.approx(share, abs=0.06)
    clips.returned.pop(few[1])  # no failure is dreamt: failures are shown as they were recorded
    one_kind = Batches(model, clips, range(COUNT), batch_size=8, swapped=0.0, shift=0, degraded=1.0, seed=1)(0)
    assert ((one_kind["pictures"] == 9).flatten(1).all(1) == (one_kind["success"] == 1)).all()


def test_frames_are_jittered_and_pictures_moved():
    for seed in range(20):
        rows = jittered(18, 5, np.random.default_rng(seed))
        assert rows[0] == 0 and rows[-1] == 17 and (np.diff(rows) >= 0).all()
        assert (np.abs(rows - np.linspace(0, 17, 5)) <= 17 / 8 + 0.5).all()
    pictures = np.arange(2 * 1 * 5 * 7 * 3, dtype=np.uint8).reshape(2, 1, 5, 7, 3)
    shown = moved(pictures, np.array([2, -1]))
    np.testing.assert_array_equal(shown[:, :, :3, 1:], pictures[:, :, 2:, :-1])
    np.testing.assert_array_equal(shown[:, :, 4, 1:], pictures[:, :, 4, :-1])
    assert moved(pictures, np.array([0, 0])) is pictures


def test_splits_and_calibration():
    success = np.arange(40) % 4 == 0
    parts = three_ways(success, 0.4, 7)
    assert sorted(np.concatenate(parts).tolist()) == list(range(40))
    assert [int(success[part].sum()) for part in parts] == [6, 2, 2]
    with pytest.raises(ValueError, match="2 of 30 episodes, of 30 first states, are successes"):
        three_ways(np.arange(30) < 2, 0.3, 0)
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 3, 4000)
    happened = rng.random(4000) < 1 / (1 + np.exp(-(0.5 * logits - 1)))
    slope, offset = platt(logits, happened)
    assert slope == pytest.approx(0.5, abs=0.06) and offset == pytest.approx(-1, abs=0.12)


def test_labels_of_ones_own(dataset, tmp_path):
    root, table = tmp_path / "plain", tmp_path / "labels.csv"
    write_dataset(root, episodes(meta=False), ROBOT)
    plain = Dataset(root, ROBOT)
    options = OPTIONS | {"steps": 1, "warmup": 0}
    with pytest.raises(ValueError, match="does not say which episodes succeeded.*stage.labels"):
        train_judge(tiny, [plain], out=tmp_path / "a", **options)
    rows = [f"{i},{'yes' if dataset.episode(i).meta['success'] else 'No'}" for i in range(20)]
    table.write_text("\n".join(["episode_index,success", *rows]))
    found = train_judge(tiny, [plain], out=tmp_path / "b", labels=table, **options)["results"]
    assert sum(found["episodes"]) == 20
    assert found["successes"] == sum(dataset.episode(i).meta["success"] for i in range(20))
    (tmp_path / "labels.json").write_text(
        '[{"episode_index": 3, "success": true}, {"episode_index": 99, "success": 0}]'
    )
    assert read_labels(tmp_path / "labels.json") == {3: True, 99: False}
    with pytest.raises(ValueError, match=r"labels the episodes \[99\]"):
        train_judge(tiny, [plain], out=tmp_path / "c", labels=tmp_path / "labels.json", **options)
    for encoding in ("utf-8", "utf-8-sig"):  # as Excel writes "CSV UTF-8"
        table.write_text("episode_index,success\r\n4,yes\r\n7,0\r\n", encoding=encoding)
        assert read_labels(table) == {4: True, 7: False}
    table.write_text("episode_index,success\n4,perhaps")
    with pytest.raises(ValueError, match="row 0 of .*perhaps.*expected episode_index, a number, and success"):
        read_labels(table)
    with pytest.raises(ValueError, match="do not exist"):
        read_labels(tmp_path / "none.csv")
