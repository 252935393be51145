"""What a frozen encoder makes of the pictures of a dataset, computed once.

The features of every observation (and, for FLARE, of the pictures after it) lie in one file of half-precision numbers
in the run's folder, addressed by episode and row; a run that is continued finds them there. They pay where training
takes an observation more than once (`worthwhile`).
"""

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dreamgen.core.manifest import digest, replacing
from dreamgen.engine.precision import best_device
from dreamgen.engine.progress import progress
from dreamgen.engine.state import states_gb

ROWS = 128  # of an episode whose pictures are decoded at a time
log = logging.getLogger(__name__)


def cacheable(model: Any) -> bool:
    """Whether the pictures' features never change: the encoder is frozen, and pictures are taken as they are."""
    frozen = hasattr(model.encoder, "features") and not model.encoder.tune
    return frozen and not model.shift and not model.jitter


def worthwhile(model: Any, datasets: Sequence[Any], folder: Path, *, draws: int) -> bool:
    """Whether the features of `datasets` (their `Chunks`) are to be computed in `folder`: they never change, and
    training, which takes `draws` observations, takes at least as many as there are; where not, it is said.

    Raises ValueError where `folder`, whose parent is there, has no room for them beside the states of the training.
    """
    if not cacheable(model):
        return False
    if (count := sum(map(len, datasets))) > draws:
        log.info("pictures pass the frozen encoder when they are drawn: training takes %d observations, and there are "
                 "%d", draws, count)  # fmt: skip
        return False
    encoder = model.encoder.to(best_device()).eval()
    needed = sum(lacking(chunks, encoder, folder) for chunks in datasets) / 1e9
    free, reserve = shutil.disk_usage(folder.parent).free / 1e9, states_gb(model)
    if needed and needed > free - reserve:
        raise ValueError(f"the features of {count} observations take {needed:.3g} GB in {folder}, and of {free:.3g} GB "
                         f"that are free the states of the training take {reserve:.3g}; choose an `out` with more room,"
                         f" or stage.cache_features=false: pictures then pass the encoder at every step")  # fmt: skip
    return True


def lacking(chunks: Any, encoder: nn.Module, folder: Path) -> int:
    """Bytes of the features that `folder` does not hold yet."""
    places = looked_at(chunks)
    if named(chunks, encoder, folder, places).is_file():
        return 0
    first = computed(chunks, encoder, places[:1], pictures(chunks, places[:1]))
    return len(places) * first.nbytes


def looked_at(chunks: Any) -> list[tuple[int, int]]:
    """Episode and row of all pictures that training may take, in order."""
    return sorted({place for place in chunks} | set(chunks.futures()))


def named(chunks: Any, encoder: nn.Module, folder: Path, places: Sequence[tuple[int, int]]) -> Path:
    """The file of the features: by the dataset's root and episodes, its views, the rows and the encoder."""
    data, views = chunks.dataset, chunks.dataset.robot.contract()["views"]
    held = [int(data.index(i)) for i in range(len(data))]
    return Path(folder) / f"{digest([str(data.root), held, views, places, *encoder.identity()])}.f16"


def pictures(chunks: Any, places: Sequence[tuple[int, int]]) -> Iterator[np.ndarray]:
    """All views (v h w 3) at `places`, which are in order: the rows of an episode are decoded together, since one by
    one each would be decoded from the key frame before it."""
    for episode, group in groupby(places, lambda place: place[0]):
        rows = [row for _, row in group]
        for k in range(0, len(rows), ROWS):
            views = chunks.dataset.views(episode, rows[k : k + ROWS])
            yield from np.stack([views[name] for name in chunks.views], 1)


def computed(
    chunks: Any, encoder: nn.Module, group: Sequence[tuple[int, int]], seen: Iterator[np.ndarray]
) -> np.ndarray:
    """Features (b n d) float16 of the places `group`, whose pictures come next in `seen`."""
    device = next(encoder.parameters()).device
    with torch.no_grad():
        views = torch.from_numpy(np.stack(list(islice(seen, len(group))))).to(device)
        words = encoder.words([chunks.dataset.episode(i).instruction for i, _ in group]).to(device)
        return encoder.features(views, words).cpu().numpy().astype(np.float16)


class Features:
    """Features (n tokens, width) float16 of rows of `chunks` by a frozen `encoder`, made in `folder` on first use.

    The file is named by the dataset's root, episodes, views and rows and the encoder: what `folder` holds of others is
    left alone. That the pictures are those of the last time, the run's own folder sees to, which takes no other input.
    """

    def __init__(self, chunks: Any, encoder: nn.Module, folder: Path, *, batch_size: int = 32) -> None:
        places = looked_at(chunks)
        self.number = {place: k for k, place in enumerate(places)}
        self.path = named(chunks, encoder, folder, places)
        shape = self.path.with_suffix(".json")
        if not (self.path.is_file() and shape.is_file()):
            self._make(chunks, encoder, places, batch_size)
        self.values = np.memmap(self.path, np.float16, "r", shape=tuple(json.loads(shape.read_text())))

    def _make(self, chunks: Any, encoder: nn.Module, places: Sequence[tuple[int, int]], batch_size: int) -> None:
        encoder = encoder.to(best_device()).eval()
        groups = [places[k : k + batch_size] for k in range(0, len(places), batch_size)]
        seen = pictures(chunks, places)
        with replacing(self.path) as temporary, temporary.open("wb") as file:
            for group in progress(groups, len(groups), "features", unit="batch"):
                found = computed(chunks, encoder, group, seen)
                file.write(found.tobytes())
        with replacing(self.path.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps([len(places), *found.shape[1:]]))

    def __call__(self, episode: int, row: int) -> np.ndarray:
        """(n d) of one observation."""
        return self.values[self.number[episode, row]].astype(np.float32)
