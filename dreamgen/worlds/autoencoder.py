"""Training a video autoencoder whose small moving things survive.

Plain mean errors spend the capacity on the background: at 64 pixels a block is 1% of the picture, and a model that
drops it still scores well. Errors are therefore weighted by how far a pixel stands out from its surroundings in space
(small objects) and from the clip's mean in time (what moves).
"""

import hashlib
from functools import partial

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


def saliency(x: Float[Tensor, "b 3 t h w"], *, space: float, time: float) -> Float[Tensor, "b 1 t h w"]:
    """Weights with mean 1 per clip: 1 + space * |x - 9x9 mean| + time * |x - mean over frames|, both cut at .25."""
    b, _, t, h, w = x.shape
    flat = x.transpose(1, 2).flatten(0, 1)
    for kernel, pad in (((9, 1), (4, 0)), ((1, 9), (0, 4))):  # a box is a column of rows: a fifth of the work
        flat = F.avg_pool2d(flat, kernel, 1, pad, count_include_pad=False)
    near = flat.unflatten(0, (b, t)).transpose(1, 2)
    stands_out = (x - near).abs().mean(1, keepdim=True).clamp(max=0.25) / 0.25
    moves = (x - x.mean(2, keepdim=True)).abs().mean(1, keepdim=True).clamp(max=0.25) / 0.25
    weight = 1 + space * stands_out + time * moves
    return weight / weight.mean((1, 2, 3, 4), keepdim=True)


PIXELS = 2**25  # that a VAE is given at once: one clip of 81 frames of 480x832


def clips_at_once(frames: int, height: int, width: int) -> int:
    """How many clips of this size a VAE is given at once; at least 1."""
    return max(1, PIXELS // (frames * height * width))


def weights_digest(module: nn.Module) -> str:
    """16 hex digits that name a module's weights by their bytes, wherever they lie."""
    found = hashlib.blake2b(digest_size=8)
    for name, value in sorted(module.state_dict().items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def to_video(frames: Tensor) -> Tensor:
    """(b t h w 3) uint8 to (b 3 t h w) in [-1, 1]."""
    return frames.movedim(-1, 1).float() / 127.5 - 1


def to_frames(video: Tensor) -> Tensor:
    """(b 3 t h w) in [-1, 1] to (b t h w 3) uint8, rounded as diffusers' video processor does."""
    return ((video.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, -1)


class RmsNorm(torch.autograd.Function):
    """`WanRMS_norm` with its gradient written out: four passes over the tensor instead of a dozen, in its own dtype.

    On a CPU these passes, not the convolutions, are most of a training step.
    """

    @staticmethod
    def forward(ctx, x: Tensor, gamma: Tensor) -> Tensor:  # noqa: ANN001
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).clamp_min_(1e-12)
        scale = norm.reciprocal_().mul_(x.shape[1] ** 0.5).to(x.dtype)
        unit = x * scale
        ctx.save_for_backward(unit, scale, gamma)
        return unit * gamma.to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN001
        unit, scale, gamma = ctx.saved_tensors
        inner = grad * gamma.to(grad.dtype)
        dot = (inner * unit).sum(1, keepdim=True).div_(unit.shape[1])
        dims = [d for d in range(grad.ndim) if d != 1]
        return torch.addcmul(inner, unit, dot, value=-1).mul_(scale), (grad * unit).sum(dims).view_as(gamma).float()


def convolve(conv: WanCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """`WanCausalConv3d`, flat where one frame comes out.

    A clip's first frame meets the last slice of the kernel, and the others the zeros before it; a later frame and the
    two before it are so many more channels.
    """
    before = 0 if cache_x is None else cache_x.shape[2]
    missing = conv._padding[4] - before
    if x.shape[2] != 1 or conv.stride[0] > 1 or missing not in (0, conv.kernel_size[0] - 1):
        return WanCausalConv3d.forward(conv, x, cache_x)
    seen = x if missing or cache_x is None else torch.cat([cache_x, x], 2)
    weight = conv.weight[:, :, missing:]
    sides = conv._padding[2], conv._padding[0]
    return F.conv2d(seen.flatten(1, 2), weight.flatten(1, 2), conv.bias, conv.stride[1:], sides)[:, :, None]


class Autoencoding(nn.Module):
    """`AutoencoderKLWan` with its training loss.

    kl: weight of the divergence from N(0, 1), per latent entry. space, time: see `saliency`. With latents in the batch
    only the decoder is trained: what the latents mean stays as it is.
    """

    def __init__(self, vae: AutoencoderKLWan, *, kl: float = 1e-5, space: float = 3.0, time: float = 3.0) -> None:
        super().__init__()
        self.vae, self.kl, self.space, self.time = vae, kl, space, time
        for module in vae.modules():  # the layout that matrix units want; saved files do not change
            if isinstance(module, WanCausalConv3d):
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
                module.forward = partial(convolve, module)
            elif isinstance(module, WanRMS_norm):
                module.forward = lambda x, gamma=module.gamma: RmsNorm.apply(x, gamma)

    def release(self) -> AutoencoderKLWan:
        """The autoencoder as diffusers made it, with the trained weights."""
        for module in self.vae.modules():
            if isinstance(module, WanRMS_norm | WanCausalConv3d):
                del module.forward
        return self.vae.requires_grad_(False)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """batch: video (b t h w 3) uint8, optionally its latents (b c lt lh lw) as the VAE has them (not normalised).

        Weighted absolute plus squared error and, where it encodes, the KL term.
        """
        x = to_video(batch["video"])
        if "latents" in batch:
            return self._error(self.vae.decode(batch["latents"]).sample.float(), x)
        posterior = self.vae.encode(x).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        z = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
        pixel, metrics = self._error(self.vae.decode(z).sample.float(), x)
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return pixel + self.kl * divergence, {"pixel": pixel, "kl": divergence, **metrics}

    def _error(self, found: Tensor, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        error = found - x
        weight = saliency(x, space=self.space, time=self.time)
        mse = (error.detach() / 2).square().mean()
        return (weight * (error.abs() + 4 * error.square())).mean(), {"psnr": -10 * mse.log10()}

    @torch.no_grad()
    def reconstruct(self, frames: Tensor) -> Tensor:
        """(b t h w 3) uint8 through the latent's mean and back, on the device of the VAE."""
        video = to_video(frames.to(self.vae.device))
        return to_frames(self.vae.decode(self.vae.encode(video).latent_dist.mode()).sample)
