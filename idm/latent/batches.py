"""Training clips of any video, addressed by step; actions come along only for the few labelled episodes."""

import logging
from collections.abc import Sequence

import numpy as np
import torch

from dreamgen.core.clock import Clock
from dreamgen.core.seeding import rng_for
from dreamgen.data.video_rate import shown_rows
from idm.batches import Recorded, fresh_starts

log = logging.getLogger(__name__)


def starts_of(dataset: Recorded, index: int, clock: Clock) -> np.ndarray:
    """First rows (n,) of the clips of an episode; of labelled video those that show new pictures alone."""
    return fresh_starts(shown_rows(dataset.episode(index)), clock)


class VideoBatches:
    """Batches of `batch_size` clips on `clock` from `episodes`; every other clip is labelled where any is.

    labelled: the episodes whose actions may be seen. Calling gives a dict: video (b f H W 3) uint8, action (b s a),
    zero where unknown, known (b,) 1.0 for labelled clips. Of labelled video clips show new pictures alone.

    Raises ValueError for episodes none of which has a clip, and for labelled ones none of which has.
    """

    def __init__(self, dataset: Recorded, episodes: Sequence[int], labelled: Sequence[int], clock: Clock, *,
                 batch_size: int, seed: int) -> None:  # fmt: skip
        self.dataset, self.clock, self.batch_size, self.seed = dataset, clock, batch_size, seed
        found = {i: starts_of(dataset, i, clock) for i in episodes}
        self.starts = {i: starts for i, starts in found.items() if len(starts)}
        self.episodes = list(self.starts)
        told = set(labelled)
        self.labelled = [i for i in self.episodes if i in told]
        for kind, given, left in (("", found, self.episodes), ("labelled ", labelled, self.labelled)):
            if len(given) and not left:
                raise ValueError(f"none of {len(given)} {kind}episodes has the {clock.steps + 1} rows that a training "
                                 f"clip spans, with new pictures alone; lower the labeler's `frames`, label video of a "
                                 f"rate that divides the robot's, or record longer episodes")  # fmt: skip
        if len(self.episodes) < len(found):
            log.warning("%d of %d episodes bring no training clips: they are shorter than the %d rows of one, or "
                        "repeat pictures at another rate", len(found) - len(self.episodes), len(found),
                        clock.steps + 1)  # fmt: skip

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        rng = rng_for(self.seed, "latent batch", step)
        video, action, known = [], [], []
        for n in range(self.batch_size):
            pool = self.labelled if self.labelled and n % 2 else self.episodes
            index = pool[int(rng.integers(len(pool)))]
            start = int(self.starts[index][rng.integers(len(self.starts[index]))])
            video.append(self.dataset.canvas(index, start + self.clock.rows))
            known.append(float(index in self.labelled))
            taken = self.dataset.episode(index).action[start : start + self.clock.steps]
            action.append(taken if known[-1] else np.zeros_like(taken))
        return {"video": torch.from_numpy(np.stack(video)), "action": torch.from_numpy(np.stack(action)).float(),
                "known": torch.tensor(known)}  # fmt: skip
