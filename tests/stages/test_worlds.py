"""Fine-tuning and dreaming on a tiny random world model: both methods, kills, shards, bad requests."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from dreamgen.core.clip import Episode, Prompt, read_prompts
from dreamgen.core.manifest import tree_digest
from dreamgen.data.clips import ClipFolder
from dreamgen.data.lerobot import Dataset
from dreamgen.data.prompts import DatasetPrompts, FolderPrompts
from dreamgen.data.writer import write_dataset
from dreamgen.stages.dream import dream
from dreamgen.stages.finetune import finetune
from dreamgen.worlds.prefix import PrefixWorld
from tests.worlds import zoo
from tests.worlds.conftest import pipeline_folder, tiny_robot  # noqa: F401

TEXTS = ["open the drawer", "put the red block on the plate"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("world") / "demos"
    episodes = []
    for i in range(5):
        rows = 19 if i else 9  # the first is too short for a clip of 17 rows
        video = rng.integers(0, 256, (1, 32, 48, 3), dtype=np.uint8).repeat(rows, 0)
        episodes.append(Episode(
            instruction=TEXTS[i % 2], state=rng.normal(size=(rows, 2)).astype(np.float32),
            action=rng.normal(size=(rows, 3)).astype(np.float32), video={"front": video}, meta={"seed": 7 + i},
        ))  # fmt: skip
    write_dataset(root, episodes, tiny_robot())
    return Dataset(root, tiny_robot())


@pytest.fixture
def make(pipeline_folder):  # noqa: F811
    return partial(PrefixWorld, robot=tiny_robot(), path=str(pipeline_folder), frames=9, steps=2, text_length=15,
                   precision="fp32")  # fmt: skip


OPTIONS = dict(steps=4, batch_size=3, warmup=1, validation=1, samples=1, validate_every=2, record={"a": 1})


@pytest.mark.parametrize("method", ["full", "lora"])
def test_finetune_writes_a_world_model_that_differs_from_its_base(make, dataset, tmp_path, method):
    done = finetune(make(), dataset, out=tmp_path, method=method, rank=2, alpha=4, lr=1e-2, **OPTIONS)
    results = done["results"]
    assert (results["episodes"], results["episodes_too_short"], results["windows"]) == (5, 1, 4 * 3)
    assert not (tmp_path / "training").exists() and list((tmp_path / "samples").glob("*.mp4"))
    prompts = read_prompts(DatasetPrompts(dataset=dataset, episodes=2)())
    base, tuned = make().dream(prompts), PrefixWorld.load(tmp_path).dream(prompts)
    assert any((a.video != b.video).any() for a, b in zip(base, tuned, strict=True))
    again = finetune(make(), dataset, out=tmp_path, method=method, rank=2, alpha=4, lr=1e-2, **OPTIONS)
    assert again["id"] == done["id"]
    with pytest.raises(ValueError, match="another configuration.*a: 1 -> 2"):
        finetune(make(), dataset, out=tmp_path, **{**OPTIONS, "record": {"a": 2}})


def test_the_decoder_learns_the_look_and_latents_stay(make, dataset, tmp_path):
    finetune(make(), dataset, out=tmp_path, decoder_steps=12, decoder_lr=3e-3, **OPTIONS)
    base, tuned = make(), PrefixWorld.load(tmp_path)
    clip = torch.from_numpy(dataset.canvas(1, range(0, 17, 2)))[None]
    assert torch.allclose(base.encode(clip), tuned.encode(clip), atol=1e-5)
    far, near = (((w.decode(w.encode(clip)).float() - clip) ** 2).mean() for w in (base, tuned))
    assert near < far and (tmp_path / "decoder" / "losses.jsonl").is_file()


def test_a_decoder_learns_from_as_many_clips_whatever_shares_them(make, dataset, tmp_path, monkeypatch):
    sizes = []

    def train(model, batch_at, **options):
        sizes.append(len(batch_at(0)["video"]))
        raise KeyboardInterrupt

    options = {**OPTIONS, "batch_size": 5, "decoder_steps": 2}
    with pytest.raises(ValueError, match="decoder_steps is 2; .* 4 clips at a time, which cannot be cut into 5 parts"):
        finetune(make(), dataset, out=tmp_path, replicas=5, **options)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr("dreamgen.stages.finetune.train", train)
    monkeypatch.setattr("dreamgen.stages.latents.in_forks", lambda work, count: work(0))
    for processes, replicas in ((1, 4), (1, 2), (3, 1)):
        monkeypatch.setattr("dreamgen.stages.finetune.join", lambda processes=processes: (0, processes))
        with pytest.raises(KeyboardInterrupt):
            finetune(make(), dataset, out=tmp_path / str(processes), replicas=replicas, **options)
    assert sizes == [4, 4, 4]


def test_a_decoder_that_does_not_fit_names_settings_of_its_own(make, dataset, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("dreamgen.worlds.autoencoder.Autoencoding.loss", full)
    less = r"decoder, 4 clips a step. Try stage.decoder_steps=0, fewer frames .*smaller views. \(CUDA out of memory\)$"
    with pytest.raises(ValueError, match=f"out of memory training the VAE's {less}"):
        finetune(make(), dataset, out=tmp_path, decoder_steps=2, **OPTIONS)


def test_finetune_killed_and_continued_saves_the_same(make, dataset, tmp_path, monkeypatch):
    finetune(make(), dataset, out=tmp_path / "whole", copies=1, **OPTIONS)
    calls = []
    take = dataset.__class__.views

    def killed(self, *given):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return take(self, *given)

    monkeypatch.setattr(dataset.__class__, "views", killed)
    with pytest.raises(KeyboardInterrupt):
        finetune(make(), dataset, out=tmp_path / "cut", copies=1, **OPTIONS)
    monkeypatch.undo()
    loss = PrefixWorld.loss

    def killed_later(self, batch):
        calls.append(0)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return loss(self, batch)

    monkeypatch.setattr(PrefixWorld, "loss", killed_later)
    with pytest.raises(KeyboardInterrupt):
        finetune(make(), dataset, out=tmp_path / "cut", copies=1, **OPTIONS)
    monkeypatch.undo()
    finetune(make(), dataset, out=tmp_path / "cut", copies=1, **OPTIONS)
    assert tree_digest(tmp_path / "whole" / "model") == tree_digest(tmp_path / "cut" / "model")
    assert not any("_name_or_path" in file.read_text() for file in (tmp_path / "whole" / "model").rglob("*.json"))


def test_three_shards_dream_what_one_dreams(make, dataset, tmp_path):
    prompts = DatasetPrompts(dataset=dataset, episodes=3, every_instruction=True, seed=4)
    one = dream(make(), prompts, out=tmp_path / "one", batch_size=2, record={})
    counts = {"clips": 6, "instructions": 2, "first_frames": 3, "skipped": [], "mended": []}
    assert one["results"] == {**counts, "prompts": one["results"]["prompts"]}
    assert one["parents"] == {"prompts": tree_digest(dataset.root)}
    for shard in (2, 0, 1):
        last = dream(make(), prompts, out=tmp_path / "three", batch_size=2, shard=shard, num_shards=3, record={})
        assert last.get("complete", True) == (shard == 1)
    assert tree_digest(tmp_path / "one" / "clips") == tree_digest(tmp_path / "three" / "clips")
    assert last["id"] == one["id"]
    clips = [ClipFolder(tmp_path / "one" / "clips").read(id) for id in ClipFolder(tmp_path / "one" / "clips").ids()]
    assert {clip.instruction for clip in clips} == set(TEXTS) and len({clip.pair for clip in clips}) == 3
    assert clips[0].origin["seed"] in range(7, 12) and clips[0].state.shape == (2,)


def test_a_lost_clip_is_dreamed_again(make, dataset, tmp_path):
    prompts = DatasetPrompts(dataset=dataset, episodes=3)
    dream(make(), prompts, out=tmp_path / "one", batch_size=2, record={})
    calls = []
    world = make()
    plain = world.denoise

    def killed(group, **options):
        calls.append(group)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(group, **options)

    world.denoise = killed
    with pytest.raises(KeyboardInterrupt):
        dream(world, prompts, out=tmp_path / "two", batch_size=2, record={})
    assert not (tmp_path / "two" / "manifest.json").exists()
    dream(make(), prompts, out=tmp_path / "two", batch_size=2, record={})
    assert tree_digest(tmp_path / "one" / "clips") == tree_digest(tmp_path / "two" / "clips")


def test_first_frames_from_a_folder_of_pictures(make, tmp_path):
    with pytest.raises(ValueError, match="no picture"):
        FolderPrompts(folder=tmp_path, robot=tiny_robot(), instructions=["go"])()
    Image.fromarray(np.full((100, 90, 3), 77, np.uint8)).save(tmp_path / "table.png")
    with pytest.raises(ValueError, match="nothing.*expected text"):
        FolderPrompts(folder=tmp_path, robot=tiny_robot())()
    (tmp_path / "table.txt").write_text("open the drawer\n\nclose the drawer\n")
    made = FolderPrompts(folder=tmp_path, robot=tiny_robot(), repeats=2)()
    assert [p.instruction for p in made] == ["open the drawer"] * 2 + ["close the drawer"] * 2
    assert len({p.seed for p in made}) == 4 and made[0].image.shape == (32, 48, 3) and (made[0].image == 77).all()
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="bad.png cannot be read"):
        FolderPrompts(folder=tmp_path, robot=tiny_robot(), instructions=["go"])()


def test_bad_requests_are_named(make, dataset, tmp_path):
    with pytest.raises(ValueError, match="method is 'half'"):
        finetune(make(), dataset, out=tmp_path / "a", method="half", record={})
    for name, vae in (("ltx_video", "AutoencoderKLLTXVideo"), ("cogvideox_5b_i2v", "AutoencoderKLCogVideoX")):
        world = zoo.world(name, "", pipeline=zoo.build(name))
        with pytest.raises(ValueError, match=f"decoder_steps is 1, but .* has a {vae}; it trains the decoder of an"):
            finetune(world, dataset, out=tmp_path / "a", decoder_steps=1, record={})
    same = [Prompt(id="x", image=np.zeros((32, 48, 3), np.uint8), instruction="go", seed=0)] * 2
    with pytest.raises(ValueError, match="two prompts have the id 'x'"):
        dream(make(), lambda: same, out=tmp_path / "b", record={})
    with pytest.raises(ValueError, match="shard is 3 of 3"):
        dream(make(), lambda: same, out=tmp_path / "c", shard=3, num_shards=3, record={})
    with pytest.raises(ValueError, match="no window of 49 rows fits"):
        finetune(make(frames=25), dataset, out=tmp_path / "d", record={})
    torch.manual_seed(0)
