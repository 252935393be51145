"""Every model: parameters of the published one, and a tiny random pipeline against the stock one and closed forms."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.transformers import transformer_cosmos
from PIL import Image

from dreamgen.core.clip import Prompt
from dreamgen.core.manifest import read_json
from dreamgen.engine.train import train
from dreamgen.worlds.cosmos import Unguarded
from dreamgen.worlds.flow import Flow
from dreamgen.worlds.world import VideoWorld
from tests.engine.test_processes import forked
from tests.worlds import zoo

PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text())
NAMES = list(zoo.WORLDS)


def prompts(name: str, count: int) -> list[Prompt]:
    rng = np.random.default_rng(5)
    return [
        Prompt(id=f"p{i}", image=rng.integers(0, 256, (*zoo.sizes(name), 3), np.uint8), instruction=zoo.TEXTS[i % 3],
               seed=40 + i)
        for i in range(count)
    ]  # fmt: skip


def apart(a: np.ndarray, b: np.ndarray) -> int:
    """The largest difference of two videos, in 255ths."""
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("zoo")
    return {name: zoo.save(name, root / name) for name in NAMES}


@pytest.fixture(scope="module")
def worlds(folders) -> dict[str, VideoWorld]:
    return {name: zoo.world(name, folders[name]) for name in NAMES}


@pytest.fixture
def resizing(monkeypatch):
    """The one function that stock Cosmos borrows from torchvision, which is not installed everywhere."""

    class Transforms:
        InterpolationMode = type("InterpolationMode", (), {"NEAREST": "nearest"})

        class functional:
            @staticmethod
            def resize(mask, size, interpolation):
                return torch.nn.functional.interpolate(mask, size, mode=interpolation)

    monkeypatch.setattr(transformer_cosmos, "transforms", Transforms, raising=False)


def stock(world: VideoWorld, folder: Path):
    given = {"safety_checker": Unguarded()} if "osmos" in type(world).__name__ else {}
    pipe = world.kind.pipeline.from_pretrained(folder, **given)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def require_same(name: str, pipe, world: VideoWorld, prompt: Prompt) -> None:
    """The stock pipeline, in its own words, makes our clip of the same noise, within one 255th.

    Stock Cosmos leaves some thousandths of noise on the given frame, ours is clean: there the other latents are
    compared.
    """
    (height, width), noise = zoo.sizes(name), world.noise([prompt])
    given = {"image": Image.fromarray(prompt.image), "latents": noise}
    picture = torch.from_numpy(prompt.image)[None, None]
    if name == "ltx_video":  # given latents are taken as they are: packed, with the clean frame in place
        x = torch.cat([world.encode(picture), noise[:, :, 1:]], 2)
        given |= {"latents": pipe._pack_latents(x), "frame_rate": 10}
    elif name == "cosmos_predict25_2b":
        video = picture.movedim(-1, 1).float() / 127.5 - 1
        given |= {"image": None, "video": video, "num_latent_conditional_frames": 1}
    elif name == "cosmos_predict2_2b":
        given |= {"fps": 10}
    elif name == "cogvideox_5b_i2v":
        given |= {"latents": noise.transpose(1, 2)}
    kind = "latent" if name.startswith("cosmos") else "np"
    found = pipe(prompt=prompt.instruction, negative_prompt="", height=height, width=width, num_frames=zoo.FRAMES,
                 num_inference_steps=world.steps, guidance_scale=world.guidance, max_sequence_length=zoo.length(name),
                 output_type=kind, **given).frames[0]  # fmt: skip
    if kind == "latent":
        assert torch.allclose(found[:, 1:], world.denoise([prompt])[0, :, 1:], atol=2e-3)
        assert found[:, 1:].std() > 0.3
    else:
        assert apart((np.asarray(found) * 255).round().astype(np.uint8), world.dream([prompt])[0].video) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_the_published_transformer_has_the_published_parameters_and_our_lora_targets(name):
    entry = PUBLISHED[name]
    with torch.device("meta"):
        transformer = getattr(diffusers, entry["class"])(**entry["config"])
    count = sum(parameter.numel() for parameter in transformer.parameters()) / 1e9
    assert round(count, len(str(entry["billions"]).split(".")[1])) == entry["billions"]
    layers = [module for module, layer in transformer.named_modules() if isinstance(layer, torch.nn.Linear)]
    for target in zoo.WORLDS[name].kind.targets:
        assert sum(layer.endswith(f".{target}") for layer in layers) >= entry["config"]["num_layers"], target


@pytest.mark.parametrize("name", NAMES)
def test_one_clip_equals_the_stock_pipeline_and_a_batch_equals_its_singles(name, worlds, folders, resizing):
    world, several = worlds[name], prompts(name, 3)
    together = [clip.video for clip in world.dream(several)]
    assert together[0].shape == (zoo.FRAMES, *zoo.sizes(name), 3) and apart(together[0], together[1]) > 2
    assert apart(world.dream(several[1:2])[0].video, together[1]) <= 1
    require_same(name, stock(world, folders[name]), world, several[0])


def test_wan_cleans_a_prompt_as_the_stock_pipeline_does(worlds, folders):
    world, texts = worlds["wan22_ti2v_5b"], ["put John\u2019s  cup &amp;amp; plate", "open the drawer\n"]
    wanted = stock(world, folders["wan22_ti2v_5b"]).encode_prompt(texts, False, max_sequence_length=zoo.LENGTH)[0]
    assert torch.allclose(world.embed(texts), wanted, atol=1e-5)
    plain = world.embed(["put John's cup & plate", "open the drawer"])
    assert torch.equal(world.embed(texts), plain)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_that_would_be_cut_is_named(name, worlds):
    world, least = worlds[name], 76 - 8 if name == "cosmos_predict25_2b" else 0
    assert world.layout.count("close the drawer") == least + 8
    limit = zoo.length(name)
    times = (limit - least) // 7 + 1
    long, count = "close the drawer " * times, least + 7 * times + 1
    with pytest.raises(ValueError, match=f"a prompt has {count} tokens, .*text_length is {limit}.* '{long.strip()}'"):
        world.embed(["open the drawer", long])


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_changes_the_output_here_and_in_stock_diffusers(name, worlds, folders, tmp_path, resizing):
    (prompt,), world = prompts(name, 1), zoo.world(name, folders[name])
    world.train_lora(rank=3, alpha=6)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in world.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    after = world.dream([prompt])[0].video
    assert apart(worlds[name].dream([prompt])[0].video, after) > 2
    world.save(tmp_path)
    extra = {"guardrail": False} if name.startswith("cosmos") else {}
    again = zoo.WORLDS[name].load(tmp_path, **extra)
    assert again.path == str(folders[name]) and apart(again.dream([prompt])[0].video, after) <= 1
    assert again.fingerprint() != worlds[name].fingerprint()
    pipe = stock(world, folders[name])
    if hasattr(pipe, "load_lora_weights"):
        pipe.load_lora_weights(tmp_path / "adapter")
    else:
        pipe.transformer.load_lora_adapter(tmp_path / "adapter", prefix=None, use_safetensors=True)
    if name == "wan22_i2v_a14b":
        pipe.load_lora_weights(tmp_path / "adapter" / "transformer_2", load_into_transformer_2=True)
    require_same(name, pipe, world, prompt)


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_zero_at_the_true_prediction_and_sampling_it_returns_the_clip(name, worlds, monkeypatch):
    world, several = worlds[name], prompts(name, 2)
    torch.manual_seed(1)
    clip, noise = torch.randn(2, *world.latent_shape), torch.randn(2, *world.latent_shape)
    process, sigma = world.layout.process(world.latent_shape), torch.tensor([0.3, 0.8])
    text = world.embed([prompt.instruction for prompt in several])
    target = process.target(clip, noise, sigma)
    monkeypatch.setattr(world, "predict", lambda x, given, time, text: target)
    latents = torch.cat([clip, torch.zeros(2, 3, *world.latent_shape[1:])], 1) if world.start == 0 else clip
    batch = {"latents": latents, "noise": torch.cat([noise, noise], 1), "sigma": sigma, "text": text}
    assert world.loss(batch)[0] == 0

    def true(x, given, time, text):
        if isinstance(process, Flow):
            return (x - clip) / (time.view(-1, 1, 1, 1, 1) / process.unit)
        alpha = process.alphas[time.long()].view(-1, 1, 1, 1, 1)
        noise = (x - alpha.sqrt() * clip) / (1 - alpha).sqrt()
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * clip

    monkeypatch.setattr(world, "predict", true)
    monkeypatch.setattr(world, "guidance", 1.0)
    found = world.denoise(several)
    # Predict2's schedule ends at a noise level of .002, not at 0; UniPC's times are rounded to a thousandth
    close = 0.02 if name in ("cosmos_predict2_2b", "wan21_i2v_14b") else 1e-4
    assert torch.allclose(found[:, :, world.start :], clip[:, :, world.start :], atol=close)
    if world.start:
        first = world.encode(torch.from_numpy(np.stack([p.image for p in several]))[:, None])
        assert torch.allclose(found[:, :, :1], first, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_held_in_bf16_is_trained_in_fp32_on_texts_read_before(name, folders, caplog):
    experts = {"expert": "low"} if name == "wan22_i2v_a14b" else {}  # the other one stays in bf16
    world, (prompt,) = zoo.world(name, folders[name], weights="bf16", **experts), prompts(name, 1)
    assert torch.cuda.is_available() or "a model for a GPU" in caplog.text
    text, picture = world.embed([prompt.instruction]), torch.from_numpy(prompt.image)[None, None]
    world.train_full()
    assert text.dtype == torch.bfloat16 and all(part.dtype == torch.float32 for part in world.trained().values())
    clip = picture.repeat(1, zoo.FRAMES, 1, 1, 1)
    world.loss({"latents": world.encode(clip), "text": text})[0].backward()
    assert all(p.grad.isfinite().all() for p in world.parameters() if p.grad is not None)
    assert world.dream([prompt])[0].video.shape == (zoo.FRAMES, *zoo.sizes(name), 3)  # as validation does


def test_an_adapter_of_one_expert_goes_to_that_expert(folders, tmp_path):
    name, (prompt,) = "wan22_i2v_a14b", prompts("wan22_i2v_a14b", 1)
    clips, weights = {"none": zoo.world(name, folders[name]).dream([prompt])[0].video}, {}
    for expert in ("both", "high", "low"):
        world = zoo.world(name, folders[name], expert=expert)
        world.train_lora(rank=3, alpha=6)
        for key, parameter in world.named_parameters():
            if parameter.requires_grad:
                weights[key] = weights.get(key, torch.randn(parameter.shape) * 0.3)
                parameter.data.copy_(weights[key])
        clips[expert] = world.dream([prompt])[0].video
        world.save(tmp_path / expert)
        again = type(world).load(tmp_path / expert)
        assert apart(again.dream([prompt])[0].video, clips[expert]) <= 1, expert
    assert all(apart(clips[a], clips[b]) > 2 for a in clips for b in clips if a != b)
    for own, other, name in (("high", "low", "transformer_2"), ("low", "high", "transformer")):
        for told in ({}, {"expert": name}):  # one run each, dreamed with together
            entry = {"path": str(tmp_path / other / "adapter"), **told}
            again = type(world).load(tmp_path / own, adapters=[entry])
            assert apart(again.dream([prompt])[0].video, clips["both"]) <= 1, (own, told)


def test_an_adapter_remembers_its_bases_revision(folders, tmp_path):
    world = zoo.world("cosmos_predict25_2b", folders["cosmos_predict25_2b"], revision="one")
    world.train_lora()
    world.save(tmp_path)
    again = type(world).load(tmp_path, guardrail=False)
    assert read_json(tmp_path / "world.json")["revision"] == again.revision == "one"
    world.path, before = "some/model", world.fingerprint()  # on the hub
    names = {world.fingerprint()}
    for revision in ("two", None):
        world.revision = revision
        names.add(world.fingerprint())
    assert len(names) == 3 and before not in names and "some/model" in names


@pytest.mark.parametrize("name", ["wan22_ti2v_5b", "wan21_i2v_14b", "cogvideox_5b_i2v"])
def test_a_vae_is_given_as_many_clips_as_fit(name, worlds, monkeypatch):
    world, rng, sizes = worlds[name], np.random.default_rng(2), []
    clips = torch.from_numpy(rng.integers(0, 256, (5, zoo.FRAMES, *zoo.sizes(name), 3), np.uint8))
    whole, encode = world.encode(clips), world.layout.encode
    monkeypatch.setattr("dreamgen.worlds.autoencoder.PIXELS", 2 * clips[0, ..., 0].numel() + 1)
    monkeypatch.setattr(world.layout, "encode", lambda video: sizes.append(len(video)) or encode(video))
    assert torch.allclose(world.encode(clips), whole, atol=1e-4) and max(sizes) == 2


@pytest.mark.parametrize("sharding", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_experts_are_trained_on_two_processes_as_on_one(sharding, folders, tmp_path):
    name, generator = "wan22_i2v_a14b", torch.Generator().manual_seed(7)
    world = zoo.world(name, folders[name])
    shape = world.latent_shape
    rows = {"latents": torch.randn(3, 2 * shape[0], *shape[1:], generator=generator), "text": world.embed(zoo.TEXTS)}

    def run(out: Path, **options) -> dict[str, torch.Tensor]:
        world = zoo.world(name, folders[name])
        world.train_full()
        train(world, lambda step: rows, out=out, steps=5, lr=1e-3, warmup=1, ema=None, precision="fp32", log_every=1,
              **options)  # fmt: skip
        return world.state_dict()

    def work(rank: int) -> None:
        torch.save(run(tmp_path / "two", sharding=sharding), tmp_path / f"{rank}.pt")

    before, alone = world.state_dict(), run(tmp_path / "one")
    forked(2, work)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert all(torch.allclose(alone[key], found[key], atol=1e-4) for key in alone)
    for expert in ("transformer", "transformer_2"):  # each had steps of its own
        assert not torch.equal(alone[f"{expert}.proj_out.weight"], before[f"{expert}.proj_out.weight"])


def test_times_of_both_experts_are_as_likely_as_ever(worlds):
    world, flow = worlds["wan22_i2v_a14b"], Flow(5.0)
    torch.manual_seed(0)
    assert flow.above(0.9) == pytest.approx(float((flow.draw(20000) >= 0.9).float().mean()), abs=0.01)
    drawn = [world.draw(4, world.latent_shape, torch.device("cpu")) >= 0.9 for _ in range(400)]
    assert all(side.all() or not side.any() for side in drawn)  # a step is one expert's
    assert np.mean([bool(side[0]) for side in drawn]) == pytest.approx(flow.above(0.9), abs=0.07)


def test_two_experts_share_the_times(worlds, folders):
    world = worlds["wan22_i2v_a14b"]
    x, text = torch.randn(2, *world.latent_shape), world.embed(zoo.TEXTS[:2])
    images = torch.from_numpy(np.stack([p.image for p in prompts("wan22_i2v_a14b", 2)]))[:, None]
    given, times = world.condition(images), torch.tensor([950.0, 300.0])
    with torch.no_grad():
        both = world.predict(x, given, times, text)
        for i in (0, 1):
            assert torch.allclose(world.predict(x[i : i + 1], given[i : i + 1], times[i : i + 1], text[i : i + 1]),
                                  both[i : i + 1], atol=1e-5)  # fmt: skip
        wrong = world.predict(x, given, torch.tensor([950.0, 950.0]), text)
        whole = world.predict(x, given, times.long(), text)  # some schedulers count in whole numbers
    assert torch.allclose(wrong[0], both[0], atol=1e-5) and not torch.allclose(wrong[1], both[1], atol=1e-2)
    assert torch.allclose(whole, both, atol=1e-5)
    low = zoo.world("wan22_i2v_a14b", folders["wan22_i2v_a14b"], expert="low")
    assert low.times == (0.0, 0.9) and world.times == (0.0, 1.0)
    assert zoo.world("wan22_i2v_a14b", folders["wan22_i2v_a14b"], expert="high").times == (0.9, 1.0)
    assert (low.draw(200, low.latent_shape, torch.device("cpu")) < 0.9).all()
    low.train_full()
    assert not any(p.requires_grad for p in low.transformer.parameters())
    assert all(p.requires_grad for p in low.transformer_2.parameters())
    with pytest.raises(ValueError, match="expert is 'high-noise'"):
        zoo.world("wan22_i2v_a14b", folders["wan22_i2v_a14b"], expert="high-noise")
