"""Fine-tuning: buckets, caches, figures per frame, adapters under checkpointing, errors before the first step."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from safetensors.torch import load_file

from dreamgen.core.clip import Episode
from dreamgen.core.embodiment import View
from dreamgen.data.buckets import ClipPool
from dreamgen.data.cache import Cache, Embeddings, require_known
from dreamgen.data.lerobot import Dataset
from dreamgen.data.writer import write_dataset
from dreamgen.engine.train import read_losses
from dreamgen.stages import finetune as stage
from dreamgen.stages import memory
from dreamgen.stages.finetune import finetune
from dreamgen.stages.latents import Latents, shard_size
from dreamgen.video.metrics import lpips_or_reason, psnr
from dreamgen.worlds.prefix import PrefixWorld
from tests.engine.test_processes import forked
from tests.worlds.conftest import pipeline_folder, tiny_robot  # noqa: F401

OPTIONS = dict(steps=3, batch_size=4, warmup=1, validation=1, samples=1, validate_every=3, record={"a": 1})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    rng = np.random.default_rng(1)
    root = tmp_path_factory.mktemp("finetune") / "demos"
    write_dataset(root, [
        Episode(instruction=("open it", "put the red block on the plate")[i % 2],
                state=rng.normal(size=(rows, 2)).astype(np.float32),
                action=rng.normal(size=(rows, 3)).astype(np.float32),
                video={"front": rng.integers(0, 256, (1, 32, 48, 3), dtype=np.uint8).repeat(rows, 0)}, meta={})
        for i, rows in enumerate([19, 18, 11, 19, 5, 20])
    ], tiny_robot())  # fmt: skip
    return Dataset(root, tiny_robot())


@pytest.fixture
def make(pipeline_folder):  # noqa: F811
    return partial(PrefixWorld, robot=tiny_robot(), path=str(pipeline_folder), frames=9, steps=2, text_length=15,
                   precision="fp32")  # fmt: skip


def weights(out):
    return load_file(next((out / "model" / "transformer").glob("*.safetensors")))


def test_parts_checkpointing_and_compute_change_nothing_but_rounding(make, dataset, tmp_path):
    finetune(make(), dataset, out=tmp_path / "plain", **OPTIONS)
    finetune(make(), dataset, out=tmp_path / "parts", accumulate=3, checkpointing=True, replicas=1,
             cache=tmp_path / "plain" / "cache", **OPTIONS)  # fmt: skip
    assert not (tmp_path / "parts" / "cache").exists()  # it was shared
    plain, parts = weights(tmp_path / "plain"), weights(tmp_path / "parts")
    assert all(torch.allclose(plain[k], parts[k], atol=5e-5) for k in plain)
    row, other = (read_losses(tmp_path / name)[-1] for name in ("plain", "parts"))  # validated in parts of 4 and 2
    assert row["val_loss"] == pytest.approx(other["val_loss"], rel=1e-4)
    assert {"data_wait", "tflops", "of_peak", "val_loss", "val_psnr", "val_ssim"} <= set(row)


def test_an_adapter_under_checkpointing_is_the_adapter(make, dataset, tmp_path):
    found = []
    for out, options in (("plain", {}), ("less", {"accumulate": 2, "checkpointing": True})):
        finetune(make(), dataset, out=tmp_path / out, method="lora", rank=2, lr=1e-2, cache=tmp_path / "cache",
                 **OPTIONS, **options)  # fmt: skip
        found.append(load_file(next((tmp_path / out / "adapter").glob("*.safetensors"))))
    assert all(torch.allclose(found[0][k], found[1][k], atol=1e-4) for k in found[0])
    assert any(value.abs().max() > 1e-3 for key, value in found[0].items() if "lora_B" in key)  # it was 0


def test_an_adapter_is_the_same_whatever_was_drawn_before(make, dataset, tmp_path):
    options, found = dict(OPTIONS, steps=1, method="lora", rank=2, cache=tmp_path / "cache"), []
    for drawn in ("1", "2"):
        torch.manual_seed(int(drawn))
        finetune(make(), dataset, out=tmp_path / drawn, **options)
        found.append(load_file(next((tmp_path / drawn / "adapter").glob("*.safetensors"))))
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])


@pytest.mark.parametrize("sharding", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_processes_write_what_one_writes(make, dataset, tmp_path, sharding):
    finetune(make(), dataset, out=tmp_path / "one", **OPTIONS)
    forked(2, lambda rank: finetune(make(), dataset, out=tmp_path / "two", tracker="tensorboard", sharding=sharding,
                                    **OPTIONS))  # fmt: skip
    assert list((tmp_path / "two" / "finetune").glob("events*")) and (tmp_path / "two" / "world.json").is_file()
    one, two = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("one", "two"))
    assert one["id"] == two["id"] and (one["results"]["final_processes"], two["results"]["final_processes"]) == (1, 2)
    alone, together = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(alone[k], together[k], atol=5e-5) for k in alone)
    assert [row["step"] for row in read_losses(tmp_path / "two")] == [2]


def test_a_kill_at_the_end_trains_nothing_again(make, dataset, tmp_path, monkeypatch):
    """The state goes when the manifest is there; what a kill between the two leaves goes with the next call."""
    with monkeypatch.context() as patch:
        patch.setattr(stage, "clear_state", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            finetune(make(), dataset, out=tmp_path, **OPTIONS)
    assert (tmp_path / "manifest.json").is_file() and (tmp_path / "training" / "latest.json").is_file()
    monkeypatch.setattr(stage, "train", lambda *_, **__: pytest.fail("it is trained"))
    finetune(make(), dataset, out=tmp_path, **OPTIONS)
    assert not (tmp_path / "training").exists()


def test_lengths_and_a_budget_of_tokens(make, dataset, tmp_path):
    """Clips of 18 and of 12 tokens: three or four of them in a step."""
    done = finetune(make(), dataset, out=tmp_path, lengths=[9, 5], token_budget=54, tracker="tensorboard", **OPTIONS)
    results = done["results"]
    assert results["shapes"] == {"9x32x48": 3 + 2 + 3 + 4, "5x32x48": 3}
    assert (results["episodes_too_short"], results["clips_padded"], results["windows"]) == (1, 0, 15)
    assert len(list((tmp_path / "cache").glob("*/key.json"))) == 2
    frames = json.loads((tmp_path / "samples" / "step_000003.json").read_text())
    assert frames["frame"] == list(range(1, 9)) and len(frames["psnr"]) == len(frames["ssim"]) == 8
    assert results["final_validation"]["psnr"] == pytest.approx(np.mean(frames["psnr"]), abs=1e-3)
    assert ("lpips" in frames) == (lpips_or_reason()[0] is not None)
    assert "lpips" in frames or "LPIPS" in frames["left_out"]["lpips"]


def test_a_cache_of_another_vae_is_refused(make, dataset, tmp_path):
    def other():
        world = make()
        with torch.no_grad():
            world.pipe.vae.encoder.conv_in.bias += 1
        return world

    finetune(make(), dataset, out=tmp_path / "a", **OPTIONS)
    with pytest.raises(ValueError, match=r"cache in .* is of other content \(vae: '.*' -> '.*'\)"):
        finetune(other(), dataset, out=tmp_path / "b", cache=tmp_path / "a" / "cache", **OPTIONS)
    with pytest.raises(ValueError, match="is of other content .*hop: 1 -> 2"):
        finetune(make(), dataset, out=tmp_path / "c", cache=tmp_path / "a" / "cache", hop=2, **OPTIONS)
    for chosen in ([0, 1, 2, 3, 5], [0, 1, 2, 4, 5]):  # of the dataset, not of the folder
        some = Dataset(dataset.root, tiny_robot(), episodes=chosen)
        with pytest.raises(ValueError, match=r"is of other content \(.*episodes: .*'6 \(.*\)'.* -> .*'5 \("):
            finetune(make(), some, out=tmp_path / "d", cache=tmp_path / "a" / "cache", **OPTIONS)


def test_an_encoding_that_was_killed_may_begin_anew_under_other_settings(make, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(Latents, "texts", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    for hop in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            finetune(make(), dataset, out=tmp_path, hop=hop, **OPTIONS)
        assert len(list((tmp_path / "cache").glob("*/key.json"))) == hop


def test_a_cache_of_other_cameras_is_another(make, tmp_path):
    robot, rng = tiny_robot(), np.random.default_rng(3)
    side = View(name="side", key="observation.images.side", height=32, width=48)
    video = {name: rng.integers(0, 256, (19, 32, 48, 3), dtype=np.uint8) for name in ("front", "side")}
    write_dataset(tmp_path / "demos", [
        Episode(instruction="go", state=np.zeros((19, 2), np.float32), action=np.zeros((19, 3), np.float32),
                video=video, meta={})
    ], replace(robot, views=[*robot.views, side], grid=()))  # fmt: skip
    (tmp_path / "demos" / "meta" / "dreamgen.json").unlink()  # as other people's, which name no robot
    names = set()
    for view in (robot.views[0], side):
        seen = Dataset(tmp_path / "demos", replace(robot, views=[view], grid=()))
        world = make()
        latents = Latents(world, ClipPool([seen], world.clock), tmp_path / view.name, transform={})
        names |= {cache.root.name for cache in latents.caches.values()}
    assert len(names) == 2


def test_what_cannot_fit_is_said_before_the_first_step(make, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "best_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(PrefixWorld, "train_full", lambda _: pytest.fail("fp32 copies of the weights are made"))
    size = sum(p.numel() for p in make().transformer.parameters())  # 22 bytes each, and 0.7 MB of activations
    fits = r"stage.checkpointing=false with 2 clips at a time \(stage.accumulate=2\)"
    monkeypatch.setattr(memory, "memory_left", lambda: 22 * size + 0.6e6)
    with pytest.raises(ValueError, match=f"4 clips of 18 tokens needs .* fit: {fits}"):
        finetune(make(), dataset, out=tmp_path, **OPTIONS)
    monkeypatch.setattr(memory, "memory_left", lambda: 1e3)
    with pytest.raises(ValueError, match="What would fit: stage.method=lora, world_model.weights=bf16"):
        finetune(make(), dataset, out=tmp_path, **OPTIONS)


def test_what_is_known_before_is_said_before_anything_is_encoded(make, dataset, tmp_path):
    for options, words in (
        ({"sharding": "zero"}, "sharding is 'zero'"), ({"tracker": "paper"}, "tracker is 'paper'"),
        ({"method": "lora", "decoder_steps": 2}, "decoder_steps is 2, but method=lora writes an adapter alone"),
        ({"accumulate": 5}, "4 rows cannot be cut into 5 parts"), ({"replicas": 6}, "4 rows cannot be cut into 6"),
        ({"lengths": [9, 5], "token_budget": 40, "accumulate": 3}, "2 rows cannot be cut into 3"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            finetune(make(), dataset, out=tmp_path, **OPTIONS, **options)
        assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match="adapters and step_cache are for dreaming; leave them out"):
        finetune(make(step_cache=FirstBlockCacheConfig(threshold=0.1)), dataset, out=tmp_path, **OPTIONS)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match=r"LoRA targets \['to_p'\] name no layer"):
        finetune(make(lora={"targets": ["to_p"]}), dataset, out=tmp_path, method="lora", **OPTIONS)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match="a prompt has 14 tokens, .* text_length is 9.*'put the red block"):
        finetune(make(text_length=9), dataset, out=tmp_path, **OPTIONS)
    assert not (tmp_path / "cache").exists()


def full(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(("method", "words"), [
    ("encode", "encoding 12 clips of 9 frames of 32x48 at a time.*world_model.frames"),
    ("loss", "validating 4 clips at a time at step 3.*stage.accumulate"),
    ("descend", "dreaming samples at step 3, 4 at a time.*stage.samples=0"),
])  # fmt: skip
def test_out_of_memory_beside_the_steps_names_its_setting(make, dataset, tmp_path, monkeypatch, method, words):
    plain = getattr(PrefixWorld, method)
    late = method == "loss"  # of the steps it is said elsewhere
    monkeypatch.setattr(PrefixWorld, method, lambda *a, **k: plain(*a, **k) if late and torch.is_grad_enabled()
                        else full())  # fmt: skip
    with pytest.raises(ValueError, match=f"out of memory {words}"):
        finetune(make(), dataset, out=tmp_path, **OPTIONS)


def test_shapes_that_the_vae_cannot_take_are_said(make, dataset, tmp_path):
    with pytest.raises(ValueError, match=r"clips of 8 frames of 32x48; .* takes 1 \+ a multiple of 4 frames"):
        finetune(make(), dataset, out=tmp_path, lengths=[8], **OPTIONS)


def test_parts_of_a_cache_are_built_by_several(tmp_path):
    cache = Cache(tmp_path, {"a": 1}, count=7, size=2)
    for part in (1, 0, 2):
        list(cache.build(lambda items: np.array([[k] for k in items]), part, 3))
        assert cache.missing() or part == 2
    assert cache.take(np.arange(7)).ravel().tolist() == list(range(7))
    require_known(tmp_path, [{"a": 1}])
    require_known(tmp_path / "empty", [{"a": 2}])
    with pytest.raises(ValueError, match=r"other content \(a: 1 -> 2\)"):
        require_known(tmp_path, [{"a": 2}])


def test_texts_are_kept_one_by_one_without_what_is_behind_their_end(tmp_path):
    made = torch.zeros(3, 6, 4)
    made[0, :2], made[1, :6], made[2, 3] = 1.0, 2.0, 3.0
    calls = []

    def read(texts):
        for text in texts:
            if text == "c" and len(calls) < 3:
                raise KeyboardInterrupt
            calls.append(text)
            yield made["abc".index(text)]

    with pytest.raises(KeyboardInterrupt):
        Embeddings(tmp_path, "encoder", ["a", "b", "c"], read)
    calls.append("again")
    for _ in range(2):
        found = Embeddings(tmp_path, "encoder", ["a", "b", "c"], read)
        assert torch.equal(found.take(np.array([2, 0, 1, 2])), made[[2, 0, 1, 2]]) and (len(found), found.length) == (
            3,
            6,
        )
    assert calls == ["a", "b", "again", "c"]
    assert [len(load_file(file)["rows"]) for file in found.files] == [2, 6, 4]


def test_a_cached_text_is_that_of_what_the_encoder_reads(make, dataset, tmp_path, monkeypatch, capsys):
    """What lies under a prompt with dirty characters was embedded with them, and is not taken."""
    world = make()
    latents = Latents(world, ClipPool([dataset], world.clock), tmp_path, transform={})
    clean, _ = latents.texts(tmp_path, base="b", first=True)
    assert "read texts: 100%" in capsys.readouterr().err
    stale = torch.full_like(clean.take([0])[0], 9.0)
    key = {"base": "b", "length": world.text_length, "dtype": str(world.transformer.dtype)}
    dirty = ["open\u00a0 it", "red &amp;amp; blue"]
    list(Embeddings(tmp_path, key, dirty, lambda texts: iter([stale] * len(texts))).files)
    monkeypatch.setattr(latents, "prompts", dirty)
    monkeypatch.setattr(latents.pool, "instruction", lambda k: dirty[k % 2])
    found, _ = latents.texts(tmp_path, base="b", first=True)
    assert found.files[0] == clean.files[0] and found.files[1] != clean.files[1]
    assert torch.equal(found.take([0]), clean.take([0])) and torch.equal(found.take([0, 1]), world.embed(dirty).cpu())


def test_large_clips_lie_in_small_shards():
    assert [shard_size(shape) for shape in ((81, 480, 832), (81, 704, 1280), (17, 256, 256), (17, 64, 64))] == [
        4,
        4,
        64,
        64,
    ]


def test_figures_of_frames_average_to_those_of_the_video():
    from dreamgen.video.metrics import psnr_by_frame, ssim, ssim_by_frame

    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (3, 16, 24, 3), dtype=np.uint8) for _ in range(2))
    b[1] = a[1]
    assert psnr_by_frame(a, b)[1] == 100 and ssim_by_frame(a, b)[1] == pytest.approx(1)
    assert psnr(a, b) == pytest.approx(psnr_by_frame(a, b).mean())
    assert ssim(a, b) == pytest.approx(np.mean([ssim(a[k : k + 1], b[k : k + 1]) for k in range(3)]), abs=1e-6)


def test_where_validation_is_asked_for_an_episode_is_held_out(caplog):
    def held(episodes: int, count: int) -> int:
        return len(stage._held_out(range(episodes), count, seed=3))

    caplog.set_level("INFO", logger="dreamgen.stages.finetune")
    assert [held(n, 1) for n in (2, 4, 5, 50)] == [1, 1, 1, 1] and held(50, 8) == 8 and held(4, 0) == 0
    assert not caplog.records
    assert held(1, 1) == 0 and held(12, 8) == 2
    assert [record.getMessage() for record in caplog.records] == [
        "validation: 0 of 1 episodes are held out, not 1: at most a fifth",
        "validation: 2 of 12 episodes are held out, not 8: at most a fifth"]  # fmt: skip
    assert stage._held_out(range(40), 3, seed=3) < stage._held_out(range(40), 8, seed=3)
