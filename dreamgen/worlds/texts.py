"""Text embeddings of a pipeline: made once, kept in main memory, on the accelerator only with the batch they are for.

A text encoder is larger than many a transformer and has nothing to do while one dreams or learns: it stays in main
memory, and is on the accelerator only while it reads.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dreamgen.data.cache import trimmed
from dreamgen.worlds.layout import Layout
from dreamgen.worlds.sampler import enough

KEPT = 2**33  # bytes


class Texts:
    """Embeddings of finished prompts by a layout's text encoder; of more than `KEPT` bytes the oldest go first."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.length = layout, 0
        self._rows: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, text: str) -> bool:
        return text in self._rows

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        return sum(row.numel() * row.element_size() for row in self._rows.values())

    def read(self, texts: Sequence[str], device: torch.device) -> Iterator[Float[Tensor, "l d"]]:
        """Embeddings on the CPU, one after another; none is kept. ValueError where the encoder does not fit."""
        if not texts:
            return
        encoder = self.layout.pipe.text_encoder
        try:
            with enough("with the text encoder", "`weights: bf16` of the world model, or a larger device"):
                for text in texts:
                    with torch.no_grad():
                        made = self.layout.embed([text], encoder.to(device).device)[0].cpu()
                    yield made
        finally:
            encoder.to("cpu")

    def ahead(self, texts: Sequence[str], device: torch.device) -> None:
        """Read texts before they are asked for, as many as are kept."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._rows]
        for text, row in zip(missing, self.read(missing, device), strict=False):
            self._rows[text], self.length = trimmed(row), len(row)
            if self.size >= KEPT:
                break

    def take(self, texts: Sequence[str], device: torch.device) -> Float[Tensor, "b l d"]:
        """Embeddings on `device`."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._rows]
        for text, row in zip(missing, self.read(missing, device), strict=True):
            self._rows[text], self.length = trimmed(row), len(row)
        rows = [self._rows[text] for text in texts]
        for old in [text for text in self._rows if text not in texts]:
            if self.size <= KEPT:
                break
            del self._rows[old]
        return torch.stack([torch.nn.functional.pad(row, (0, 0, 0, self.length - len(row))) for row in rows]).to(device)
