"""The base that ships: small, whole, and an ordinary diffusers pipeline."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image

from dreamgen.core.clip import Prompt
from dreamgen.core.embodiment import Embodiment, Part, View
from dreamgen.worlds.prefix import PrefixWorld, locate

FOLDER = Path(locate("tiny"))
ROBOT = Embodiment(
    name="tabletop", robot_hz="20", views=[View(name="front", key="observation.images.front", height=64, width=64)],
    action=[Part(name="translation", start=0, stop=3, kind="delta")],
)  # fmt: skip


def prompt() -> Prompt:
    """A table, a red and a blue block."""
    image = np.full((64, 64, 3), (222, 211, 190), np.uint8)
    image[40:48, 20:28], image[30:38, 44:52] = (200, 20, 20), (20, 60, 220)
    return Prompt(id="p", image=image, instruction="lift the red block", seed=11)


def test_it_is_small_and_says_how_it_was_made():
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    assert size <= 25e6, f"{size / 1e6:.1f} MB"
    card = (FOLDER / "README.md").read_text()
    assert all(word in card for word in ("jobs.pipeline experiment=base", "seed", "dB"))
    assert json.loads((FOLDER / "model_index.json").read_text())["expand_timesteps"] is True


def test_stock_diffusers_gives_our_frames():
    world = PrefixWorld(robot=ROBOT, steps=3, guidance=2.0, precision="fp32")
    stock = WanImageToVideoPipeline.from_pretrained(FOLDER)
    stock.set_progress_bar_config(disable=True)
    one = prompt()
    frames = stock(
        image=Image.fromarray(one.image), prompt=one.instruction, height=64, width=64, num_frames=17,
        num_inference_steps=3, guidance_scale=2.0, latents=world.noise([one]), max_sequence_length=32,
        output_type="np",
    ).frames[0]  # fmt: skip
    ours = world.dream([one])[0].video
    assert ours.shape == (17, 64, 64, 3)
    assert np.abs(ours.astype(int) - (frames * 255).round().astype(int)).max() <= 1


def test_blocks_stay_visible_through_its_autoencoder():
    world = PrefixWorld(robot=ROBOT, precision="fp32")
    still = torch.from_numpy(prompt().image)[None, None].repeat(1, 5, 1, 1, 1)
    again = world.decode(world.encode(still))[0].float().numpy()
    red, blue = again[:, 41:47, 21:27].mean((0, 1, 2)), again[:, 31:37, 45:51].mean((0, 1, 2))
    assert red[0] - red[1:].max() > 80 and blue[2] - blue[:2].max() > 60
    assert again[:, 5:20, 5:60].mean() == pytest.approx(still[0, :, 5:20, 5:60].float().mean().item(), abs=25)
