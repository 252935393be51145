"""World models conditioned by further channels: the family of Wan2.1-I2V, Wan2.2-I2V-A14B and CogVideoX-I2V.

The transformer's input is cat(noisy latents, mask of given frames, latents of [first picture, nothing]); all tokens
have one time, and the loss is taken on all frames (arXiv:2503.20314, arXiv:2408.06072). Wan2.1 also attends to CLIP's
tokens of the picture; Wan2.2-A14B has one expert above `boundary_ratio` of the times and one below it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from dreamgen.engine.precision import autocast
from dreamgen.worlds.autoencoder import clips_at_once, to_video, weights_digest
from dreamgen.worlds.wan import WanLayout
from dreamgen.worlds.world import VideoWorld

EXPERTS = {"both": ("transformer", "transformer_2"), "high": ("transformer",), "low": ("transformer_2",)}
CUT = 512  # tokens of a text behind those of a picture, as diffusers' WanAttnProcessor cuts them


def pack(parts: list[Tensor], like: Tensor) -> Float[Tensor, "b k t h w"]:
    """Parts (b ...) one after another in as few planes of `like`'s cells (t h w) as hold them, so that one array goes
    through caches and batches; zeros fill the last plane."""
    flat = torch.cat([part.flatten(1) for part in parts], 1)
    cells = like[0, 0].numel()
    return nn.functional.pad(flat, (0, -flat.shape[1] % cells)).view(len(flat), -1, *like.shape[2:])


def unpack(planes: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """The inverse of `pack`, for parts of these shapes (without b)."""
    flat, found, at = planes.flatten(1), [], 0
    for shape in shapes:
        size = torch.Size(shape).numel()
        found.append(flat[:, at : at + size].view(-1, *shape))
        at += size
    return found


class ConcatWorld(VideoWorld):
    """Wan2.1-I2V-14B and Wan2.2-I2V-A14B; other pipelines of this family are subclasses with their layout.

    expert: of two experts, which are trained: "both" (each step one of them, as often as its times are drawn), "high"
    (noise above the boundary) or "low"; other settings as in `VideoWorld`.
    """

    kind = WanLayout

    def __init__(self, *, expert: str = "both", **settings: Any) -> None:
        super().__init__(**settings)
        self.expert = expert
        if expert not in EXPERTS or not self.trained():
            raise ValueError(f"expert is '{expert}'; expected 'both' or, for a pipeline of two transformers, 'high' or "
                             "'low'")  # fmt: skip

    def _check(self) -> None:
        config, channels = self.pipe.transformer.config, self.layout.channels
        mask = self.layout.mask(self.latent_shape, None)
        wanted = 2 * channels + (0 if mask is None else mask.shape[1])
        if config.in_channels != wanted or getattr(self.pipe.config, "expand_timesteps", False):
            raise ValueError(f"{self.path} is a {type(self.pipe).__name__} whose transformer takes {config.in_channels}"
                             f" channels; expected {wanted} (noise, mask, condition). A Wan2.2-TI2V is conditioned by "
                             "a clean prefix: choose world_model=wan22_ti2v_5b.")  # fmt: skip
        if config.get("added_kv_proj_dim") is not None and self.text_length != CUT:
            raise ValueError(f"text_length is {self.text_length}, but {self.path} attends to a picture, whose tokens "
                             f"its transformer tells from a text's by that these are {CUT}: it would take the ones for "
                             f"the others. Set text_length={CUT} (world_model.text_length)")  # fmt: skip
        super()._check()

    @property
    def boundary(self) -> float:
        return self.pipe.config.boundary_ratio or 0.0 if len(self.layout.experts) > 1 else 0.0

    def trained(self) -> dict[str, nn.Module]:
        return {name: module for name, module in self.layout.experts.items() if name in EXPERTS[self.expert]}

    @property
    def times(self) -> tuple[float, float]:
        return {"both": (0.0, 1.0), "high": (self.boundary, 1.0), "low": (0.0, self.boundary)}[self.expert]

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "expert": self.expert}

    def draw(self, count: int, shape: Sequence[int], device: torch.device) -> Float[Tensor, " b"]:
        """Times of one expert, the one that is trained or, of both, this step's: drawn again until all are on its side
        of the boundary.

        A step with one expert is the same on all processes, whatever their rows, and holds one's activations.
        """
        sigma = super().draw(count, shape, device)
        if not self.boundary:
            return sigma
        high = self.expert == "high"
        if self.expert == "both":
            high = bool(torch.rand(()) < self.layout.process(shape).above(self.boundary))
        while True:
            wrong = (sigma >= self.boundary) != high
            if not wrong.any():
                break
            sigma = torch.where(wrong, super().draw(count, shape, device), sigma)
        return sigma

    def cache_key(self) -> dict:
        seen = weights_digest(self.pipe.image_encoder) if self.layout.image_shape else None
        return {**super().cache_key(), "condition": [type(self).__name__, self.layout.image_shape, seen]}

    @torch.no_grad()
    def encode(self, frames: UInt8[Tensor, "b t h w 3"]) -> Float[Tensor, "b ck lt lh lw"]:
        """Normalised latents, and behind them in further channels the condition that clips (t > 1) train on."""
        latents = super().encode(frames)
        if frames.shape[1] == 1:
            return latents
        return torch.cat([latents, self.condition(frames[:, :1], frames.shape[1])], 1)

    @torch.no_grad()
    def condition(self, images: UInt8[Tensor, "b 1 h w 3"], frames: int | None = None) -> Tensor:
        """What `predict` is given of the first pictures for clips of so many frames (the clock's), (b k lt lh lw)."""
        frames, found = frames or self.clock.frames, []
        for some in images.to(self.device).split(clips_at_once(frames, *images.shape[2:4])):
            with autocast(self.precision, self.device):
                z = self.layout.condition(to_video(some), frames).float()
                tokens = self.layout.image_tokens(some)
            z = (z - self.mean) / self.std
            parts = [z] if tokens is None else [z, tokens.to(z)]
            found.append(pack(parts, z.new_empty(1, 1, (frames - 1) // self.layout.scale[0] + 1, *z.shape[3:])))
        return torch.cat(found)

    def predict(self, x: Tensor, given: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """The prediction for all latent frames; given (b k t h w) as `condition` makes it; timestep (b,), the model's.

        Of two experts each takes its rows.
        """
        tokens = self.layout.image_shape
        shapes = [(x.shape[1], self.layout.given(x.shape[2]), *x.shape[3:]), *([tokens] if tokens else [])]
        z, *image = unpack(given, shapes)
        z = nn.functional.pad(z, (0, 0, 0, 0, 0, x.shape[2] - z.shape[2]))
        mask = self.layout.mask(x.shape[1:], x.device)
        parts = [x, z] if mask is None else [x, mask.expand(len(x), -1, -1, -1, -1), z]
        rows = [torch.cat(parts, 1), timestep, text, *image]
        if not self.boundary:
            return self.layout.forward(self.transformer, *rows)
        high = timestep >= self.boundary * self.layout.process(x.shape[1:]).unit
        out = None
        for expert, mine in ((self.transformer, high), (self.transformer_2, ~high)):
            if mine.all():
                return self.layout.forward(expert, *rows)
            if mine.any():
                found = self.layout.forward(expert, *(row[mine] for row in rows))
                out = found.new_zeros(len(x), *found.shape[1:]) if out is None else out
                out = out.index_put((mine,), found)
        assert out is not None, "each row has an expert"
        return out

    def cut(self, latents: Tensor, frames: int) -> Tensor:
        """The condition, too, is of its first frames: the VAE is causal. CLIP's tokens stay whole."""
        x, given = self.split(latents)
        short, tokens = super().cut(x, frames), self.layout.image_shape
        shapes = [(x.shape[1], self.layout.given(x.shape[2]), *x.shape[3:]), *([tokens] if tokens else [])]
        z, *image = unpack(given, shapes)
        z = z[:, :, : self.layout.given(short.shape[2])]
        return torch.cat([short, pack([z, *image], short)], 1)

    def split(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        return latents[:, : self.layout.channels], latents[:, self.layout.channels :]
