"""The clean-prefix world model against the stock pipeline, closed forms and itself in other batches."""

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image

from dreamgen.core.clip import Prompt
from dreamgen.worlds.flow import noised, velocity
from dreamgen.worlds.prefix import PrefixWorld
from dreamgen.worlds.texts import Texts
from tests.worlds.conftest import tiny_robot


def prompts(count: int) -> list[Prompt]:
    rng = np.random.default_rng(5)
    texts = ["put the red block on the plate", "open the drawer", "close the drawer"]
    return [
        Prompt(id=f"p{i}", image=rng.integers(0, 256, (32, 48, 3), np.uint8), instruction=texts[i % 3], seed=40 + i)
        for i in range(count)
    ]


def test_one_clip_equals_the_stock_pipeline(world, pipeline_folder):
    (prompt,) = prompts(1)
    stock = WanImageToVideoPipeline.from_pretrained(pipeline_folder)
    stock.set_progress_bar_config(disable=True)
    frames = stock(
        image=Image.fromarray(prompt.image), prompt=prompt.instruction, height=32, width=48, num_frames=9,
        num_inference_steps=4, guidance_scale=2.5, latents=world.noise([prompt]), max_sequence_length=15,
        output_type="np",
    ).frames[0]  # fmt: skip
    ours = world.dream([prompt])[0].video
    assert ours.shape == (9, 32, 48, 3)
    assert np.abs(ours.astype(int) - (frames * 255).round().astype(int)).max() <= 1


def test_a_clip_does_not_depend_on_its_batch(world):
    several = prompts(3)
    together = world.dream(several)
    for prompt, clip in zip(several, together, strict=True):
        (alone,) = world.dream([prompt])
        assert alone.id == clip.id == prompt.id
        assert np.abs(alone.video.astype(int) - clip.video.astype(int)).max() <= 1
    backwards = world.dream(several[::-1])
    assert [clip.id for clip in backwards] == ["p2", "p1", "p0"]


def test_instruction_and_seed_matter(world):
    (a,) = prompts(1)
    b = Prompt(id="b", image=a.image, instruction="open the drawer", seed=a.seed)
    c = Prompt(id="c", image=a.image, instruction=a.instruction, seed=a.seed + 1)
    x, y, z = (clip.video.astype(int) for clip in world.dream([a, b, c]))
    assert (x != y).any() and (x != z).any()


def test_loss_is_zero_at_the_true_velocity(world, monkeypatch):
    torch.manual_seed(1)
    latents, noise, sigma = torch.randn(2, 6, 3, 4, 6), torch.randn(2, 6, 3, 4, 6), torch.tensor([0.3, 0.8])
    text = world.embed(["open the drawer", ""])
    batch = {"latents": latents, "noise": noise, "sigma": sigma, "text": text}
    monkeypatch.setattr(world, "predict", lambda x, first, t, text: noise - latents)
    assert world.loss(batch)[0] == 0
    # wrong in the first frame alone: it is given, so it does not count
    wrong = noise - latents
    wrong[:, :, 0] += 7
    monkeypatch.setattr(world, "predict", lambda x, first, t, text: wrong)
    assert world.loss(batch)[0] == 0


def test_sampling_the_true_velocity_returns_the_clip(world, monkeypatch):
    torch.manual_seed(2)
    clip, noise = torch.randn(2, 6, 3, 4, 6), torch.randn(2, 6, 3, 4, 6)
    monkeypatch.setattr(world, "predict", lambda x, given, t, text: velocity(clip, noise))
    monkeypatch.setattr(world, "guidance", 1.0)
    found = world.denoise(prompts(2), noise=noise)
    assert torch.allclose(found[:, :, 1:], clip[:, :, 1:], atol=1e-5)
    half = noised(clip, noise, torch.tensor([0.5, 0.5]))
    assert torch.allclose(half, (clip + noise) / 2)


def test_the_prefix_is_clean_and_has_time_zero(world):
    seen = {}

    class Spy(torch.nn.Module):
        dtype = torch.float32

        def forward(self, **inputs):
            seen.update(inputs)
            return (inputs["hidden_states"],)

    world.transformer = Spy()
    x, first = torch.randn(2, 6, 3, 4, 6), torch.randn(2, 6, 1, 4, 6)
    world.predict(x, first, torch.tensor([400.0, 900.0]), torch.zeros(2, 15, 16))
    assert torch.equal(seen["hidden_states"][:, :, :1], first)
    times = seen["timestep"].view(2, 3, 6)
    assert (times[:, 0] == 0).all() and (times[0, 1:] == 400).all() and (times[1, 1:] == 900).all()


def test_first_latent_frame_depends_on_the_first_picture_alone(world):
    rng = np.random.default_rng(0)
    clip = torch.from_numpy(rng.integers(0, 256, (1, 9, 32, 48, 3), dtype=np.uint8))
    assert torch.allclose(world.encode(clip)[:, :, :1], world.encode(clip[:, :1]), atol=1e-5)


def test_text_is_padded_with_zeros_and_encoded_once(world):
    found = world.embed(["open the drawer", "", "open the drawer"])
    assert found.shape == (3, 15, 16)
    mask = world.tokens(["open the drawer"])["mask"][0].bool()
    assert (found[0, ~mask] == 0).all() and (found[0, mask] != 0).any()
    assert torch.equal(found[0], found[2]) and len(world.texts) == 2


def test_no_text_is_not_the_negative_prompt(world):
    world.negative_prompt = "close the drawer"
    none, plain, same = world.embed([""]), world.negative(1), world.embed(["close the drawer"])
    assert world.prompt("") == "" and torch.equal(plain, same) and not torch.equal(none, plain)
    world.guidance = 1.0
    assert world.negative(1) is None


def test_the_text_encoder_reads_once_and_goes(world, monkeypatch):
    calls, rows, to = [], world.embed(["open the drawer", ""]), world.pipe.text_encoder.to
    world.texts = Texts(world.layout)
    monkeypatch.setattr(world.pipe.text_encoder, "to", lambda device: calls.append(f"to {device}") or to(device))
    embed = world.layout.embed
    monkeypatch.setattr(world.layout, "embed", lambda texts, *a: calls.append(*texts) or embed(texts, *a))
    world.read(["open the drawer", "open the drawer"])
    assert calls == ["to cpu", "", "to cpu", "open the drawer", "to cpu"]  # the negative prompt, then the others
    assert torch.equal(world.embed(["open the drawer", ""]), rows) and len(calls) == 5
    kept = world.texts.size
    assert kept < rows.numel() * rows.element_size()  # without what is behind their ends
    monkeypatch.setattr("dreamgen.worlds.texts.KEPT", kept)
    world.embed(["close the drawer"])
    assert "close the drawer" in world.texts and "" not in world.texts and world.texts.size <= kept
    world.place()
    assert calls.count("to cpu") == 5  # it is placed by nobody else


def test_an_adapter_changes_the_output_and_loads_in_stock_diffusers(world, pipeline_folder, tmp_path):
    (prompt,) = prompts(1)
    before = world.dream([prompt])[0].video
    world.train_lora(rank=3, alpha=6)
    trained = [p for p in world.transformer.parameters() if p.requires_grad]
    assert 0 < sum(p.numel() for p in trained) < sum(p.numel() for p in world.transformer.parameters()) / 2
    assert np.array_equal(world.dream([prompt])[0].video, before)  # a fresh adapter changes nothing
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    after = world.dream([prompt])[0].video
    assert (before != after).any()
    world.save(tmp_path)
    again = PrefixWorld.load(tmp_path)
    assert np.abs(again.dream([prompt])[0].video.astype(int) - after.astype(int)).max() <= 1
    stock = WanImageToVideoPipeline.from_pretrained(pipeline_folder)
    stock.load_lora_weights(tmp_path / "adapter")
    mine, theirs = world.transformer.state_dict(), stock.transformer.state_dict()
    assert mine.keys() == {k.replace(".default_0.", ".default.") for k in theirs}


def test_full_checkpoints_load_with_their_settings(world, tmp_path):
    world.save(tmp_path)
    again = PrefixWorld.load(tmp_path, steps=9)
    assert (again.steps, again.guidance, again.text_length) == (9, 2.5, 15) and again.robot == tiny_robot()
    for key, value in world.transformer.state_dict().items():
        assert torch.equal(value, again.transformer.state_dict()[key]), key


def test_bad_settings_are_named(world, pipeline_folder, tmp_path):
    robot = tiny_robot()
    with pytest.raises(ValueError, match="frames is 10.*9 or 13"):
        PrefixWorld(robot=robot, path=str(pipeline_folder), frames=10)
    with pytest.raises(ValueError, match="no model_index.json"):
        PrefixWorld(robot=robot, path=str(tmp_path))
    prompt = Prompt(id="x", image=np.zeros((16, 16, 3), np.uint8), instruction="go", seed=0)
    with pytest.raises(ValueError, match="first frame of prompt 'x'"):
        world.dream([prompt])
