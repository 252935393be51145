"""A tiny random pipeline in the layout of Wan2.2-TI2V, and a robot whose picture is not square."""

import pytest
import torch

from dreamgen.core.embodiment import Embodiment, Part, View
from dreamgen.worlds.prefix import PrefixWorld
from dreamgen.worlds.tiny import TinyLayout, build

LAYOUT = TinyLayout(  # time by 4, as Wan2.2
    z_dim=6, vae_dim=8, vae_decoder_dim=8, vae_patch=2, vae_widths=(1, 2, 2), width=48, heads=2, ffn=40, layers=2,
    text_width=16, text_layers=1, shift=3.0,
)  # fmt: skip


def tiny_robot() -> Embodiment:
    return Embodiment(
        name="toy", robot_hz="20", views=[View(name="front", key="observation.images.front", height=32, width=48)],
        action=[Part(name="move", start=0, stop=3, kind="delta")], state=[Part(name="pose", start=0, stop=2)],
    )  # fmt: skip


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory):
    """A saved tiny pipeline whose latents have moments of their own."""
    folder = tmp_path_factory.mktemp("pipeline") / "toy"
    pipe = build(LAYOUT, ["put the red block on the plate", "open the drawer"], seed=3)
    pipe.vae.register_to_config(latents_mean=[0.1 * i for i in range(6)], latents_std=[0.5 + 0.1 * i for i in range(6)])
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def world(pipeline_folder):
    torch.manual_seed(0)
    return PrefixWorld(robot=tiny_robot(), path=str(pipeline_folder), frames=9, steps=4, guidance=2.5, text_length=15,
                       precision="fp32")  # fmt: skip
