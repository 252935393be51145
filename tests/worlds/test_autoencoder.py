"""The autoencoder's training loss and its faster norm, against the plain formulas."""

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm

from dreamgen.worlds.autoencoder import (
    Autoencoding,
    RmsNorm,
    clips_at_once,
    convolve,
    saliency,
    to_frames,
    to_video,
    weights_digest,
)
from dreamgen.worlds.tiny import build
from tests.worlds.conftest import LAYOUT


def test_the_faster_norm_is_the_norm_of_diffusers():
    torch.manual_seed(0)
    norm = WanRMS_norm(7, images=False)
    norm.gamma.data = torch.rand_like(norm.gamma) + 0.5
    x = torch.randn(2, 7, 3, 4, 5, requires_grad=True)
    weight = torch.randn(2, 7, 3, 4, 5)
    grads = []
    for function in (norm, lambda x: RmsNorm.apply(x, norm.gamma)):
        y = function(x)
        grads.append((y, *torch.autograd.grad((y * weight).sum(), (x, norm.gamma))))
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_weights_are_named_by_their_bytes():
    norm, other, half = WanRMS_norm(7), WanRMS_norm(7), WanRMS_norm(7).to(torch.bfloat16)
    first = weights_digest(norm)
    assert weights_digest(other) == first != weights_digest(half)
    other.gamma.data[3] *= -1  # of the same size
    assert weights_digest(other) != first


def test_small_clips_are_encoded_together_and_large_ones_alone():
    assert clips_at_once(17, 64, 128) > 64  # a whole shard
    assert [clips_at_once(*size) for size in ((81, 480, 832), (93, 704, 1280))] == [1, 1]


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("cached", [0, 1, 2])
@pytest.mark.parametrize("kernel", [3, (3, 1, 1), 1])
def test_the_flat_convolution_is_that_of_diffusers(frames, cached, kernel):
    torch.manual_seed(0)
    conv = WanCausalConv3d(5, 4, kernel, padding=(1, 0, 0) if kernel == (3, 1, 1) else int(kernel == 3))
    x, cache = torch.randn(2, 5, frames, 6, 7), torch.randn(2, 5, cached, 6, 7) if cached else None
    assert torch.allclose(convolve(conv, x, cache), conv(x, cache), atol=1e-5)


def test_small_and_moving_things_weigh_more():
    still = torch.zeros(1, 3, 5, 24, 24)
    still[:, :, :, 4:8, 4:8] = 0.8
    weight = saliency(still, space=3.0, time=3.0)
    assert torch.allclose(weight.mean(), torch.tensor(1.0), atol=1e-5)
    assert weight[0, 0, 0, 5, 5] > 3 * weight[0, 0, 0, 20, 20]
    moving = torch.zeros(1, 3, 5, 24, 24)
    for t in range(5):
        moving[:, :, t, 4:8, 3 * t : 3 * t + 4] = 0.8
    assert saliency(moving, space=0.0, time=3.0)[0, 0, 2, 5, 7] > saliency(still, space=0.0, time=3.0)[0, 0, 2, 5, 7]
    assert torch.equal(saliency(still, space=0.0, time=0.0), torch.ones(1, 1, 5, 24, 24))


def test_pictures_survive_the_way_to_video_and_back():
    frames = torch.randint(0, 256, (2, 5, 8, 16, 3), dtype=torch.uint8)
    assert to_video(frames).shape == (2, 3, 5, 8, 16) and torch.equal(to_frames(to_video(frames)), frames)


def test_training_leaves_the_autoencoder_as_diffusers_made_it():
    torch.manual_seed(1)
    vae = build(LAYOUT, ["go"], seed=2).vae
    frames = torch.randint(0, 256, (1, 5, 16, 16, 3), dtype=torch.uint8)
    with torch.no_grad():
        before = vae.encode(to_video(frames)).latent_dist.mode()
    model = Autoencoding(vae.requires_grad_(True))
    loss, metrics = model.loss({"video": frames})
    loss.backward()
    assert all(p.grad is not None for p in vae.parameters()) and set(metrics) == {"pixel", "kl", "psnr"}
    with torch.no_grad():
        after = model.release().encode(to_video(frames)).latent_dist.mode()
    assert torch.allclose(before, after, atol=1e-5) and not any(p.requires_grad for p in vae.parameters())
    assert not any("forward" in module.__dict__ for module in vae.modules())


def test_pictures_are_reconstructed_where_the_autoencoder_is():
    model = Autoencoding(build(LAYOUT, ["open"]).vae.to("meta"))
    assert model.reconstruct(torch.zeros(2, 5, 16, 24, 3, dtype=torch.uint8)).device.type == "meta"
