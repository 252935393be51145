"""Where a tool is: on a canvas of several views; closed forms of the weights there and of the weighted loss."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dreamgen.worlds.action_frames import pose_maps
from tests.worlds.conftest import pipeline_folder  # noqa: F401
from tests.worlds.test_action import make, robot  # noqa: F401


@pytest.mark.parametrize(("wide", "count"), [(24, 4), (25, 4), (25, 2), (20, 3), (2, 4)])
def test_a_spot_is_where_the_canvas_shows_the_tool_also_where_a_view_ends_within_a_cell(wide, count):
    """Views side by side on `wide` latent cells, all of one camera; a closed form in the canvas's coordinates."""
    one = robot()
    views = [replace(one.views[0], name=f"v{k}") for k in range(count)]
    place, size = (0.3, -0.1), wide / count
    state = np.array([*place, 0, 1], np.float32)
    maps = pose_maps(replace(one, views=views, grid=()), np.arange(5), np.zeros((4, 4), np.float32), state,
                     size=(8, wide), gaps=4)  # fmt: skip
    (u, v), _ = one.views[0].camera.project(state[:3])
    x, y = np.arange(wide) + 0.5, np.arange(8) + 0.5
    view = np.floor(x / size)  # each cell shows the view that has its middle
    spot = np.exp(-((y[:, None] - 8 * v) ** 2 + (x - size * (view + u)) ** 2) / (2 * 0.75**2))
    assert np.allclose(maps[0, 0], spot, atol=1e-6) and np.array_equal(maps[1], maps[0])


def test_an_error_counts_more_where_a_tool_is_in_training_alone(make, monkeypatch):  # noqa: F811
    world, seen = make(own=True, tool_weight=4.0), []
    batch = {"latents": torch.randn(3, 6, 3, 4, 6), "text": world.embed(["", "", ""]),
             "present": torch.tensor([True, True, False]), "features": torch.randn(3, 2, 16),
             "maps": torch.rand(3, 8, 3, 4, 6),
             "memory": torch.randn(3, 6, 2, 4, 6), "ages": torch.rand(3, 2)}  # fmt: skip
    plain = type(world.world).loss
    monkeypatch.setattr(type(world.world), "loss", lambda self, given: seen.append(given) or plain(self, given))
    world.eval().loss(batch)
    world.train().loss(batch)
    assert "weight" not in seen[0]
    spots = batch["maps"].unflatten(1, (4, 2))[:, :, 0].amax(1, keepdim=True)  # of four gaps
    weight = 1 + 4 * spots * batch["present"].view(3, 1, 1, 1, 1)  # where nothing is told, nothing counts more
    torch.testing.assert_close(seen[1]["weight"], weight / weight.mean())
    with pytest.raises(ValueError, match="tool_weight is 4.0, maps is False.*maps=true"):
        make(tool_weight=4.0, maps=False)


def test_the_weighted_loss_is_the_weighted_mean_of_the_cells(world):
    batch = {"latents": torch.randn(2, *world.latent_shape), "text": world.embed(["", ""]),
             "noise": torch.randn(2, *world.latent_shape), "sigma": torch.tensor([0.3, 0.8])}  # fmt: skip
    lt, h, w = world.latent_shape[1:]
    whole = float(world.loss(batch)[0])
    cells = []
    for k in range((lt - 1) * h * w):
        weight = torch.zeros(2, 1, lt, h, w)
        weight[:, :, 1:].flatten(2)[..., k] = 1  # a view
        cells.append(float(world.loss({**batch, "weight": weight})[0]))
    assert sum(cells) == pytest.approx(whole, rel=1e-4) and min(cells) > 0
    assert float(world.loss({**batch, "weight": torch.ones(2, 1, lt, h, w)})[0]) == whole
