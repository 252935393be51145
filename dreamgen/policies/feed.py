"""What a policy is fed: recordings, dreams and latent actions, each with its body, mixed batch by batch.

`at(step)` is a pure function, so the position of the sampler is the step itself: that is all that a checkpoint needs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dreamgen.data.lerobot import Dataset
from dreamgen.data.mixture import Mixture
from dreamgen.policies.chunks import Chunks, collate
from dreamgen.policies.features import Features, cacheable

PICTURES = 2000  # that an encoder is fitted to


def several(real: Dataset | Sequence[Dataset] | None) -> list[Dataset]:
    """Recordings as a list: of one dataset, of several, of none."""
    return [] if real is None else [real] if isinstance(real, Dataset) else list(real)


class Feed:
    """Batches for `model` of `real` (one dataset, several or none) and `dreams`, in the ratio `ratio`; latent: dreams
    or videos whose actions are those of another embodiment, the body `latent_body` of the model. videos: of the robot,
    without actions, which train the body that acts by FLARE's alignment alone. Both count as dreams.

    fit: whether statistics are taken of the data; False for a model that brings its own. options: for the chunks of all
    datasets; dream_options: of dreams and latents (see `Chunks`). spread_scale: see `Chunks`, in units of the standard
    deviation of the fitted actions.

    Raises ValueError for no data, a dataset of another robot, an unknown body, a horizon longer than all its episodes,
    where no dataset trains the body that the policy acts for, and where the state that chunks are told relative to is
    hidden, made up or known of no observation.
    """

    def __init__(
        self,
        model: Any,
        *,
        real: Dataset | Sequence[Dataset] | None,
        dreams: Sequence[Dataset],
        latent: Sequence[Dataset] = (),
        videos: Sequence[Dataset] = (),
        batch_size: int,
        ratio: str,
        dream_body: str,
        latent_body: str = "latent",
        spread_scale: float | None,
        options: dict[str, Any],
        dream_options: dict[str, Any],
        fit: bool = True,
        seed: int,
    ) -> None:
        reals = several(real)
        self.model, self.datasets, count = model, [*reals, *dreams, *latent], len(reals)
        if not self.datasets:
            raise ValueError("train_policy got neither real data nor dreams; give at least one dataset")
        names = [*["real"] * count, *[dream_body] * len(dreams), *[latent_body] * len(latent)]
        bodies = [model.body(name) for name in names]
        if model.speaks not in bodies:
            spoken, trained = model.bodies[model.speaks], ", ".join(f"'{name}'" for name in dict.fromkeys(names))
            raise ValueError(f"the policy acts for the body '{spoken}', and the data train {trained} alone: it would "
                             f"act through weights that nothing has trained. Give real data, set dream_body={spoken}, "
                             f"or make a policy that speaks for a body that is trained (speaks=...)")  # fmt: skip
        for dataset, body in zip(self.datasets, bodies, strict=True):
            model.spaces.of(body).robot.require(dataset.robot.contract(), f"the dataset {dataset.root}")
        self._require_states(bodies[count:], dream_options.get("state"))
        options = dict(horizon=model.horizon, future_steps=model.future_steps, **options)
        self.chunks = []
        for k, (dataset, body) in enumerate(zip(self.datasets, bodies, strict=True)):
            dreamt: dict[str, Any] = {} if k < count else dict(dream_options)
            if k >= count and spread_scale is not None:
                dreamt |= dict(spread_scale=spread_scale, action_scale=self._scale(k, bodies, count))
            needed = model.spaces.of(body).relative_to
            self.chunks.append(Chunks(dataset, body=body, relative_to=needed, **options, **dreamt))
        own = [k for k, body in enumerate(bodies) if model.spaces.of(body) is model.space]
        if fit:
            self._fit(own[:count] or own, 0)
            for body in sorted(set(bodies) - {bodies[k] for k in own}):
                self._fit([k for k, b in enumerate(bodies) if b == body], body)
        self._watch(videos, options)
        self.mixture = Mixture(real=self.chunks[:count], dreams=self.chunks[count:], batch_size=batch_size,
                               ratio=ratio if count else "0:1", seed=seed)  # fmt: skip

    def _require_states(self, bodies: Sequence[int], state: str | None) -> None:
        """ValueError where the chunks of these bodies, of dreams, are told relative to states that are not theirs."""
        if state in ("masked", "zero") and any(self.model.spaces.of(body).needs_state for body in bodies):
            frame = self.model.config["frame"]
            raise ValueError(f"dream_state is '{state}', and policy.frame is '{frame}', which tells chunks relative to "
                             f"the state at their start; take dream_state=recorded with dreams whose states are known, "
                             f"or policy.frame=recorded")  # fmt: skip

    def _watch(self, videos: Sequence[Dataset], options: dict[str, Any]) -> None:
        """Take in videos without actions, by which nothing is fitted."""
        if videos and self.model.flare is None:
            raise ValueError("stage.videos are without actions, so that FLARE's alignment alone learns from them, and "
                             "policy.align_weight is 0; set it (0.2), or leave the videos out")  # fmt: skip
        for dataset in videos:
            if dataset.has_actions:
                raise ValueError(f"stage.videos holds {dataset.root}, opened with its actions; open it with "
                                 f"actions=false, or give it as real or dreams")  # fmt: skip
            self.model.robot.require(dataset.robot.contract(), f"the dataset {dataset.root}")
            self.datasets.append(dataset)
            self.chunks.append(Chunks(dataset, body=self.model.speaks, **options))

    def _scale(self, k: int, bodies: list[int], count: int) -> np.ndarray:
        """Standard deviation of the recorded actions; of the dataset's own where it has another kind of action."""
        same = count and self.model.spaces.of(bodies[k]) is self.model.space
        chosen = self.datasets[:count] if same else [d for d, b in zip(self.datasets, bodies, strict=True)
                                                     if b == bodies[k]]  # fmt: skip
        scale = np.concatenate([dataset.actions() for dataset in chosen]).std(0)
        return np.where(scale < 1e-5, 1, scale)

    def _fit(self, numbers: Sequence[int], body: int) -> None:
        if not numbers:
            return
        chosen = [self.chunks[k] for k in numbers]
        needs, pictures = self.model.spaces.of(body).needs_state, None
        if body == 0 and hasattr(self.model.encoder, "fit"):
            pictures = np.concatenate([chunks.sample(-(-PICTURES // len(chosen))) for chunks in chosen])
        self.model.fit(np.concatenate([chunks.states() for chunks in chosen]),
                       np.concatenate([chunks.whole() for chunks in chosen]), pictures, body=body,
                       start=np.concatenate([chunks.starts() for chunks in chosen]) if needs else None)  # fmt: skip

    def cache(self, folder: Path) -> bool:
        """Compute a frozen encoder's features once, in `folder`; False where the pictures' features change."""
        if not cacheable(self.model):
            return False
        for chunks in self.chunks:
            chunks.features = Features(chunks, self.model.encoder, folder)
        return True

    def _by_dataset(self, step: int) -> dict[int, list[tuple[int, int]]]:
        draw = self.mixture.at(step)
        places = list(zip(draw.episode.tolist(), draw.row.tolist(), strict=True))
        mine = {k: [p for p, d in zip(places, draw.dataset, strict=True) if d == k] for k in range(len(self.chunks))}
        return {k: found for k, found in mine.items() if found}

    def at(self, step: int) -> dict[str, torch.Tensor]:
        """The batch of a step, with what it weighs as a whole."""
        parts = [self.chunks[k].batch(places) for k, places in self._by_dataset(step).items()]
        return self.model.whole(collate(parts, self.model.encoder.words))

    def describe(self, step: int) -> str:
        """The episodes of a step's batch, in words and by their datasets' own numbers."""
        named = {k: sorted({self.datasets[k].index(i) for i, _ in places})
                 for k, places in self._by_dataset(step).items()}  # fmt: skip
        return "; ".join(f"episodes {', '.join(map(str, e))} of {self.datasets[k].root}" for k, e in named.items())
