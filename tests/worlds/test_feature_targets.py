"""What latent actions foretell: latents of a world model of any family, opened by its folder alone."""

import pytest
import torch

from dreamgen.core.manifest import read_json, write_json
from dreamgen.worlds.stored import open_saved
from dreamgen.worlds.world import VideoWorld
from idm.latent.target import Features
from tests.worlds import zoo


@pytest.mark.parametrize("name", zoo.WORLDS)
def test_latent_actions_foretell_the_latents_of_a_saved_world_of_any_class(name, tmp_path, monkeypatch):
    """Its folder names the class; the autoencoder alone goes to the accelerator."""
    world, placed, place = zoo.world(name, zoo.save(name, tmp_path / "pipeline")), [], VideoWorld.place
    world.save(tmp_path / "saved")
    monkeypatch.setattr(VideoWorld, "place", lambda self, **options: place(self, **(placed.append(options) or options)))
    target, (h, w) = Features(world=str(tmp_path / "saved")), zoo.sizes(name)
    assert type(target.vae) is type(world) and placed == [{"experts": False}]
    frames = torch.randint(0, 256, (2, h, w, 3), dtype=torch.uint8)
    latents = world.encode(frames[:, None])[:, :, 0]
    found = target(frames.movedim(-1, 1).float() / 127.5 - 1)
    assert found.shape == (2, target.width, h // 8, w // 8)
    wanted = torch.nn.functional.interpolate(latents, (h // 8, w // 8), mode="bilinear", antialias=True)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    saved = read_json(tmp_path / "saved/world.json")
    write_json(tmp_path / "saved/world.json", {**saved, "world": "os.path.Path"})
    with pytest.raises(ValueError, match="only classes of dreamgen.worlds"):
        open_saved(tmp_path / "saved")
    del saved["world"]
    write_json(tmp_path / "saved/world.json", saved)
    if name == "wan22_ti2v_5b":
        assert type(open_saved(tmp_path / "saved")) is type(world)
    else:
        with pytest.raises(ValueError, match='does not name the class that saved it.*add it, e.g. "world"'):
            open_saved(tmp_path / "saved")
