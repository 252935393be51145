"""What dreaming can be told: guidance in two passes, step caches, stacked adapters, windows, views, and its errors."""

import json
from functools import partial
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dreamgen.core.clip import Prompt
from dreamgen.video.tiling import describe, tile, untile
from dreamgen.worlds.cogvideox import CogVideoXWorld
from dreamgen.worlds.cosmos import Unguarded
from dreamgen.worlds.ltx import LtxWorld
from dreamgen.worlds.sampler import Sampler, capacity
from tests.worlds import zoo
from tests.worlds.test_models import apart, prompts

NAME = "wan22_ti2v_5b"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return zoo.save(NAME, tmp_path_factory.mktemp("sampler") / "toy")


@pytest.fixture(scope="module")
def make(folder):
    return partial(zoo.world, NAME, folder)


@pytest.fixture(scope="module")
def plain(make):
    """The clips without any of it."""
    return [clip.video for clip in make().dream(prompts(NAME, 2))]


def test_two_passes_are_the_batched_one(make, plain):
    world = make(guidance_mode="two_pass")
    rows, forward = [], world.transformer.forward
    world.transformer.forward = lambda **given: rows.append(len(given["hidden_states"])) or forward(**given)
    assert all(apart(a.video, b) <= 1 for a, b in zip(world.dream(prompts(NAME, 2)), plain, strict=True))
    assert rows == [2] * 6  # three steps, twice


def test_guidance_within_an_interval_of_noise_levels(make, plain):
    def dreamt(**settings):
        world = make(**settings)
        rows, forward = [], world.transformer.forward
        world.transformer.forward = lambda **given: rows.append(len(given["hidden_states"])) or forward(**given)
        return rows, [clip.video for clip in world.dream(prompts(NAME, 2))]

    world = make()
    times = world.layout.schedule(world.steps, world.latent_shape, world.device)[1]
    levels = [float(time) / world.layout.process(world.latent_shape).unit for time in times]
    assert len(levels) == 3 and 1 >= levels[0] > levels[1] > levels[2] > 0.01
    rows, everywhere = dreamt(guidance_interval=[0.0, 1.0])
    assert rows == [4] * 3 and np.array_equal(everywhere, plain)
    rows, upper = dreamt(guidance_interval=[levels[1], 1.0])
    assert rows == [4, 4, 2] and not np.array_equal(upper, plain)
    assert not np.array_equal(upper, dreamt(guidance=1.0)[1])
    assert dreamt(guidance_interval=[levels[1], 1.0], guidance_mode="two_pass")[0] == [2] * 5
    with pytest.raises(ValueError, match=r"guidance_interval is \[0.5, 0.5\]; expected the lowest"):
        make(guidance_interval=[0.5, 0.5])
    with pytest.raises(ValueError, match="guidance_interval leaves out predictions from which step_cache"):
        make(guidance_interval=[0.5, 1.0], step_cache=diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"guidance_interval is \[0.5, 1.0\], but guidance is 1.0, which is none"):
        make(guidance_interval=[0.5, 1.0], guidance=1.0)
    with pytest.raises(ValueError, match=rf"none of the 3 steps lies there: their noise levels are {levels[0]:.3g}, "):
        make(guidance_interval=[0.0, 0.01])


def test_auto_goes_by_memory(make, monkeypatch):
    world = make()
    given, text = torch.zeros(2, 4, 1, 2, 4), torch.zeros(2, 18, 16)
    assert world.sampler._holds(text, given)
    monkeypatch.setattr("dreamgen.worlds.sampler.capacity", lambda layout: 1000)
    assert not world.sampler._holds(text, given)


def test_a_gpu_does_not_hold_the_text_encoder(make, monkeypatch):
    layout, total = make().layout, 10**9
    held = {name: sum(p.numel() * p.element_size() for p in part.parameters())
            for name, part in layout.pipe.components.items() if isinstance(part, torch.nn.Module)}  # fmt: skip
    monkeypatch.setattr("dreamgen.worlds.sampler.best_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=total))
    assert capacity(layout) == int(0.9 * total) - sum(held.values()) + held["text_encoder"] and held["text_encoder"]


@pytest.mark.parametrize("mode", ["batched", "two_pass"])
def test_a_first_block_cache_skips_blocks(make, plain, mode):
    counts = []
    for threshold, wanted in ((1e-9, 6), (1e9, 2)):
        world = make(step_cache=diffusers.FirstBlockCacheConfig(threshold=threshold), guidance_mode=mode)
        last, calls = world.transformer.blocks[-1].ffn, []
        last.register_forward_hook(lambda *_, calls=calls: calls.append(0))
        clips = world.dream(prompts(NAME, 2))
        counts.append(len(calls) * (2 if mode == "batched" else 1) == wanted)
        if wanted == 6:
            assert all(apart(a.video, b) <= 1 for a, b in zip(clips, plain, strict=True))
        else:  # a second dream starts anew
            again = world.dream(prompts(NAME, 2))
            assert all(apart(a.video, b.video) == 0 for a, b in zip(clips, again, strict=True))
    assert counts == [True, True]
    with pytest.raises(ValueError, match="step_cache are for dreaming"):
        world.train_full()


@pytest.mark.parametrize("name", [NAME, "wan21_i2v_14b"])
def test_faster_cache_foretells_the_prediction_without_a_prompt(name, tmp_path):
    folder, runs = zoo.save(name, tmp_path / "toy"), {}
    for skip in (1, 100):
        config = diffusers.FasterCacheConfig(
            spatial_attention_timestep_skip_range=(-1, 0), unconditional_batch_skip_range=skip,
            unconditional_batch_timestep_skip_range=(-1, 2000), low_frequency_weight_callback=lambda _: 1.0,
            high_frequency_weight_callback=lambda _: 1.0, attention_weight_callback=lambda _: 0.5)  # fmt: skip
        world = zoo.world(name, folder, step_cache=config)
        rows = []
        world.transformer.blocks[0].ffn.register_forward_hook(lambda *a, rows=rows: rows.append(len(a[2])))
        runs[skip] = rows, world.dream(prompts(name, 2))
    plain = zoo.world(name, folder).dream(prompts(name, 2))
    assert runs[1][0] == [4, 4, 4] and runs[100][0] == [4, 2, 2]
    assert all(apart(a.video, b.video) <= 1 for a, b in zip(runs[1][1], plain, strict=True))
    assert any(apart(a.video, b.video) > 0 for a, b in zip(runs[100][1], plain, strict=True))
    with pytest.raises(ValueError, match="FasterCacheConfig, which holds .* guidance_mode=two_pass makes two"):
        zoo.world(name, folder, step_cache=config, guidance_mode="two_pass")
    with pytest.raises(ValueError, match="but guidance is off"):
        zoo.world(name, folder, step_cache=config, guidance=1.0)


def test_attention_is_broadcast_over_steps_and_never_from_one_prediction_to_the_other(make, plain, monkeypatch):
    def cache():
        return diffusers.PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2,
                                                         spatial_attention_timestep_skip_range=(0, 2000))  # fmt: skip

    clips = make(step_cache=cache(), guidance_mode="batched").dream(prompts(NAME, 2))
    assert any(apart(a.video, b) > 0 for a, b in zip(clips, plain, strict=True))
    monkeypatch.setattr(Sampler, "_holds", lambda *_: False)  # memory for a batch of one prediction alone
    found = make(step_cache=cache()).dream(prompts(NAME, 2))
    assert all(apart(a.video, b.video) == 0 for a, b in zip(found, clips, strict=True))
    with pytest.raises(
        ValueError, match="PyramidAttentionBroadcastConfig, which holds .* guidance_mode=two_pass makes two"
    ):
        make(step_cache=cache(), guidance_mode="two_pass")


def test_a_cache_that_counts_steps_counts_those_that_are_taken(make, tmp_path):
    counting = partial(diffusers.MagCacheConfig, mag_ratios=[1.0] * 3)
    clips = make(step_cache=counting(num_inference_steps=3)).dream(prompts(NAME, 2))
    assert len(clips[0].video) == zoo.FRAMES
    with pytest.raises(ValueError, match="step_cache.num_inference_steps is 28, steps is 3; a MagCacheConfig goes by"):
        make(step_cache=counting())
    experts = zoo.save("wan22_i2v_a14b", tmp_path / "toy")
    with pytest.raises(ValueError, match="MagCacheConfig, which counts a transformer's steps, but two experts share"):
        zoo.world("wan22_i2v_a14b", experts, step_cache=counting(num_inference_steps=3))


def test_adapters_of_others_stack(make, plain, tmp_path):
    for seed, name in enumerate(("task", "few_steps")):
        world = make()
        world.train_lora(rank=2, alpha=2)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in world.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        world.save(tmp_path / name)
    task, few = (str(tmp_path / name / "adapter") for name in ("task", "few_steps"))

    def dreamt(**settings) -> np.ndarray:
        return make(**settings).dream(prompts(NAME, 2))[0].video

    alone = dreamt(adapter=task)
    both = dreamt(adapter=task, adapters=[{"path": few, "weight": 0.7}])
    with pytest.raises(ValueError, match="adapters and step_cache are for dreaming"):
        make(adapter=task).train_lora()
    assert apart(alone, plain[0]) > 2 and apart(both, alone) > 2
    assert apart(dreamt(adapters=[{"path": task}, {"path": few, "weight": 0.0}]), alone) <= 1
    with pytest.raises(ValueError, match="expected a path and any of"):
        make(adapters=[{"path": task, "scale": 1}])
    other = {f"transformer.other.0.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
    save_file(other, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match="adapter .* (matches no module|does not fit)"):
        make(adapter=str(tmp_path))
    with pytest.raises(ValueError, match=r"LoRA targets \['to_p'\] name no layer.*to_q"):
        make(lora={"targets": ["to_p", "to_q"]}).train_lora()


def test_windows_go_on_from_the_last_frame(make, plain):
    two, several = make(windows=2), prompts(NAME, 2)
    latents = two.denoise(several)
    assert latents.shape[2] == 2 * two.latent_shape[1]
    clips = two.clips(several, latents)
    assert clips[0].video.shape[0] == 2 * zoo.FRAMES - 1
    assert all(apart(clip.video[: zoo.FRAMES], b) <= 1 for clip, b in zip(clips, plain, strict=True))
    last = [Prompt(id=p.id, image=c.video[zoo.FRAMES - 1], instruction=p.instruction, seed=0)
            for p, c in zip(several, clips, strict=True)]  # fmt: skip
    second = make().dream(last, noise=two.noise(several, 1))
    assert all(apart(clip.video[zoo.FRAMES :], b.video[1:]) <= 1 for clip, b in zip(clips, second, strict=True))
    assert not torch.equal(two.noise(several, 1), two.noise(several))
    longer = torch.from_numpy(clips[0].video)[None]  # of a recording, which is no window and another
    assert torch.equal(two.decode(two.encode(longer)), make().decode(make().encode(longer)))


def test_views_are_named_and_come_back(make):
    robot = zoo.robot(16, 64, ("front", "wrist"))
    assert describe(zoo.robot()) == ""
    world = make(robot=robot, template="{views} {instruction}", text_length=80)
    assert world.prompt("go") == ("The video shows 2 views of one robot: left is the view 'front', right is the view "
                                  "'wrist'. go")  # fmt: skip
    assert make(template="{views} {instruction}").prompt("go") == "go" and world.prompt("") == ""
    rng = np.random.default_rng(1)
    views = {name: rng.integers(0, 256, (16, 32, 3), np.uint8) for name in ("front", "wrist")}
    (clip,) = world.dream([Prompt(id="p", image=tile(robot, views), instruction="open the drawer", seed=1)])
    apiece = untile(robot, clip.video)
    assert {name: video.shape for name, video in apiece.items()} == {n: (zoo.FRAMES, 16, 32, 3) for n in views}
    assert np.array_equal(tile(robot, apiece), clip.video)


def test_negative_prompts_matter(make, plain):
    assert apart(make(negative_prompt="close the drawer").dream(prompts(NAME, 2))[0].video, plain[0]) > 0


def test_compiled_are_the_repeated_blocks_alone(make):
    world = make(compile=True)
    compiled = [m for m in world.transformer.modules() if m._compiled_call_impl is not None]
    assert compiled == list(world.transformer.blocks)


def test_bad_requests_are_named_before_the_first_step(make, folder, tmp_path, monkeypatch):
    for settings, words in (
        ({"guidance_mode": "twice"}, "guidance_mode is 'twice'"), ({"weights": "int3"}, "weights is 'int3'"),
        ({"attention_backend": "none_such"}, "attention_backend is 'none_such'"), ({"windows": 0}, "windows is 0"),
        ({"frames": 10}, "frames is 10.*9 or 13"), ({"robot": zoo.robot(16, 24)}, "16x24.*multiples of 16"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            make(**settings)
    with pytest.raises(ValueError, match="WanImageToVideoPipeline.*takes LTXImageToVideoPipeline"):
        LtxWorld(robot=zoo.robot(), path=str(folder))
    with pytest.raises(ValueError, match="wan22_ti2v_5b"):
        zoo.world("wan21_i2v_14b", folder)
    with pytest.raises(ValueError, match="text_length is 256, .*by that these are 512: .*Set text_length=512"):
        zoo.world("wan21_i2v_14b", "", pipeline=zoo.build("wan21_i2v_14b"), text_length=256)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "SkyReelsPipeline"}))
    with pytest.raises(ValueError, match="SkyReelsPipeline; this world model takes"):
        make(path=str(tmp_path))
    with pytest.raises(ValueError, match="learned positions, for 16x32 with 9 frames"):
        CogVideoXWorld(robot=zoo.robot(32, 32), pipeline=zoo.build("cogvideox_5b_i2v"), frames=zoo.FRAMES)
    newer = zoo.build("cogvideox_5b_i2v")
    newer.vae.register_to_config(invert_scale_latents=True)
    with pytest.raises(ValueError, match="CogVideoX1.5, which groups frames and scales the first picture's latents"):
        CogVideoXWorld(robot=zoo.robot(), pipeline=newer, frames=zoo.FRAMES)
    world = make()

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(world, "predict", full)
    less = "stage.batch_size=1, or stage.world_model.guidance_mode=two_pass, or stage.world_model.weights=bf16"
    with pytest.raises(ValueError, match=f"out of memory with 2 clips of 9 frames at 16x32.*{less}"):
        world.dream(prompts(NAME, 2))
    with pytest.raises(ValueError, match="stage.world_model.frames=5 with stage.world_model.windows=2"):
        world.dream(prompts(NAME, 1))


def test_cosmos_asks_for_its_guardrail(tmp_path):
    pipe = zoo.build("cosmos_predict2_2b")
    world = zoo.WORLDS["cosmos_predict2_2b"](robot=zoo.robot(), pipeline=pipe, frames=zoo.FRAMES)
    pipe.safety_checker.check_text_safety = lambda text: "knife" not in text
    with pytest.raises(ValueError, match="refuses the prompt 'take the knife'"):
        world.embed(["take the knife"])
    with pytest.raises(ValueError, match="cosmos_guardrail"):
        zoo.world("cosmos_predict2_2b", tmp_path, guardrail=True)


class Guard:
    """As NVIDIA's: an empty prompt is unsafe, and a video that is blocked becomes nothing."""

    def __init__(self) -> None:
        self.devices, self.blocked = [], False

    def to(self, device):
        self.devices.append(device)

    def check_text_safety(self, text):
        assert self.devices  # it is an LLM: not on the CPU where there is a GPU
        return bool(text)

    def check_video_safety(self, frames):
        return None if self.blocked else frames[:, :, ::-1].copy()


def test_the_guardrail_is_asked_of_prompts_alone_and_may_block_a_video():
    pipe, guard = zoo.build("cosmos_predict2_2b"), Guard()
    pipe.safety_checker = guard
    world = zoo.WORLDS["cosmos_predict2_2b"](robot=zoo.robot(), pipeline=pipe, frames=zoo.FRAMES, steps=1)
    assert world.prompts([""]) == [""] and not guard.devices
    assert world.prompts(["open it", ""]) == ["open it", ""]
    given = prompts("cosmos_predict2_2b", 2)
    seen = world.dream(given)[1].video
    guard.blocked = True
    remedy = "take another seed or instruction, or set world_model.guardrail=false"
    with pytest.raises(ValueError, match=f"refuses the video of clip 'p0'; {remedy}"):
        world.dream(given)
    with pytest.raises(ValueError, match="refuses the video of clip 1 of 2;"):
        world.decode(world.denoise(given))
    pipe.safety_checker = Unguarded()
    assert np.array_equal(seen, world.dream(given)[1].video[:, :, ::-1])
