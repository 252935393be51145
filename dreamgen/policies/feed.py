"""What a policy is fed: recordings, dreams and latent actions, of one robot or several, mixed batch by batch.

`at(step)` is a pure function, so the position of the sampler is the step itself: that is all that a checkpoint needs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dreamgen.core import rotations
from dreamgen.data.lerobot import Dataset
from dreamgen.data.mixture import Mixture
from dreamgen.policies.chunks import Chunks, collate
from dreamgen.policies.features import Features, cacheable

PICTURES = 2000  # that an encoder is fitted to


Some = Dataset | Sequence[Dataset] | None
KINDS = {
    "real": "real",
    "dreams": "dream",
    "videos": "video",
}  # of the data of a body, and how each is named in results


def several(given: Some) -> list[Dataset]:
    """Datasets as a list: of one, of several, of none."""
    return [] if given is None else [given] if isinstance(given, Dataset) else list(given)


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A dataset, what it counts as (real, dream, latent or video), the body that it trains, None for the one that acts,
    and the key of the stage under which it was given."""

    dataset: Dataset
    kind: str
    body: str | None
    key: str


def sources(real: Some, dreams: Some = (), latent: Some = (), videos: Some = (),
            others: Mapping[str, Any] | None = None, *, dream_body: str = "dream",
            latent_body: str = "latent") -> list[Source]:  # fmt: skip
    """All datasets, recordings first, then dreams and latents, then videos. others: {body: {real, dreams, videos}}.
    ValueError for data of a body that are none of these."""
    given = [("real", "real", "real", real), ("dream", dream_body, "dreams", dreams),
             ("latent", latent_body, "latent", latent), ("video", None, "videos", videos)]  # fmt: skip
    for body, data in (others or {}).items():
        if not isinstance(data, Mapping) or data.keys() - KINDS.keys():
            got = sorted(data) if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(f"stage.others.{body} is {got}; expected a map of {', '.join(KINDS)}, each of which is a "
                             f"dataset or a list of them: others={{{body}: {{real: ...}}}}")  # fmt: skip
        given += [(KINDS[key], body, f"others.{body}.{key}", some) for key, some in data.items()]
    found = [Source(dataset=dataset, kind=kind, body=body, key=key) for kind, body, key, some in given
             for dataset in several(some)]  # fmt: skip
    return sorted(found, key=lambda source: ["real", "dream", "latent", "video"].index(source.kind))


class Feed:
    """Batches for `model` of `real` (one dataset, several or none) and `dreams`, in the ratio `ratio`; latent: dreams
    or videos whose actions are those of another embodiment, the body `latent_body` of the model. videos: of the robot,
    without actions, which train the body that acts by FLARE's alignment alone. Both count as dreams. others: data of
    other bodies, such as those of other robots, {body: {real, dreams, videos}}; they count as what they are.

    fresh: the bodies that begin with no weights of another policy; of robots that have no others statistics are taken
    of the data. None for all, and for an encoder that is fitted to pictures. options: for the chunks of all datasets
    (as an attribute: for those of further ones, with the memory and the disk that are left); dream_options: of dreams
    and latents (see `Chunks`). spread_scale: see `Chunks`, in units of the standard deviation of the fitted actions.

    Raises ValueError for no data, a dataset of another robot, an unknown body, a horizon longer than all its episodes,
    where no actions train the body that the policy acts for, or any of a robot, and these begin afresh, and where the
    state that chunks are told relative to is hidden, made up or known of no observation.
    """

    def __init__(
        self,
        model: Any,
        *,
        real: Some,
        dreams: Sequence[Dataset],
        latent: Sequence[Dataset] = (),
        videos: Sequence[Dataset] = (),
        others: Mapping[str, Any] | None = None,
        batch_size: int,
        ratio: str,
        dream_body: str,
        latent_body: str = "latent",
        spread_scale: float | None,
        options: dict[str, Any],
        dream_options: dict[str, Any],
        fresh: Sequence[int] | None = None,
        seed: int,
    ) -> None:
        every = sources(real, dreams, latent, videos, others, dream_body=dream_body, latent_body=latent_body)
        told = [source for source in every if source.kind != "video"]
        count = sum(source.kind == "real" for source in told)
        self.model, self.datasets = model, [source.dataset for source in told]
        begun = fresh is not None and model.speaks not in fresh
        if not (every if begun else told):
            raise ValueError("train_policy got neither real data nor dreams; give at least one dataset")
        bodies = [self._body(source) for source in told]
        if not begun and model.speaks not in bodies:
            spoken, trained = (
                model.bodies[model.speaks],
                ", ".join(dict.fromkeys(f"'{source.body}'" for source in told)),
            )
            raise ValueError(f"the policy acts for the body '{spoken}', and the data train {trained} alone: it would "
                             f"act through weights that nothing has trained. Give real data, set dream_body={spoken}, "
                             f"or make a policy that speaks for a body that is trained (speaks=...)")  # fmt: skip
        for dataset, body in zip(self.datasets, bodies, strict=True):
            model.spaces.of(body).robot.require(dataset.robot.contract(), f"the dataset {dataset.root}")
        watched = [source for source in every if source.kind == "video"]
        fit = None if fresh is None else self._without_statistics(fresh)
        self._require_taught(bodies, fit)
        self._require_states(bodies[count:], dream_options.get("state"))
        self.options = options = dict(horizon=model.horizon, future_steps=model.future_steps, **options)
        self.chunks = []
        for k, (dataset, body) in enumerate(zip(self.datasets, bodies, strict=True)):
            dreamt: dict[str, Any] = {} if k < count else dict(dream_options)
            if k >= count and spread_scale is not None:
                dreamt |= dict(spread_scale=spread_scale, action_scale=self._scale(k, bodies, count))
            needed = model.spaces.of(body).relative_to
            self._take(dataset, options, body=body, relative_to=needed, **dreamt)
        self._fit(bodies, count, fit, [source.kind for source in told])
        self._watch(watched, options)
        self.mixture = Mixture(real=self.chunks[:count], dreams=self.chunks[count:], batch_size=batch_size,
                               ratio=ratio if count else "0:1", seed=seed)  # fmt: skip

    def _take(self, dataset: Dataset, options: dict[str, Any], **more: Any) -> None:
        """The chunks of one more dataset, for whose pictures the memory and the disk are left that others before it do
        not take."""
        self.chunks.append(Chunks(dataset, **options, **more))
        if "memory_gb" in options:
            options["memory_gb"] -= self.chunks[-1].held_gb
        if "reserve_gb" in options:
            options["reserve_gb"] += self.chunks[-1].kept_gb

    def _without_statistics(self, fresh: Sequence[int]) -> list[int]:
        """The bodies of robots all of whose bodies are `fresh`."""
        each = self.model.spaces.each
        return [body for body in fresh if all(k in fresh for k, space in enumerate(each) if space is each[body])]

    def _require_taught(self, bodies: Sequence[int], fit: Sequence[int] | None) -> None:
        """ValueError where `bodies`, which have actions, leave out a robot that begins with no weights of another
        policy: whoever asks for it would be served by what nothing has trained."""
        space = self.model.spaces.of
        fresh = range(len(self.model.bodies)) if fit is None else fit
        taught = [space(body) for body in bodies]
        if lost := [self.model.bodies[body] for body in fresh if space(body) not in taught]:
            robot = space(self.model.body(lost[0])).robot.name
            raise ValueError(f"no data train the robot '{robot}', of the bodies {lost}; give its data in stage.others "
                             f"(videos alone teach no actions), or leave it out of policy.robots and policy.bodies"
                             )  # fmt: skip

    def _require_states(self, bodies: Sequence[int], state: str | None) -> None:
        """ValueError where the chunks of these bodies, of dreams, are told relative to states that are not theirs."""
        if state in ("masked", "zero") and any(self.model.spaces.of(body).needs_state for body in bodies):
            frame = self.model.config["frame"]
            raise ValueError(f"dream_state is '{state}', and policy.frame is '{frame}', which tells chunks relative to "
                             f"the state at their start; take dream_state=recorded with dreams whose states are known, "
                             f"or policy.frame=recorded")  # fmt: skip

    def _body(self, source: Source) -> int:
        """The number of the body that a source trains."""
        return self.model.speaks if source.body is None else self.model.body(source.body)

    def _watch(self, videos: Sequence[Source], options: dict[str, Any]) -> None:
        """Take in videos without actions, by which nothing is fitted."""
        for source in videos:
            dataset = source.dataset
            if self.model.flare is None:
                raise ValueError(f"stage.{source.key} are without actions, so that FLARE's alignment alone learns from "
                                 f"them, and policy.align_weight is 0; set it (0.2), or leave them out")  # fmt: skip
            if dataset.has_actions:
                raise ValueError(f"stage.{source.key} holds {dataset.root}, opened with its actions; open it with "
                                 f"actions=false, or give it as real or dreams")  # fmt: skip
            body = self._body(source)
            self.model.spaces.of(body).robot.require(dataset.robot.contract(), f"the dataset {dataset.root}")
            self.datasets.append(dataset)
            self._take(dataset, options, body=body)

    def _scale(self, k: int, bodies: list[int], count: int) -> np.ndarray:
        """Standard deviation of the robot's recorded actions, of rotations about an axis, as their spread is; where
        there are none, of those that its body learns."""
        space = self.model.spaces.of
        same = [d for d, b in zip(self.datasets[:count], bodies, strict=False) if space(b) is space(bodies[k])]
        chosen = same or [d for d, b in zip(self.datasets, bodies, strict=True) if b == bodies[k]]
        actions = np.concatenate([dataset.actions() for dataset in chosen])
        scale = actions.std(0)
        for part in space(bodies[k]).robot.action:
            if part.rotation:
                told = actions[:, part.slice]
                scale[part.slice] = rotations.vectors(part, told, rotations.mean(rotations.read(part, told))).std()
        return np.where(scale < 1e-5, 1, scale)

    def _fit(self, bodies: Sequence[int], count: int, fit: Sequence[int] | None, kinds: Sequence[str]) -> None:
        """Statistics of each robot from its recordings, or from its dreams where it has none; pictures of all of them,
        not of latents, for an encoder that is fitted to some."""
        spaces, looked = [self.model.spaces.of(body) for body in bodies], []
        for space in dict.fromkeys(spaces):
            members = [k for k, other in enumerate(spaces) if other is space]
            chosen = [k for k in members if k < count] or members
            looked += [k for k in chosen if kinds[k] != "latent"]
            if fit is None or space in [self.model.spaces.of(body) for body in fit]:
                rest = [k for k in members if k not in chosen]
                self._fit_robot(*([self.chunks[k] for k in some] for some in (chosen, rest)), bodies[chosen[0]])
        if fit is None and hasattr(self.model.encoder, "fit"):
            pictures: dict[int, list[np.ndarray]] = {}  # by their number of views
            for k in looked:
                some = self.chunks[k].sample(-(-PICTURES // len(looked)))
                pictures.setdefault(some.shape[1], []).append(some)
            self.model.fit_encoder(*map(np.concatenate, pictures.values()))

    def _fit_robot(self, chosen: Sequence[Chunks], rest: Sequence[Chunks], body: int) -> None:
        needs = self.model.spaces.of(body).needs_state

        def whole(some: Sequence[Chunks]) -> tuple[np.ndarray, np.ndarray | None]:
            starts = np.concatenate([chunks.starts() for chunks in some]) if needs else None
            return np.concatenate([chunks.whole() for chunks in some]), starts

        action, start = whole(chosen)
        self.model.fit(np.concatenate([chunks.states() for chunks in chosen]), action, start=start, body=body,
                       others=whole(rest) if rest else None)  # fmt: skip

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
