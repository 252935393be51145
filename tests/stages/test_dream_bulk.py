"""Dreaming many: batches by tokens, decoding behind, best of n, shares of one list, and what cannot be done."""

from concurrent.futures import wait
from functools import partial
from threading import Event
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dreamgen.core.clip import Clip, Draft, Labels
from dreamgen.core.manifest import tree_digest, write_json
from dreamgen.data.clips import ClipFolder
from dreamgen.data.prompts import FolderPrompts
from dreamgen.engine.behind import Behind
from dreamgen.filters.frozen import Frozen
from dreamgen.stages.dream import dream
from dreamgen.worlds.prefix import PrefixWorld
from tests.stages.drawn_world import DrawnWorld, WholeWorld, prompts
from tests.worlds.conftest import pipeline_folder, tiny_robot  # noqa: F401

run = partial(dream, record={})


class Brightness:
    """Likes the third seed of even prompts, and has no opinion on p1."""

    name, needs_labels = "brightness", False

    def score(self, clips: list[Clip], labels: list[Labels]) -> np.ndarray:
        assert len(clips) == len(labels)
        if clips[0].id == "p1":
            return np.full(len(clips), np.nan)
        return np.array([clip.video.mean() / 255 for clip in clips])


def test_a_batch_holds_as_many_tokens_as_it_may(tmp_path):
    world = DrawnWorld()
    run(world, lambda: prompts(7), out=tmp_path / "a", token_budget=100)
    assert [len(batch) for batch in world.batches] == [3, 3, 1] == world.decoded
    world = DrawnWorld()
    run(world, lambda: prompts(7), out=tmp_path / "b", token_budget=100, batch_size=2)
    assert [len(batch) for batch in world.batches] == [2, 2, 2, 1]
    with pytest.raises(ValueError, match="token_budget is 29; one clip has 30 latent tokens"):
        run(DrawnWorld(), lambda: prompts(7), out=tmp_path / "c", token_budget=29)
    with pytest.raises(ValueError, match="WholeWorld does not say how many"):
        run(WholeWorld(), lambda: prompts(7), out=tmp_path / "d", token_budget=29)
    with pytest.raises(ValueError, match="batch_size is 0"):
        run(DrawnWorld(), lambda: prompts(7), out=tmp_path / "e", batch_size=0)


@pytest.mark.parametrize("overlap", [True, False, None])
def test_clips_are_the_same_in_any_batches_order_shares_and_halves(tmp_path, overlap):
    one = run(DrawnWorld(), lambda: prompts(7), out=tmp_path / "one", batch_size=1, overlap=False)
    expected = tree_digest(tmp_path / "one" / "clips")
    run(DrawnWorld(), lambda: prompts(7), out=tmp_path / "three", batch_size=3, overlap=overlap)
    run(DrawnWorld(), lambda: prompts(7)[::-1], out=tmp_path / "back", batch_size=3, overlap=overlap)
    run(WholeWorld(), lambda: prompts(7), out=tmp_path / "whole", batch_size=3, overlap=overlap)
    for shard in (1, 2, 0):
        last = run(DrawnWorld(), lambda: prompts(7), out=tmp_path / "shares", batch_size=1, shard=shard, num_shards=3,
                   overlap=overlap)  # fmt: skip
    assert last["id"] == one["id"] and last["results"] == one["results"]
    assert {tree_digest(tmp_path / name / "clips") for name in ("three", "back", "whole", "shares")} == {expected}


def test_bytes_of_a_world_model_do_not_depend_on_its_batch(pipeline_folder, tmp_path):  # noqa: F811
    world = PrefixWorld(robot=tiny_robot(), path=str(pipeline_folder), frames=5, steps=2, text_length=12,
                        precision="fp32")  # fmt: skip
    listed = prompts(7, height=32, width=48)
    ways = {"ones": (1, listed, 1), "threes": (3, listed, 1), "back": (3, listed[::-1], 1), "shares": (2, listed, 3)}
    for name, (size, given, shards) in ways.items():
        for shard in range(shards):
            run(world, lambda given=given: given, out=tmp_path / name, batch_size=size, shard=shard, num_shards=shards,
                overlap=name == "back")  # fmt: skip
    assert len({tree_digest(tmp_path / name / "clips") for name in ways}) == 1
    world.guidance = 1.0  # one row in each forward pass
    single, several = world.dream(listed[:1])[0], world.dream(listed[:3])[0]
    assert np.array_equal(single.video, several.video)
    assert world.clip_tokens == 2 * 4 * 6 // 4


def test_the_next_batch_is_denoised_while_the_last_is_decoded():
    seen, done = [], []

    def decode(k: int) -> None:
        while len(seen) <= min(k + 1, 3):  # until the next one has been begun
            pass
        done.append((k, torch.get_num_threads()))

    with Behind(decode) as behind:
        for k in range(4):
            seen.append(k)
            behind(k)
        seen.append(4)
    assert done == [(k, torch.get_num_threads()) for k in range(4)]


def test_an_error_of_the_thread_is_told_and_stops_the_run(tmp_path):
    world = DrawnWorld()
    world.clips = lambda prompts, latents: (_ for _ in ()).throw(ValueError("cannot be decoded"))
    with pytest.raises(ValueError, match="cannot be decoded"):
        run(world, lambda: prompts(7), out=tmp_path, batch_size=1, overlap=True)
    assert len(world.batches) < 5 and not (tmp_path / "manifest.json").exists()
    run(DrawnWorld(), lambda: prompts(7), out=tmp_path, batch_size=1, overlap=True)
    assert len(ClipFolder(tmp_path / "clips")) == 7


def test_nothing_is_begun_behind_an_error():
    begun, handed = [], Event()

    def work(k: int) -> None:
        begun.append(k)
        handed.wait()
        raise ValueError(f"piece {k}")

    with pytest.raises(ValueError, match="piece 0"), Behind(work) as behind:
        behind(0)
        behind(1)
        handed.set()
        wait(behind.pending)
        behind(2)
    assert begun == [0]


def test_an_error_leaves_no_choice_among_the_seeds_of_two_prompts(tmp_path):
    """More seeds than a batch holds: a batch that could not be decoded has some of them."""
    options = dict(best_of=3, filter=Brightness(), batch_size=2, overlap=True)
    run(DrawnWorld(), lambda: prompts(5), out=tmp_path / "good", **options)
    world = DrawnWorld(delay=0.05)
    clips, calls = world.clips, []

    def once(group, latents):
        calls.append(0)
        if len(calls) == 2:
            raise ValueError("out of memory")
        return clips(group, latents)

    world.clips = once
    with pytest.raises(ValueError, match="out of memory"):
        run(world, lambda: prompts(5), out=tmp_path / "bad", **options)
    assert not ClipFolder(tmp_path / "bad" / "clips").ids()
    run(DrawnWorld(), lambda: prompts(5), out=tmp_path / "bad", **options)
    assert tree_digest(tmp_path / "bad" / "clips") == tree_digest(tmp_path / "good" / "clips")


def test_the_best_of_three_seeds_is_kept_and_its_score_with_it(tmp_path):
    plain, chosen = DrawnWorld(), DrawnWorld()
    run(plain, lambda: prompts(5), out=tmp_path / "plain")
    run(chosen, lambda: prompts(5), out=tmp_path / "best", best_of=3, filter=Brightness(), batch_size=4)
    assert [len(batch) for batch in chosen.batches] == [3] * 5  # all seeds of a prompt in one batch
    folder = ClipFolder(tmp_path / "best" / "clips")
    for prompt in prompts(5):
        clip = folder.read(prompt.id)
        if prompt.id == "p1":
            assert clip.scores == {} and clip.seed == prompt.seed
            continue
        draws = [np.random.default_rng(s).integers(0, 256, (5, 16, 24, 3), np.uint8).mean() / 255
                 for s in (prompt.seed, clip.seed)]  # fmt: skip
        assert clip.scores["brightness"] == pytest.approx(draws[1]) and draws[1] >= draws[0]
        assert clip.scores["brightness_mean_of_3"] <= clip.scores["brightness"]
    assert any(folder.info(p.id)["seed"] != p.seed for p in prompts(5))
    # more seeds than a batch holds: the same clips
    run(DrawnWorld(), lambda: prompts(5), out=tmp_path / "small", best_of=3, filter=Brightness(), batch_size=2)
    assert tree_digest(tmp_path / "small" / "clips") == tree_digest(tmp_path / "best" / "clips")


def test_what_chooses_is_placed_beside_the_world_model(tmp_path):
    placed, world, judging = [], DrawnWorld(), Brightness()
    labeler, judging.model = SimpleNamespace(robot=tiny_robot(), label=len), SimpleNamespace()
    for name, part in (("world", world), ("labeler", labeler), ("model", judging.model)):
        part.place = partial(placed.append, name)
    run(world, lambda: prompts(2), out=tmp_path, best_of=2, filter=judging, labeler=labeler)
    assert placed == ["world", "labeler", "model"]
    (tmp_path / "manifest.json").unlink()
    run(world, lambda: prompts(2), out=tmp_path, best_of=2, filter=judging, labeler=labeler)
    assert len(placed) == 3  # nothing was left to dream


def test_a_first_frame_is_read_when_its_group_is_dreamed(tmp_path):
    """Each once a group, of its own shard, and of what is left."""
    whole, reads = prompts(7), []

    def listed() -> list[Draft]:
        def first(k: int) -> tuple:
            reads.append(k)
            return whole[k].image, whole[k].state

        shared = [partial(first, k) for k in range(7)]
        return [Draft(id=p.id, first=shared[k // 2 * 2], instruction=p.instruction, seed=p.seed, pair=p.pair)
                for k, p in enumerate(whole)]  # fmt: skip

    world, at = DrawnWorld(), []
    world.denoise = lambda group, inner=world.denoise: at.append(len(reads)) or inner(group)
    run(world, listed, out=tmp_path / "two", batch_size=3, shard=1, num_shards=2)
    assert reads == [2, 4] and at == [2]
    run(world, listed, out=tmp_path / "two", batch_size=3, shard=0, num_shards=2)
    assert reads == [2, 4, 0, 2, 6] and at == [2, 4, 5]
    assert len(ClipFolder(tmp_path / "two/clips")) == 7


def test_texts_are_read_before_the_transformer_takes_its_place(tmp_path):
    calls, world = [], DrawnWorld()
    world.read, world.place = calls.append, partial(calls.append, "place")
    run(world, lambda: prompts(7), out=tmp_path, batch_size=2, shard=1, num_shards=2)
    # of its own prompts, which are p2, p3 and p6, then of those that it may be given next
    assert calls == [["do 2", "do 0", "do 1"], "place"]


def test_a_choice_needs_something_to_choose_by(tmp_path):
    with pytest.raises(ValueError, match="best_of is 2 and filter is NoneType"):
        run(DrawnWorld(), lambda: prompts(2), out=tmp_path, best_of=2)
    labelled = Brightness()
    labelled.needs_labels = True
    with pytest.raises(ValueError, match="'brightness' scores labels; give the stage a labeler"):
        run(DrawnWorld(), lambda: prompts(2), out=tmp_path, best_of=2, filter=labelled)
    world = DrawnWorld()
    with pytest.raises(ValueError, match=r"filter 'frozen' has no reference.*set its `half` \(filter.frozen.half\)"):
        run(world, lambda: prompts(2), out=tmp_path, best_of=2, filter=Frozen())
    run(world, lambda: prompts(2), out=tmp_path, best_of=2, filter=Frozen(half=0.1))
    assert len(world.batches) == 1  # none before it was said


def test_a_bad_clip_is_dreamed_again_as_its_error_says(tmp_path):
    done = run(DrawnWorld(), lambda: prompts(7), out=tmp_path, batch_size=2)
    clips, whole = tmp_path / "clips", tree_digest(tmp_path / "clips")
    (clips / "p4.mp4").write_bytes((clips / "p4.mp4").read_bytes()[:99])
    with pytest.raises(ValueError, match="delete p4.json beside it and .*manifest.json, then give the command"):
        ClipFolder(clips).read("p4")
    (clips / "p4.json").unlink()
    (tmp_path / "manifest.json").unlink()
    world = DrawnWorld()
    again = run(world, lambda: prompts(7), out=tmp_path, batch_size=2)
    assert world.batches == [["p4", "p5"]] and tree_digest(clips) == whole
    assert (again["id"], again["results"]) == (done["id"], done["results"])


def test_pictures_whose_names_do_not_fit_are_named_before_anything_is_dreamed(tmp_path):
    def dreamt(*names: str) -> None:
        for name in names:
            Image.fromarray(np.zeros((16, 24, 3), np.uint8)).save(tmp_path / name)
        listed = FolderPrompts(folder=tmp_path, robot=tiny_robot(), instructions=["go"])
        world = DrawnWorld()
        try:
            run(world, listed, out=tmp_path / "out")
        finally:
            assert not world.batches
            for name in names:
                (tmp_path / name).unlink()

    with pytest.raises(ValueError, match="'IMG 1_i00_s0' is not fit for a file name.*rename the picture IMG 1.png"):
        dreamt("a.png", "IMG 1.png")
    with pytest.raises(ValueError, match="a.jpg and a.png are both the first frame 'a'"):
        dreamt("a.png", "a.jpg")
    with pytest.raises(ValueError, match="there are no prompts"):
        run(DrawnWorld(), lambda: [], out=tmp_path / "none")


def test_what_first_frames_come_from_is_a_parent(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("pictures")

    class Listed(FolderPrompts):
        def __call__(self):
            return prompts(2)

    listed = Listed(folder=tmp_path / "data", robot=tiny_robot())
    done = run(DrawnWorld(), listed, out=tmp_path / "out")
    assert done["parents"] == {"prompts": tree_digest(tmp_path / "data")}
    opened = DrawnWorld()
    opened.folder = tmp_path / "other"  # from which a world model was loaded
    opened.folder.mkdir()
    write_json(opened.folder / "manifest.json", {"id": "tuned", "stage": "finetune", "config": {}})
    assert run(opened, listed, out=tmp_path / "more")["parents"] == {**done["parents"], "world_model": "tuned"}
    (tmp_path / "data" / "a.txt").write_text("other pictures")
    with pytest.raises(ValueError, match="another configuration.*parents.prompts"):
        run(DrawnWorld(), listed, out=tmp_path / "out")
