"""The encoder that begins as principal components, against the closed form of what these leave out."""

import numpy as np
import pytest
import torch

from dreamgen.worlds.linear_code import encode_linearly
from dreamgen.worlds.tiny import TinyLayout, build

SIZE = 16
LAYOUT = TinyLayout(z_dim=SIZE, vae_dim=12, vae_decoder_dim=8, width=48, heads=2, ffn=40, layers=1, text_width=16,
                    text_layers=1)  # fmt: skip


def clips(count: int, seed: int) -> torch.Tensor:
    """Discs that drift over a sloping ground, (b 3 5 24 32) in [-1, 1]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:24, :32]
    out = np.empty((count, 3, 5, 24, 32), np.float32)
    for video in out:
        place, drift, colour = rng.uniform(4, 20, 2), rng.uniform(-2, 2, 2), rng.uniform(-1, 1, 3)
        ground = rng.uniform(-0.5, 0.5, 3)[:, None, None] + 0.01 * rng.normal() * (x - y)
        for t in range(5):
            distance = np.hypot(y - place[0] - drift[0] * t, x - place[1] - drift[1] * t)
            cover = 1 / (1 + np.exp(2 * (distance - 4)))
            video[:, t] = ground + cover * (colour[:, None, None] - ground)
    return torch.from_numpy(out)


def left_out(rows: torch.Tensor, found: torch.Tensor) -> float:
    """The share of the variance of rows that no linear map of found explains."""
    ones = torch.ones(len(found), 1)
    known = torch.cat([found, ones], 1)
    rest = rows - known @ torch.linalg.lstsq(known, rows).solution
    return float(rest.square().sum() / (rows - rows.mean(0)).square().sum())


def test_latents_are_principal_components():
    video = clips(150, 0)
    vae = build(LAYOUT, ["go"], seed=1).vae
    encode_linearly(vae, video)
    with torch.no_grad():
        posterior = vae.encode(video).latent_dist
    z = posterior.mode().movedim(1, -1)
    assert z.shape == (150, 3, 3, 4, SIZE) and torch.allclose(posterior.logvar, torch.tensor(-5.0))
    pixels = torch.nn.functional.pixel_unshuffle(video.movedim(1, 2).flatten(0, 1), 8).unflatten(0, (150, 5))
    pixels = pixels.movedim(2, -1)  # b t h w 192
    first = pixels[:, 0].flatten(0, -2)
    later = torch.cat([pixels[:, 1::2], pixels[:, 2::2]], -1).flatten(0, -2)
    for rows, code in ((first, z[:, 0].flatten(0, -2)), (later, z[:, 1:].flatten(0, -2))):
        values = torch.linalg.eigvalsh((rows - rows.mean(0)).T @ (rows - rows.mean(0)))
        best = float(values[:-SIZE].clamp_min(0).sum() / values.sum())
        assert best < 0.05 and left_out(rows, code) < best + 0.01
        assert (code.var(0) / code.var(0).mean() - 1).abs().max() < 0.5  # turned: no channel outweighs the others


def test_other_layouts_are_refused():
    vae = build(TinyLayout(z_dim=6, vae_dim=8, vae_decoder_dim=8, width=48, heads=2, layers=1), ["go"]).vae
    with pytest.raises(ValueError, match=r"2\^n latent channels; got levels \[2, 2\], 6 channels"):
        encode_linearly(vae, clips(2, 0))
