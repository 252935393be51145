"""The clips that a judge learns from: decoded where they are looked at, and as a world model shows them."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from weakref import WeakSet

import numpy as np
import pytest
import torch

from dreamgen.data.lerobot import Dataset
from dreamgen.data.writer import write_dataset
from dreamgen.filters.judge import VideoJudge
from dreamgen.stages.judge_clips import Batches, Recorded, shown_by
from dreamgen.stages.sharing import Parts
from dreamgen.stages.train_judge import dreamt, train_judge
from tests.stages.test_train_judge import OPTIONS, ROBOT, TEXTS, Autoencoder, Inverted, episodes, tiny


def test_clips_that_were_dreamt_before_a_kill_are_not_dreamt_again(tmp_path: Path, monkeypatch) -> None:
    write_dataset(tmp_path / "data", episodes(), ROBOT)
    dataset = Dataset(tmp_path / "data", ROBOT)
    for dreams in (Inverted(), Autoencoder(0.5)):
        out = tmp_path / type(dreams).__name__
        options = OPTIONS | {"steps": 2, "world_model": dreams}
        train_judge(tiny, [dataset], out=out / "whole", **options)
        done, stops, write = [], {3, 4}, Parts.write  # within the training clips, and after them

        def dies(self, number, arrays, done=done, stops=stops, write=write):  # noqa: ANN001, ANN202
            if len(done) in stops:
                stops.discard(len(done))
                raise KeyboardInterrupt
            write(self, number, arrays)
            done.append((self.root.name, number))

        monkeypatch.setattr("dreamgen.stages.train_judge.shown_by", partial(shown_by, batch_size=8))
        monkeypatch.setattr(Parts, "write", dies)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                train_judge(tiny, [dataset], out=out / "killed", **options)
        train_judge(tiny, [dataset], out=out / "killed", **options)
        monkeypatch.undo()
        assert len(done) == len(set(done)) and len({call for call, _ in done}) > 1
        for file in ("model.safetensors", "config.json", "scores.json"):
            assert (out / "whole" / file).read_bytes() == (out / "killed" / file).read_bytes()
        assert not (out / "killed/shown").exists()


def told(instructions: Sequence[str]) -> VideoJudge:
    """A judge that is told where the commands lead."""
    torch.manual_seed(0)
    return VideoJudge(robot=ROBOT, encoder=tiny([]).encoder, instructions=instructions, frames=3, layers=1, heads=2,
                      proprioception=["place"])  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    """Nothing that was decoded is kept."""
    root = tmp_path_factory.mktemp("outcomes")
    write_dataset(root, episodes(), ROBOT)
    return Dataset(root, ROBOT, cache_mb=0)


def test_without_room_the_frames_that_are_looked_at_are_decoded_alone(dataset, monkeypatch) -> None:
    success = [{i: bool(dataset.episode(i).meta["success"]) for i in range(len(dataset))}]
    roomy, tight = Recorded([dataset], success, "10"), Recorded([dataset], success, "10", room=0)
    model, decode, rows = told(TEXTS), Dataset._decode, []
    few = [list(success[0].values()).index(kind) for kind in (True, False)]
    for clips in (roomy, tight):
        clips.degrade(lambda clips: [np.full_like(clip.video[:4], 9) for clip in clips], few)
    monkeypatch.setattr(Dataset, "_decode", lambda self, i, some: rows.append(len(some)) or decode(self, i, some))
    assert [tight.frames(k) for k in few] == [len(roomy[k].video) for k in few] == [5, 5]
    options = {"batch_size": 8, "swapped": 0.25, "shift": 2, "seed": 1}
    for degraded in (0.5, 1.0):
        whole, sparse = (Batches(model, clips, range(48), degraded=degraded, **options) for clips in (roomy, tight))
        for step in (0, 2, 3):
            expected = whole(step)
            rows.clear()
            found = sparse(step)
            assert set(rows) == ({3} if degraded < 1 else set())  # the judge looks at three of five frames
            for key in expected:
                torch.testing.assert_close(found[key], expected[key], rtol=0, atol=0, equal_nan=True)
    states = np.concatenate([model.states(roomy[k]) for k in (3, 1)])
    rows.clear()
    np.testing.assert_array_equal(tight.states(model, [3, 1]), states)
    assert not rows and tight.kept == {}
    np.testing.assert_array_equal(tight.sample(model, [3, few[0]]), roomy.sample(model, [3, few[0]]))
    assert rows == [3]


@pytest.mark.parametrize("dreams", [None, Inverted()])
def test_clips_are_judged_one_after_another(dataset, tmp_path, monkeypatch, dreams) -> None:
    """Without room a training holds two whole clips at most, and ends in the same bits."""
    options = OPTIONS | {"steps": 2, "world_model": dreams, "degraded": 1.0 if dreams else 0.0}
    train_judge(told, [dataset], out=tmp_path / "roomy", **options)
    canvas, held, most = Dataset.canvas, WeakSet(), []

    class Whole(np.ndarray):
        """An array that can stand in a set."""

        __hash__ = object.__hash__

    def watched(self, i, rows=None):  # noqa: ANN001, ANN202
        video = canvas(self, i, rows)
        if len(video) > 3:
            held.add(video := video.view(Whole))
            most.append(len(held))
        return video

    monkeypatch.setattr(Dataset, "canvas", watched)
    monkeypatch.setattr("dreamgen.stages.train_judge.Recorded", partial(Recorded, room=0))
    train_judge(told, [dataset], out=tmp_path / "tight", **options)
    assert len(most) > 16 and max(most) <= 2
    for file in ("model.safetensors", "config.json", "scores.json"):
        assert (tmp_path / "roomy" / file).read_bytes() == (tmp_path / "tight" / file).read_bytes()


def test_replayed_dreams_are_read_one_by_one(dataset, tmp_path, monkeypatch) -> None:
    truth = [{"id": f"episode_{i:06d}", "success": i % 2 == 0} for i in (5, 2, 9)]
    monkeypatch.setattr("dreamgen.stages.train_judge.replayed", lambda *_: truth)
    read, canvas = [], Dataset.canvas
    monkeypatch.setattr(Dataset, "canvas", lambda self, i, rows=None: read.append(i) or canvas(self, i, rows))
    clips, success, pairs = dreamt(dataset, None, lambda: None, 0, tmp_path)
    assert success.tolist() == [True, False, False] and pairs == [f"episode_{i:06d}" for i in (2, 5, 9)]
    assert not read and next(clips).id == "episode_000002" and read == [2]


def test_arrays_of_a_part_are_read_where_they_are_looked_at(tmp_path) -> None:
    rng, parts = np.random.default_rng(0), Parts(tmp_path / "parts")
    arrays = {"3": rng.integers(0, 255, (4, 3, 5, 3), np.uint8), "a long name of an array": rng.normal(size=(7, 2)).T}
    parts.write(12, arrays)
    found = parts.mapped(12)
    assert list(found) == list(arrays) == list(parts.read(12))
    for name, array in arrays.items():
        assert isinstance(found[name], np.memmap) and found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
