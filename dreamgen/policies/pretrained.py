"""Encoders of transformers in a policy: what SigLIP2 and small vision-language models have in common.

The weights are frozen or tuned, and lie in the policy's checkpoint with the model's config.json and tokenizer beside
them (`encoder/`), so a trained policy needs no hub. What a frozen model makes of a picture never changes: `features`
can be computed once per dataset (see `dreamgen.policies.features`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F


def open_model(path: str, *, trained: bool, layers: int | None = None) -> nn.Module:
    """The model at `path`, a local folder or a hub id; without `trained` only its architecture, at random.

    layers: of the language model, the first so many. Raises ValueError where there is none.
    """
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(path)
        if layers is not None:
            config.text_config.num_hidden_layers = layers
        if trained:
            return AutoModel.from_pretrained(path, config=config, dtype=torch.float32)
        return AutoModel.from_config(config)
    except (OSError, ValueError) as error:
        raise ValueError(f"the encoder {path} could not be opened ({str(error).splitlines()[0]}); name a hub id, or a "
                         f"local folder with config.json, tokenizer and weights") from error  # fmt: skip


class Pretrained(nn.Module):
    """path: local folder or hub id. width: of the tokens that leave. length: tokens of an instruction, the rest is cut
    off. tune: train the model too. trained: load its weights; a checkpoint brings its own.

    Subclasses give `features(pictures, words)`, all that the model itself computes, and `project(features, words)`.
    """

    kinds: tuple[str, ...] = ()  # model types of transformers that a subclass reads

    def __init__(
        self, *, path: str, width: int, length: int, tune: bool, trained: bool, layers: int | None = None
    ) -> None:
        super().__init__()
        from transformers import AutoTokenizer

        self.model = open_model(path, trained=trained, layers=layers)
        kind = self.model.config.model_type
        if kind not in self.kinds:
            raise ValueError(f"the encoder {path} is a '{kind}'; {type(self).__name__} reads {', '.join(self.kinds)}")
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.width, self.length, self.tune = width, length, tune
        self.config: dict[str, Any] = dict(path=path, width=width, length=length, tune=tune, trained=False)
        self.model.requires_grad_(tune)

    def save(self, folder: Path) -> None:
        """config.json and tokenizer of the model, whose weights are the policy's."""
        self.model.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def train(self, mode: bool = True) -> "Pretrained":
        """A frozen model stays in evaluation mode."""
        super().train(mode)
        self.model.train(mode and self.tune)
        return self

    def words(self, instructions: Sequence[str]) -> Int64[Tensor, "b l"]:
        """Token numbers + 1, padded with 0."""
        rows = torch.zeros(len(instructions), self.length, dtype=torch.int64)
        for row, text in zip(rows, instructions, strict=True):
            ids = self.tokenizer(text, truncation=True, max_length=self.length)["input_ids"]
            row[: len(ids)] = torch.tensor(ids) + 1
        return rows

    def ids(self, words: Int64[Tensor, "b l"]) -> Int64[Tensor, "b l"]:
        """What the tokenizer made of the instructions, padded as it pads."""
        return torch.where(words > 0, words - 1, self.tokenizer.pad_token_id or 0)

    def pixels(self, pictures: UInt8[Tensor, "b v h w 3"]) -> Float[Tensor, "n 3 e e"]:
        """All views at the model's size in [-1, 1], which is how these models were trained."""
        edge = int(self.model.config.vision_config.image_size)
        x = pictures.flatten(0, 1).permute(0, 3, 1, 2).float()
        return F.interpolate(x, (edge, edge), mode="bilinear", antialias=True).clamp(0, 255) / 127.5 - 1

    def identity(self) -> list[dict]:
        """What the features depend on beside the pictures, as plain JSON."""
        return [self.config, self.model.config.to_dict()]

    def features(self, pictures: UInt8[Tensor, "b v h w 3"], words: Int64[Tensor, "b l"]) -> Float[Tensor, "b n d"]:
        """What the model makes of the pictures: all that is worth keeping of a frozen one."""
        raise NotImplementedError

    def project(
        self, features: Float[Tensor, "b n d"], words: Int64[Tensor, "b l"]
    ) -> tuple[Float[Tensor, "b m c"], Float[Tensor, "b k c"]]:
        """Visual and language tokens, by the trained layers behind the model."""
        raise NotImplementedError

    def forward(
        self, pictures: UInt8[Tensor, "b v h w 3"], words: Int64[Tensor, "b l"]
    ) -> tuple[Float[Tensor, "b m c"], Float[Tensor, "b k c"]]:
        with torch.set_grad_enabled(self.tune and torch.is_grad_enabled()):
            features = self.features(pictures, words)
        return self.project(features, words)
