"""Clips as a world model draws them, for a labeler."""

import numpy as np
import pytest
import torch

from dreamgen.stages.drawn import DRAWN, drawn_by
from dreamgen.worlds.prefix import PrefixWorld
from dreamgen.worlds.redream import redream
from dreamgen.worlds.tiny import build
from tests.worlds.conftest import LAYOUT, tiny_robot

TEXTS, HZ = ["open the drawer"] * 5, ["10"] * 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    build(LAYOUT, TEXTS[:1], seed=3).save_pretrained(path := tmp_path_factory.mktemp("pipeline") / "toy")
    return path


@pytest.fixture
def world(folder):
    return PrefixWorld(robot=tiny_robot(), path=str(folder), frames=9, steps=4, guidance=2.5, text_length=12,
                       precision="fp32")  # fmt: skip


@pytest.fixture
def clips() -> np.ndarray:
    frames = np.random.default_rng(5).integers(0, 256, (5, 9, 4, 6, 3), np.uint8)
    return frames.repeat(8, 2).repeat(8, 3)


def asked(clips):
    return lambda n: clips[n]


def test_without_a_level_it_is_the_autoencoder(world, clips, tmp_path):
    found = drawn_by(world, tmp_path, batch_size=2)(asked(clips), HZ, TEXTS)
    whole = world.decode(world.encode(torch.from_numpy(clips))).numpy()
    np.testing.assert_array_equal(np.stack(found), whole)


def test_each_has_a_level_of_its_own_whatever_its_batch(world, clips, tmp_path):
    make = dict(redream_up_to=0.9, seed=3)
    alone = drawn_by(world, tmp_path / "alone", batch_size=1, **make)(asked(clips), HZ, TEXTS)
    found = drawn_by(world, tmp_path / "found", batch_size=3, **make)(asked(clips), HZ, TEXTS)
    np.testing.assert_array_equal(np.stack(found), np.stack(alone))
    same = drawn_by(world, tmp_path / "same", batch_size=3, **make)(asked(clips[[0, 0, 0, 0, 0]]), HZ, TEXTS)
    assert len({video.tobytes() for video in same}) > 1
    other = drawn_by(world, tmp_path / "other", redream_up_to=0.9, seed=4)(asked(clips), HZ, TEXTS)
    assert not np.array_equal(np.stack(other), np.stack(found))


def test_clips_of_another_rate_pass_the_autoencoder_alone(world, clips, tmp_path):
    assert world.clock.video_hz == "10"
    found = drawn_by(world, tmp_path, redream_up_to=0.9, seed=3)(
        asked(clips), ["10", "40/3", "10", "20", "10.0"], TEXTS
    )
    whole = drawn_by(world, tmp_path / "whole", redream_up_to=0.9, seed=3)(asked(clips), HZ, TEXTS)
    decoded = world.decode(world.encode(torch.from_numpy(clips))).numpy()
    for k in range(5):
        np.testing.assert_allclose(found[k], decoded[k] if k in (1, 3) else whole[k], atol=1)


def test_killed_and_continued_none_is_drawn_twice(world, clips, tmp_path, monkeypatch):
    make = dict(redream_up_to=0.9, seed=3, batch_size=2)
    whole = drawn_by(world, tmp_path / "whole", **make)(asked(clips), HZ, TEXTS)
    calls = []

    def dies(*args, **options):
        calls.append(len(options["seeds"]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return redream(*args, **options)

    monkeypatch.setattr("dreamgen.stages.drawn.redream", dies)
    with pytest.raises(KeyboardInterrupt):
        drawn_by(world, tmp_path / "killed", **make)(asked(clips), HZ, TEXTS)
    assert len(list((tmp_path / "killed" / DRAWN).glob("*.npz"))) == 1
    again = drawn_by(world, tmp_path / "killed", **make)(asked(clips), HZ, TEXTS)
    np.testing.assert_array_equal(np.stack(again), np.stack(whole))
    assert calls == [2, 2, 2, 1]


def test_a_world_model_is_on_the_accelerator_only_while_it_draws(world, clips, tmp_path, monkeypatch):
    told, decode = [], world.decode
    monkeypatch.setattr(world, "place", lambda device=None: told.append(f"to {device or 'the best'}"))
    monkeypatch.setattr(world, "decode", lambda latents: told.append("draws") or decode(latents))
    drawn = drawn_by(world, tmp_path, batch_size=3)
    assert told == []
    drawn(asked(clips), HZ, TEXTS)
    assert told == ["to the best", "draws", "draws", "to cpu"]
    drawn(asked(clips), HZ, TEXTS)  # all are there
    assert len(told) == 4


def test_texts_are_read_before_the_world_model_is_placed_and_once(world, clips, tmp_path, monkeypatch):
    told, read, place = [], world.texts.read, world.place
    monkeypatch.setattr(world, "place", lambda *device: told.append("placed") or place(*device))
    monkeypatch.setattr(world.texts, "read", lambda texts, device: told.append([*texts]) or read(texts, device))
    texts = ["open the drawer", "", "close the drawer", "open the drawer", "take it"]
    drawn = drawn_by(world, tmp_path, redream_up_to=0.9, seed=3, batch_size=2)
    drawn(asked(clips), [*HZ[:4], "20"], texts)  # the last passes the autoencoder alone
    first = told.index("placed")
    assert len(told[:first]) == 1 and sorted(told[0]) == ["", "close the drawer", "open the drawer"]
    assert not any(texts for texts in told[first:] if texts != "placed")
    told.clear()
    drawn_by(world, tmp_path / "plain", batch_size=2)(asked(clips), HZ, texts)
    assert told == ["placed"] * 2


def test_a_world_model_goes_where_it_is_sent(world):
    world.place(torch.device("meta"))
    at = {name: next(world.pipe.components[name].parameters()).device.type
          for name in ("vae", "transformer", "text_encoder")}  # fmt: skip
    assert at == {"vae": "meta", "transformer": "meta", "text_encoder": "cpu"} and world.device.type == "meta"
