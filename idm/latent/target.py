"""What a latent must foretell: the next frame's pixels, or frozen features of it, which care less for backgrounds."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from idm.tower import open_tower, patches


class Pixels:
    """Pixels of the frames themselves, gathered by patch: (n 3 h w) in [-1, 1] -> (n 192 h/8 w/8)."""

    def __init__(self) -> None:
        self.width = 192

    def __call__(self, frames: Tensor) -> Tensor:
        return F.pixel_unshuffle(frames, 8)

    def picture(self, features: Tensor) -> Tensor:
        """The inverse."""
        return F.pixel_shuffle(features, 8)


class Features:
    """Frozen features of single frames on the patch grid of stride 8: (n 3 h w) -> (n width h/8 w/8).

    world: a folder that a world model was saved in, of any class, whose autoencoder encodes; path: a vision tower of
    transformers (SigLIP2, DINO), a local folder or a hub id; config: build the tower from this configuration instead
    (tests).
    """

    def __init__(self, *, world: str | None = None, path: str | None = None, config: dict | None = None) -> None:
        if (world is None) == (path is None):
            raise ValueError(f"a feature target has world={world!r} and path={path!r}; name one: a world model's "
                             f"folder, or a vision tower's folder or hub id")  # fmt: skip
        self.vae = self.tower = None
        if world is not None:
            from dreamgen.worlds.stored import open_saved

            if not Path(world).exists():
                raise ValueError(f"the world model {world} of the feature target does not exist; finetune one, name "
                                 f"where it lies, or train on pixels (labeler.target=null)")  # fmt: skip
            # of its transformer, and how that was run where it was trained, nothing is needed
            self.vae = open_saved(world, attention_backend="native", compile=False).place(experts=False)
            self.width = self.vae.layout.channels
        else:
            self.tower = open_tower(path, config).requires_grad_(False).eval()
            self.width = self.tower.config.hidden_size

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> Tensor:
        grid = (frames.shape[-2] // 8, frames.shape[-1] // 8)
        if self.vae is not None:
            pixels = ((frames + 1) * 127.5).round().to(torch.uint8).movedim(1, -1)
            found = self.vae.encode(pixels[:, None])[:, :, 0]
        else:
            found = patches(self.tower.to(frames.device), frames)
        return F.interpolate(found.float().to(frames.device), grid, mode="bilinear", antialias=True)
