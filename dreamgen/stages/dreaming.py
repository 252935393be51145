"""Batch after batch of dreams: the next one is denoised while the last one is decoded, judged and written.

With best of n a prompt is dreamed under n seeds, its own first; the clip that a filter likes best is kept.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dreamgen.core.clip import Clip, Labels, Prompt
from dreamgen.core.protocols import Filter, Labeler, WorldModel
from dreamgen.core.seeding import seed_for
from dreamgen.engine.behind import Behind
from dreamgen.stages.sharing import grouped


def clips_at_once(world_model: WorldModel, batch_size: int, token_budget: int | None) -> int:
    """How many clips one forward pass takes: `batch_size`, or fewer where `token_budget` latent tokens hold fewer.

    Raises ValueError for a batch below 1, a budget smaller than one clip, and a budget on a world model that does not
    say how many tokens its clips have (`clip_tokens`).
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected 1 or more")
    if token_budget is None:
        return batch_size
    tokens = getattr(world_model, "clip_tokens", None)
    if tokens is None:
        raise ValueError(f"token_budget is {token_budget}, but {type(world_model).__name__} does not say how many "
                         "latent tokens a clip has; leave it out and set batch_size")  # fmt: skip
    if token_budget < tokens:
        raise ValueError(f"token_budget is {token_budget}; one clip has {tokens} latent tokens. Give it at least as "
                         "many, or dream fewer frames or smaller views.")  # fmt: skip
    return min(batch_size, token_budget // tokens)


class Best:
    """Of `count` seeds of each prompt the clip with the highest score, the first of equals; without a filter the first.

    filter: scores clips; one that reads labels needs a labeler. Raises ValueError for a count below 1, several seeds
    without a filter, and a filter that lacks its labeler or its reference.
    """

    def __init__(self, count: int, filter: Filter | None, labeler: Labeler | None) -> None:
        if count < 1 or (count > 1 and filter is None):
            raise ValueError(f"best_of is {count} and filter is {type(filter).__name__}; expected 1 or more, and a "
                             "filter to choose by where it is more than 1")  # fmt: skip
        if filter is not None and getattr(filter, "needs_labels", True) and labeler is None:
            raise ValueError(f"filter '{filter.name}' scores labels; give the stage a labeler, or choose a filter of "
                             "video alone (frozen, cut, a judge)")  # fmt: skip
        if getattr(filter, "half", 0.5) is None:
            raise ValueError(f"filter '{filter.name}' has no reference, which only curation takes from recordings; set "
                             f"its `half` (filter.{filter.name}.half)")  # fmt: skip
        self.count, self.filter, self.labeler = count, filter, labeler

    def seeds(self, prompt: Prompt) -> list[Prompt]:
        """The prompt as it is, then under further seeds, functions of its own."""
        more = [seed_for(prompt.seed, "best of", k) for k in range(1, self.count)]
        return [prompt, *(replace(prompt, seed=seed) for seed in more)]

    def choose(self, clips: Sequence[Clip]) -> Clip:
        """The best clip of one prompt, with its score and the mean score of all in `scores`; nan abstains."""
        if self.filter is None:
            return clips[0]
        labels = [Labels(value=np.zeros((0, 0), np.float32), spread=np.zeros((0, 0), np.float32))] * len(clips)
        if getattr(self.filter, "needs_labels", True):
            labels = self.labeler.label(clips)
        scores = np.asarray(self.filter.score(clips, labels), np.float64)
        told = scores[np.isfinite(scores)]
        best = clips[int(np.argmax(np.where(np.isfinite(scores), scores, -np.inf)))]
        if not len(told):
            return best
        found = {self.filter.name: float(told.max()), f"{self.filter.name}_mean_of_{self.count}": float(told.mean())}
        return replace(best, scores=best.scores | found)


def pays(world_model: Any) -> bool:
    """Whether a thread of decoding speeds things up: on a GPU, and on a CPU with cores that denoising leaves free."""
    if getattr(world_model, "device", torch.device("cpu")).type == "cuda":
        return True
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores > torch.get_num_threads()


class Dreamer:
    """Dreams groups of prompts, `size` clips a forward pass, and calls `write` with one clip per prompt, in order.

    overlap: decode and write in a thread; None decides by what pays. A world model without `denoise` and `clips`
    dreams as a whole, and only the rest is done in the thread. Use as a context.
    """

    def __init__(self, world_model: WorldModel, write: Callable[[Clip], None], *, size: int, best: Best,
                 overlap: bool | None = None) -> None:  # fmt: skip
        self.world, self.write, self.size, self.best = world_model, write, size, best
        self.halves = all(hasattr(world_model, name) for name in ("denoise", "clips"))
        self.behind = Behind(self._rest) if (pays(world_model) if overlap is None else overlap) else None
        self.held: list[Clip] = []
        self.stream: Any = None

    def __enter__(self) -> "Dreamer":
        return self

    def __exit__(self, *error: Any) -> None:
        if self.behind is not None:
            self.behind.__exit__(*error)

    def __call__(self, prompts: Sequence[Prompt]) -> None:
        """Dream a group. Its clips are written by the time that the context ends."""
        every = [seeded for prompt in prompts for seeded in self.best.seeds(prompt)]
        for part in grouped(every, self.size):
            made = self.world.denoise(part) if self.halves else self.world.dream(part)
            ready = torch.cuda.current_stream().record_event() if getattr(made, "is_cuda", False) else None
            (self._rest if self.behind is None else self.behind)(part, made, ready)

    def _rest(self, prompts: Sequence[Prompt], made: Any, ready: Any) -> None:
        """Latents to clips on disk; on a GPU on a stream of their own once the latents are `ready`."""
        if ready is None:
            clips = self.world.clips(prompts, made) if self.halves else made
        else:
            self.stream = self.stream or torch.cuda.Stream(made.device)
            with torch.cuda.stream(self.stream):
                self.stream.wait_event(ready)
                made.record_stream(self.stream)
                clips = self.world.clips(prompts, made)
        self.held += clips
        while len(self.held) >= self.best.count:
            clip = self.best.choose(self.held[: self.best.count])
            del self.held[: self.best.count]
            self.write(clip)
