"""The plan against published anchors, closed forms, and FLOPs and bytes counted another way."""

import warnings
from functools import partial

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from dreamgen.core.clip import Episode
from dreamgen.core.clock import Clock
from dreamgen.data.buckets import ClipPool
from dreamgen.data.lerobot import Dataset
from dreamgen.data.writer import write_dataset
from dreamgen.engine.cost import SAVED, Transformer, lora_parameters, training_memory
from dreamgen.engine.devices import Device, device, table
from dreamgen.stages import plan_vae
from dreamgen.stages.plan import Model, plan
from dreamgen.worlds.adapters import add_lora
from dreamgen.worlds.wan import WanLayout
from tests.worlds import zoo
from tests.worlds.conftest import LAYOUT, pipeline_folder, tiny_robot  # noqa: F401


def made(tmp_path, model, canvas, frames, **options):
    given = {"text_length": 512, "denoising_steps": 50, "guidance": 5.0, "height": canvas[0], "width": canvas[1]}
    return plan(model=model, robot=tiny_robot(), out=tmp_path, frames=frames, record={}, **{**given, **options})


@pytest.fixture
def small(monkeypatch):
    """Autoencoders as large as nothing: it takes seconds to count those of published models."""
    monkeypatch.setattr("dreamgen.stages.plan.vae_memory",
                        lambda *_: {"clips": 1, "weights": 0.0, "encode": 0.0, "decode": 0.0})  # fmt: skip


def test_dreams_cost_what_is_published(tmp_path, monkeypatch, small):
    monkeypatch.setattr(Model, "parameters", lambda self: 5_000_000_000)  # counted in the next test
    small = made(tmp_path, "Wan-AI/Wan2.2-TI2V-5B-Diffusers", (480, 832), 81)
    assert small["dream_flops"] == pytest.approx(9.8e15, rel=0.005) and small["video_tokens"] == 8190
    assert small["dream_seconds_at_peak"] == pytest.approx(9.9, abs=0.05)
    large = made(tmp_path, "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", (480, 832), 81, denoising_steps=40)
    assert large["dream_flops"] == pytest.approx(134e15, rel=0.01)
    assert large["dream_seconds_at_peak"] == pytest.approx(136, abs=1)
    single = made(tmp_path, "Wan-AI/Wan2.2-TI2V-5B-Diffusers", (480, 832), 81, guidance=1.0)
    assert single["dream_flops"] * 2 == small["dream_flops"]


PUBLISHED = {"Wan-AI/Wan2.2-TI2V-5B-Diffusers": 5.0e9, "nvidia/Cosmos-Predict2.5-2B": 2.06e9,
             "Lightricks/LTX-Video": 1.92e9, "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": 16.4e9}  # fmt: skip


@pytest.mark.parametrize("path", PUBLISHED)
def test_parameters_are_those_of_the_published_model(path):
    assert Model.of(path).parameters() == pytest.approx(PUBLISHED[path], rel=0.005)


@pytest.mark.parametrize(("path", "size", "each"), [
    ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", 507_609_880, 4),  # Wan2.1_VAE.pth
    ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", 2_818_839_170, 4),  # Wan2.2_VAE.pth
    ("Lightricks/LTX-Video", 1_676_798_532, 4),  # vae/diffusion_pytorch_model.safetensors
    ("THUDM/CogVideoX-5b-I2V", 431_221_142, 2),
])  # fmt: skip
def test_autoencoders_have_the_weights_of_the_published_files(path, size, each):
    """Bytes of a file on the hub: of the weights and moments, and a header."""
    config = dict(Model.of(path).vae)
    with torch.device("meta"):
        vae = getattr(diffusers, config.pop("_class_name")).from_config(config)
    assert 0 < size - each * sum(value.numel() for value in vae.state_dict().values()) < 100_000


def test_models_that_share_an_autoencoder_share_its_configuration():
    wan = Model.of("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers").vae
    for path in ("Wan-AI/Wan2.2-I2V-A14B-Diffusers", "nvidia/Cosmos-Predict2.5-2B",
                 "nvidia/Cosmos-Predict2-2B-Video2World"):  # fmt: skip
        assert Model.of(path).vae == wan


def transformer():
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=32, in_channels=4,
                                 out_channels=4, text_dim=16, freq_dim=16, ffn_dim=192, num_layers=3,
                                 rope_max_seq_len=64)  # fmt: skip


def run(model, tokens, text):
    x = torch.randn(1, 4, tokens // 4, 4, 4)
    return model(hidden_states=x, timestep=torch.full((1, tokens), 5.0),
                 encoder_hidden_states=torch.randn(1, text, 16), return_dict=False)[0]  # fmt: skip


def test_the_formula_counts_what_torch_counts():
    model = transformer()
    model.set_attention_backend("_native_math")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(model, 48, 7)
    inside = sum(count for name, counts in counter.get_flop_counts().items() if name.count(".") == 2
                 and ".blocks." in name for count in counts.values())  # fmt: skip
    sizes = Transformer.of({**model.config, "_class_name": "WanTransformer3DModel"})
    assert sizes.tokens((12, 4, 4)) == 48
    assert inside == pytest.approx(sizes.forward(48, 7), rel=1e-6)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_block_keeps_the_bytes_that_are_planned(method):
    """Counted by what autograd saves of one more block."""
    kept = []
    for layers in (2, 3):
        model = transformer()
        model.blocks = model.blocks[:layers]
        model.set_attention_backend("native")  # fused: without the map of L x L
        model.requires_grad_(method == "full")
        if method == "lora":
            add_lora(model.to(torch.bfloat16), rank=1, alpha=1, targets=WanLayout.targets)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        found: dict[int, int] = {}
        alive = []

        def pack(t, own=own, found=found, alive=alive):
            alive.append(t)  # so that no address is used twice
            if t.untyped_storage().data_ptr() not in own:
                found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with (
            warnings.catch_warnings(),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
            torch.autocast("cpu", dtype=torch.bfloat16),
        ):
            warnings.simplefilter("ignore")
            run(model, 256, 3)
        kept.append(sum(found.values()))
    wide, deep = SAVED[method]
    assert kept[1] - kept[0] == pytest.approx(256 * (wide * 64 + deep * 192), rel=0.15)


def test_memory_adds_up_and_shards():
    sizes = Transformer(layers=4, width=64, ffn=192)
    options = dict(parameters=1000, trained=1000, video=80, text=9, lora=False, ema=True)
    one = training_memory(sizes, clips=2, checkpointing=False, **options)
    assert (one.weights, one.gradients, one.optimiser) == (4000 + 2000, 4000, 12000)
    assert one.activations == 2 * 4 * 80 * (100 * 64 + 4 * 192)
    less = training_memory(sizes, clips=2, checkpointing=True, shards=4, **options)
    plain = training_memory(sizes, clips=2, checkpointing=False, shards=4, **options)
    assert plain.weights == 1000 + 2000  # products keep their bf16 weights for the backward pass
    assert less.weights == 1000 and less.activations == 2 * 80 * (100 * 64 + 4 * 192 + 4 * 64 * 4)
    assert sizes.step(80, 9, lora=False) == 3 * sizes.forward(80, 9)
    assert sizes.step(80, 9, lora=True, checkpointing=True) == 3 * sizes.forward(80, 9)


def test_an_adapter_has_the_weights_that_are_planned():
    model = transformer()
    add_lora(model.requires_grad_(False), rank=5, alpha=5, targets=WanLayout.targets)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == lora_parameters(Transformer.of({**model.config, "_class_name": "Wan"}), 5)


def test_a_plan_of_a_folder_counts_its_dataset(pipeline_folder, tmp_path):  # noqa: F811
    data = recorded(tmp_path / "data", [9, 29, 19])
    planned = partial(plan, model=str(pipeline_folder), robot=tiny_robot(), out=tmp_path / "plan", hop=2, steps=10,
                      dataset=data.root, gpu="cpu", record={})  # fmt: skip
    found = planned(frames=9, batch_size=4)
    assert found["windows"] == 7 + 2 and found["epochs"] == pytest.approx(40 / 9)
    assert found["video_tokens"] == 3 * 2 * 3 and 0 < found["dreams_an_hour"]
    assert found["latent_cache_bytes"] == 4 * 9 * LAYOUT.z_dim * 3 * 4 * 6  # fp32 latents (c 3 4 6) of nine clips
    assert (found["encoded_frames"], found["recorded_frames"]) == (9 * 9, 57)
    assert "81 frames, 1.42 for each one recorded (stage.hop=2)" in found["text"]
    check = 32 * found["forward_flops"] + 4 * found["dream_flops"]  # once, at the end
    assert found["validation_seconds"] / found["dream_seconds"] == pytest.approx(check / found["dream_flops"])
    assert found["validation_gpu_hours"] == pytest.approx(found["validation_seconds"] / 3600)
    assert "9 clips, 4.44 epochs" in found["text"] and (tmp_path / "plan" / "plan.json").is_file()
    assert found["dreams"] == 1000 and "for 1000 (stage.dreams; how many there will be is not known)" in found["text"]
    best = planned(frames=9, batch_size=4, dreaming={"steps": 7, "guidance": 1.0, "best_of": 3}, dreams=6)
    assert best["dream_flops"] == 3 * 7 * best["forward_flops"] and "of 7 steps, the best of 3: " in best["text"]
    assert best["validation_seconds"] == found["validation_seconds"]  # its samples are the world model's own
    assert best["dream_gpu_hours"] * 3600 == pytest.approx(6 * best["dream_seconds"])
    other = planned(frames=5, lengths=[9], token_budget=4 * 18 + 17, copies=2)
    pool = ClipPool([data], Clock(robot_hz=20, video_hz=10, frames=9), hop=2, copies=2, shift=1)
    assert other["windows"] == len(pool) == 3 * 9 and other["step_flops"] == found["step_flops"]


def recorded(root, lengths) -> Dataset:
    write_dataset(root, [
        Episode(instruction="go", state=np.zeros((rows, 2), np.float32), action=np.zeros((rows, 3), np.float32),
                video={"front": np.zeros((rows, 32, 48, 3), np.uint8)}, meta={}) for rows in lengths
    ], tiny_robot())  # fmt: skip
    return Dataset(root, tiny_robot())


def test_episodes_may_be_shorter_than_a_clip_on_average(tmp_path, small):
    data = recorded(tmp_path / "data", [8, 8, 40])
    assert made(tmp_path, "tiny", (64, 64), 17, dataset=data.root)["windows"] == 40 - 33 + 1
    with pytest.raises(ValueError, match="no window of 49 rows fits: 3 episodes, the longest has 40 rows"):
        made(tmp_path, "tiny", (64, 64), 25, dataset=data.root)


@pytest.mark.parametrize("name", zoo.WORLDS)
def test_a_folder_is_planned_as_the_world_model_reads_it(name, tmp_path):
    folder = zoo.save(name, tmp_path / name)
    world, found = zoo.world(name, folder), Model.of(str(folder))
    assert found.scale == world.layout.scale and found.experts == len(world.layout.experts)
    clip = torch.zeros(1, zoo.FRAMES, *zoo.sizes(name), 3, dtype=torch.uint8)
    assert found.planes(world.latent_shape[1:]) == world.encode(clip).shape[1]


def test_latents_of_channel_models_hold_their_condition():
    cells = (21, 60, 104)  # 81 frames of 480x832
    wan = Model.of("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers")
    assert wan.planes(cells) == 16 + 16 + 3  # 257 tokens of 1280 fill 2.5 planes
    assert Model.of("Wan-AI/Wan2.2-I2V-A14B-Diffusers").planes(cells) == 32
    assert Model.of("THUDM/CogVideoX-5b-I2V").planes((13, 60, 90)) == 16 + 2


def test_adapter_and_expert_are_those_of_the_world_model(tmp_path, monkeypatch, small):
    monkeypatch.setattr(Model, "parameters", lambda self: 14_000_000_000)
    options = dict(model="Wan-AI/Wan2.2-I2V-A14B-Diffusers", canvas=(480, 832), frames=81, method="lora")
    four = made(tmp_path, **options, lora={"rank": 4, "alpha": 4})["trained_parameters"]
    assert made(tmp_path, **options)["trained_parameters"] == 4 * four  # 16
    assert made(tmp_path, **options, lora={"rank": 4}, rank=8)["trained_parameters"] == 2 * four
    assert made(tmp_path, **options, lora={"rank": 4}, expert="low")["trained_parameters"] * 2 == four
    full = made(tmp_path, **{**options, "method": "full"}, expert="high")
    assert (full["parameters"], full["trained_parameters"]) == (28_000_000_000, 14_000_000_000)


def measured(work, given) -> int:
    """Bytes that the allocator gave out at most, by its own record."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work(given)
    now = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


WIDTHS = ("base_dim", "block_out_channels", "decoder_block_out_channels")


@pytest.mark.parametrize("name", ["wan21_i2v_14b", "ltx_video", "cogvideox_5b_i2v"])
def test_an_autoencoder_holds_what_is_planned(name, monkeypatch):
    """The allocator's own record is larger by what convolutions hold in themselves on a CPU, up to a quarter here; of
    fewer channels than fill its vectors it is more."""
    tiny = zoo.build(name).vae
    widths = {key: 4 * value if isinstance(value, int) else tuple(4 * each for each in value)
              for key, value in tiny.config.items() if key in WIDTHS}  # fmt: skip
    vae = type(tiny).from_config({**tiny.config, **widths}).eval()
    monkeypatch.setattr(plan_vae, "clips_at_once", lambda *_: 2)
    clip = torch.rand(2, 3, 17 if name == "ltx_video" else 9, 64, 96)
    with torch.no_grad():
        z = vae.encode(clip).latent_dist.mode()
    config = {**vae.config, "_class_name": type(vae).__name__}
    found = plan_vae.vae_memory(config, z.shape[1:], (clip.shape[2], 64, 96))
    assert found["weights"] == sum(p.numel() * 4 for p in vae.parameters()) and found["clips"] == 2
    for key, work, given in (("encode", lambda x: vae.encode(x).latent_dist.mode(), clip),
                             ("decode", lambda z: vae.decode(z).sample, z)):  # fmt: skip
        assert 0.99 < (measured(work, given) + given.nbytes) / found[key] < 1.35


@pytest.mark.slow
def test_a_long_clip_is_followed_from_shorter_ones():
    """What encoding holds grows by turns, from the fifth latent frame on."""
    config = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "attn_scales": [],
              "temperal_downsample": [True]}  # fmt: skip
    with torch.device("meta"):
        vae = AutoencoderKLWan(**config, latents_mean=[0.0] * 4, latents_std=[1.0] * 4).eval()
    asked = []

    def encode(count):
        asked.append(count)
        return plan_vae._most(lambda x: vae.encode(x).latent_dist.mode(), (1, 3, (count - 1) * 2 + 1, 16, 24))

    followed = plan_vae._extended(encode, 9)
    assert asked == [5, 7] and followed == encode(9)


@pytest.mark.slow
def test_autoencoders_that_are_published(tmp_path, monkeypatch):
    monkeypatch.setattr(Model, "parameters", lambda self: 5_000_000_000)
    options = dict(model="Wan-AI/Wan2.2-TI2V-5B-Diffusers", canvas=(480, 832), frames=81, weights="bf16")
    found = made(tmp_path, **options)
    assert found["vae_memory"]["weights"] == pytest.approx(2.82e9, rel=1e-3) and found["dream_fits"]
    assert "3.65 GB to encode, 8.99 GB to decode 1 clips at a time, beside 2.82 GB of weights" in found["text"]
    assert not made(tmp_path, **{**options, "weights": "fp32"}, gpu="rtx_4090")["dream_fits"]
    wan = plan_vae.vae_memory(Model.of("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers").vae, (16, 2, 6, 10), (5, 48, 80))
    assert wan["weights"] == pytest.approx(0.508e9, rel=1e-3)


def test_bad_plans_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"19 frames of 64x64; tiny takes 1 \+ a multiple of 4"):
        made(tmp_path, "tiny", (64, 64), 19)
    with pytest.raises(ValueError, match="learned positions, for 49 frames of 480x720 alone"):
        made(tmp_path, "THUDM/CogVideoX-5b-I2V", (480, 832), 49)
    with pytest.raises(ValueError, match="expert is 'low'; expected 'both' or, for a model of two"):
        made(tmp_path, "tiny", (64, 64), 17, expert="low")
    with pytest.raises(ValueError, match="16 rows cannot be cut into 17 parts"):
        made(tmp_path, "tiny", (64, 64), 17, gpus=17)
    with pytest.raises(ValueError, match=r"lengths is \[17, 9\]; .* of one length: give stage.lengths=\[n\]"):
        made(tmp_path, "tiny", (64, 64), 17, lengths=[17, 9])
    with pytest.raises(ValueError, match="token_budget is 9; one clip has 144 tokens"):
        made(tmp_path, "tiny", (64, 64), 17, token_budget=9)
    with pytest.raises(ValueError, match="gpu is 'h300'; expected one of h200"):
        device("h300")
    monkeypatch.setattr("dreamgen.stages.plan.device", lambda name: Device(name="NVIDIA B200", bf16=0.0, memory=1e9))
    with pytest.raises(ValueError, match="NVIDIA B200, whose peak is not known; name one like it as stage.gpu: h200"):
        made(tmp_path, "tiny", (64, 64), 17, gpu="here")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="no published one is known; known are Wan-AI"):
        made(tmp_path, "somebody/else", (480, 832), 81)
    with pytest.raises(ValueError, match="82 frames of 480x832; .* takes 1 . a multiple of 4"):
        made(tmp_path, "Wan-AI/Wan2.2-TI2V-5B-Diffusers", (480, 832), 82)
    with pytest.raises(ValueError, match="method is 'half'"):
        made(tmp_path, "tiny", (64, 64), 17, method="half")
    assert {"h100", "a100", "l40s", "rtx_4090"} <= set(table())
