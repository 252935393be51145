"""Training clips of any video, addressed by step; actions come along only for the few labelled episodes."""

from collections.abc import Sequence

import numpy as np
import torch

from dreamgen.core.clock import Clock
from dreamgen.core.seeding import rng_for
from dreamgen.data.video_rate import shown_rows
from idm.batches import Recorded


class VideoBatches:
    """Batches of `batch_size` clips on `clock` from `episodes`; every other clip is labelled where any is.

    labelled: the episodes whose actions may be seen. Calling gives a dict: video (b f H W 3) uint8, action (b s a),
    zero where unknown, known (b,) 1.0 for labelled clips.

    Raises ValueError for episodes that are all shorter than a clip.
    """

    def __init__(self, dataset: Recorded, episodes: Sequence[int], labelled: Sequence[int], clock: Clock, *,
                 batch_size: int, seed: int) -> None:  # fmt: skip
        self.dataset, self.clock, self.batch_size, self.seed = dataset, clock, batch_size, seed
        self.episodes = [i for i in episodes if dataset.length(i) > clock.steps]
        self.labelled = [i for i in self.episodes if i in set(labelled)]
        if not self.episodes:
            raise ValueError(f"none of {len(list(episodes))} episodes has the {clock.steps + 1} rows that a training "
                             f"clip spans; lower the labeler's `frames`, label video of a rate that divides the "
                             f"robot's, or record longer episodes")  # fmt: skip

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        rng = rng_for(self.seed, "latent batch", step)
        video, action, known = [], [], []
        for n in range(self.batch_size):
            pool = self.labelled if self.labelled and n % 2 else self.episodes
            index = pool[int(rng.integers(len(pool)))]
            start = int(rng.integers(self.dataset.length(index) - self.clock.steps))
            start = int(shown_rows(self.dataset.episode(index))[start])  # of labelled video the row of the new picture
            video.append(self.dataset.canvas(index, start + self.clock.rows))
            known.append(float(index in self.labelled))
            taken = self.dataset.episode(index).action[start : start + self.clock.steps]
            action.append(taken if known[-1] else np.zeros_like(taken))
        return {"video": torch.from_numpy(np.stack(video)), "action": torch.from_numpy(np.stack(action)).float(),
                "known": torch.tensor(known)}  # fmt: skip
