"""What a frozen encoder makes of the pictures of a dataset, computed once.

The features of every observation (and, for FLARE, of the pictures after it) lie in one file of half-precision numbers
in the run's folder, addressed by episode and row; a run that is continued finds them there.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dreamgen.core.manifest import digest, replacing
from dreamgen.engine.precision import best_device
from dreamgen.engine.progress import progress


def cacheable(model: Any) -> bool:
    """Whether the pictures' features never change: the encoder is frozen, and pictures are taken as they are."""
    frozen = hasattr(model.encoder, "features") and not model.encoder.tune
    return frozen and not model.shift and not model.jitter


class Features:
    """Features (n tokens, width) float16 of rows of `chunks` by a frozen `encoder`, made in `folder` on first use.

    The file is named by the dataset's root, the rows and the encoder: what `folder` holds of others is left alone. That
    the pictures are those of the last time, the run's own folder sees to, which takes no other input.
    """

    def __init__(self, chunks: Any, encoder: nn.Module, folder: Path, *, batch_size: int = 32) -> None:
        places = sorted({place for place in chunks} | set(chunks.futures()))
        self.number = {place: k for k, place in enumerate(places)}
        name = digest([str(chunks.dataset.root), places, *encoder.identity()])
        self.path = Path(folder) / f"{name}.f16"
        shape = self.path.with_suffix(".json")
        if not (self.path.is_file() and shape.is_file()):
            self._make(chunks, encoder, places, batch_size)
        self.values = np.memmap(self.path, np.float16, "r", shape=tuple(json.loads(shape.read_text())))

    def _make(self, chunks: Any, encoder: nn.Module, places: Sequence[tuple[int, int]], batch_size: int) -> None:
        device = best_device()
        encoder = encoder.to(device).eval()
        groups = [places[k : k + batch_size] for k in range(0, len(places), batch_size)]
        with replacing(self.path) as temporary, temporary.open("wb") as file, torch.no_grad():
            for group in progress(groups, len(groups), "features", unit="batch"):
                pictures = torch.from_numpy(np.stack([chunks.pictures(*place) for place in group])).to(device)
                words = encoder.words([chunks.dataset.episode(i).instruction for i, _ in group]).to(device)
                found = encoder.features(pictures, words).cpu().numpy().astype(np.float16)
                file.write(found.tobytes())
        with replacing(self.path.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps([len(places), *found.shape[1:]]))

    def __call__(self, episode: int, row: int) -> np.ndarray:
        """(n d) of one observation."""
        return self.values[self.number[episode, row]].astype(np.float32)
