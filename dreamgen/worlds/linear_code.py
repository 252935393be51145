"""An autoencoder's encoder that begins as the best linear code of its patches (PCA), in closed form.

A decoder learns such a code within minutes. Encoder and decoder from random weights look for a common one for hours:
the decoder's upsampling by repetition cannot place what lies between pixels without learning it, and an encoder that
follows such a decoder forgets these details. The code: principal components of the pixels of a cell, of one picture or
of two on end, each scaled to the root of its standard deviation, so that coarse things still outweigh fine ones, and
turned by a Hadamard matrix, so that all channels have one variance. The network computes it but for the curvature of
its last norm and SiLU, which large constants keep small.
"""

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify
from jaxtyping import Float
from scipy.linalg import hadamard
from torch import Tensor, nn

GAIN, OFFSET, SLOPE = 8.0, 10.0, 10.0  # of the components, of the constant beside them, of the last norm
NOISE = -5.0  # log variance of the latents' noise


def _components(rows: Float[Tensor, "n d"], count: int) -> tuple[Tensor, Tensor]:
    """The leading principal directions (count d) of centred rows, and their standard deviations."""
    values, vectors = torch.linalg.eigh((rows.T @ rows / len(rows)).double())
    return vectors.flip(1)[:, :count].T.float(), values.flip(0)[:count].clamp_min(1e-12).sqrt().float()


def _cells(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h2 w2 c4"]:
    """Channels of 2x2 places, the places varying slowest."""
    return nn.functional.pixel_unshuffle(x, 2).unflatten(1, (-1, 4)).transpose(1, 2).flatten(1, 2).movedim(1, -1)


@torch.no_grad()
def encode_linearly(vae: AutoencoderKLWan, clips: Float[Tensor, "b 3 5 h w"]) -> None:
    """Set the encoder's weights by `clips` of 5 frames in [-1, 1]; for two levels, time by 2.

    The residual branches must be at 0. Raises ValueError for a VAE of other levels, or a code that is no power of 2.
    """
    encoder, size = vae.encoder, vae.config.z_dim
    if list(vae.config.temperal_downsample) != [True] or size & (size - 1):
        raise ValueError(f"a linear code is for a VAE of two levels and 2^n latent channels; got levels "
                         f"{vae.config.dim_mult}, {size} channels")  # fmt: skip
    block = encoder.down_blocks[0]
    patches = patchify(clips, vae.config.patch_size)
    centre = patches.mean((0, 2, 3, 4))
    rows = (patches - centre.view(-1, 1, 1, 1)).movedim(1, -1)
    inner, width = encoder.conv_in.out_channels, block.downsampler.dim

    local, _ = _components(rows.flatten(0, -2), inner)
    encoder.conv_in.weight.zero_()[:, :, -1, 1, 1] = local
    encoder.conv_in.bias.copy_(-local @ centre)
    block.resnets[0].conv_shortcut.weight.zero_()[:inner, :, 0, 0, 0] = torch.eye(inner)
    block.resnets[0].conv_shortcut.bias.zero_()

    maps = (rows @ local.T).movedim(-1, 2)  # b t c h w
    cells = _cells(maps.flatten(0, 1)).unflatten(0, maps.shape[:2])
    still, spread = _components(cells.flatten(0, -2), width)
    root = spread.sqrt()
    taps = (still / root[:, None]).unflatten(1, (4, inner)).transpose(1, 2).unflatten(2, (2, 2))
    block.downsampler.resample[1].weight.zero_()[:, :inner, :2, :2] = GAIN * taps
    block.downsampler.resample[1].bias.zero_()

    codes = cells @ still.T  # b t h w d
    pairs = torch.cat([codes[:, 1::2], codes[:, 2::2]], -1)
    moving, lasts = _components(pairs.flatten(0, -2), width)
    joint = moving / lasts.sqrt()[:, None] * torch.cat([root, root])
    time = block.downsampler.time_conv
    time.weight.zero_()
    time.weight[:, :, 1, 0, 0], time.weight[:, :, 2, 0, 0] = joint[:, :width], joint[:, width:]
    time.bias.zero_()
    encoder.down_blocks[1].resnets[0].conv2.bias.fill_(GAIN * OFFSET)
    encoder.norm_out.gamma.fill_(SLOPE)

    turn = torch.from_numpy(hadamard(size) / size**0.5).float()
    first, later = codes[:, :1, ..., :size], (pairs @ moving.T)[..., :size]
    _fit_last(vae, clips, torch.cat([(x / (d[:size] * d[:size].mean()).sqrt()) @ turn
                                     for x, d in ((first, spread), (later, lasts))], 1))  # fmt: skip


def _fit_last(vae: AutoencoderKLWan, clips: Tensor, wanted: Float[Tensor, "b 3 h w d"]) -> None:
    """Least squares from what reaches the last convolution to the wanted code; and a constant noise."""
    encoder, seen = vae.encoder, []
    hook = encoder.conv_out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for part in clips.split(32):
        vae.encode(part)
    hook.remove()
    inputs = torch.cat([torch.cat(seen[::2]), torch.cat(seen[1::2])], 2).movedim(1, -1)  # b 3 h w c
    flat = inputs.flatten(0, -2).double()
    mean = flat.mean(0)
    gram = (flat - mean).T @ (flat - mean)
    ridge = 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    weight = torch.linalg.solve(gram + ridge, (flat - mean).T @ wanted.flatten(0, -2).double())
    size = wanted.shape[-1]
    for last in (encoder.conv_out, vae.quant_conv):
        last.weight.zero_()
        last.bias.zero_()
    encoder.conv_out.weight[:size, :, -1, 1, 1] = weight.T.float()
    encoder.conv_out.bias[:size] = -(mean @ weight).float()
    vae.quant_conv.weight[:, :, 0, 0, 0] = torch.eye(2 * size)
    vae.quant_conv.bias[size:] = NOISE
