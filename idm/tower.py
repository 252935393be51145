"""Frames to tokens by a vision tower of transformers: SigLIP, SigLIP2, DINOv2, DINOv3, by folder or hub id."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def open_tower(path: str, config: dict | None = None) -> nn.Module:
    """The tower at `path`, a local folder or a hub id; with `config` (as in its config.json) an untrained one.

    Its `colours` are the (mean, std) of the pictures that it was trained on, in [0, 1].
    Raises ValueError where there is none, and for towers that do not read square pictures of one size.
    """
    try:
        from transformers import AutoConfig, AutoModel
        from transformers.image_processing_utils import BaseImageProcessor
    except ImportError as error:
        raise ValueError("a vision tower needs transformers: pip install transformers") from error
    try:
        known = AutoConfig.for_model(**config) if config else AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:  # the latter for a folder without a known config.json
        raise ValueError(f"vision tower {path} could not be opened ({str(error).splitlines()[0]}); name a local folder "
                         f"with config.json and model.safetensors, or a hub id") from error  # fmt: skip
    if "image_size" not in getattr(known, "vision_config", known).to_dict():
        raise ValueError(f"vision tower {path} ({known.model_type}) reads pictures of any size; choose one of a "
                         f"fixed size, as google/siglip2-base-patch16-256 or facebook/dinov2-base")  # fmt: skip
    try:
        model = AutoModel.from_config(known) if config else AutoModel.from_pretrained(path)
    except OSError as error:
        raise ValueError(f"the weights of vision tower {path} could not be opened ({str(error).splitlines()[0]}); name "
                         f"a local folder with model.safetensors, or a hub id") from error  # fmt: skip
    tower = getattr(model, "vision_model", model)
    tower.colours = IMAGENET if "dino" in known.model_type else HALF
    if not config:
        try:
            given, _ = BaseImageProcessor.get_image_processor_dict(path)
            tower.colours = (tuple(given["image_mean"]), tuple(given["image_std"]))
        except (OSError, KeyError):
            pass  # without a preprocessor file the family's own
    return tower


def patches(tower: nn.Module, frames: Tensor, edge: int | None = None) -> Tensor:
    """Patch tokens of frames (n 3 h w) in [-1, 1], as maps (n d side side); edge: pixels a side, the tower's own size
    by default. Class and register tokens are left out."""
    inner = getattr(tower.config, "vision_config", tower.config)
    edge, side = edge or int(inner.image_size), (edge or int(inner.image_size)) // int(inner.patch_size)
    pixels = F.interpolate(frames[:, :3], (edge, edge), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(row, device=pixels.device)[:, None, None] for row in tower.colours)
    options: dict[str, Any] = {} if edge == inner.image_size or "siglip" not in inner.model_type else {
        "interpolate_pos_encoding": True}  # fmt: skip
    hidden = tower(pixel_values=(pixels / 2 + 0.5 - mean) / std, **options).last_hidden_state
    return hidden[:, -side * side :].mT.unflatten(2, (side, side))


class PretrainedVision(nn.Module):
    """A frozen or fine-tuned tower; its patch tokens, averaged to `tokens` a side and projected to `width`.

    size: of the canvas; a canvas that is not square is squeezed. path, config: see `open_tower`; edge: see `patches`.
    Differences between frames are not seen by the tower. A frozen tower stays in evaluation mode.

    forward: (n 9 h w) in [-1, 1] -> tokens (n tokens^2 + 1 width), the first a summary.
    """

    def __init__(self, *, size: tuple[int, int] | list[int], path: str, width: int = 1024, tokens: int = 4,
                 frozen: bool = True, edge: int | None = None, colours: list | None = None,
                 config: dict | None = None) -> None:  # fmt: skip
        super().__init__()
        if config is None and not Path(path).is_dir() and Path(path).is_absolute():
            raise ValueError(f"vision tower {path} does not exist; name a local folder or a hub id")
        self.tower = open_tower(path, config)
        if colours:
            self.tower.colours = tuple(map(tuple, colours))
        self.size, self.width, self.frozen, self.edge = tuple(size), width, frozen, edge
        inner = getattr(self.tower.config, "vision_config", self.tower.config)
        self.pool = nn.AdaptiveAvgPool2d(tokens)
        self.project = nn.Linear(inner.hidden_size, width)
        self.summary = nn.Sequential(nn.Linear(inner.hidden_size * tokens**2, width), nn.SiLU(),
                                     nn.Linear(width, width))  # fmt: skip
        if frozen:
            self.tower.requires_grad_(False)

    def spec(self) -> dict:
        """What rebuilds the tower without a hub, once its weights are saved with the labeler's."""
        return {"config": self.tower.config.to_dict(), "colours": [list(row) for row in self.tower.colours]}

    def train(self, mode: bool = True) -> "PretrainedVision":
        super().train(mode)
        self.tower.train(mode and not self.frozen)
        return self

    def forward(self, frames: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = patches(self.tower, frames, self.edge)
        grid = self.pool(maps).flatten(2).mT
        return torch.cat([self.summary(grid.flatten(1))[:, None], self.project(grid)], dim=1).float()
