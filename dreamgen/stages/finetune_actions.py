"""Fine-tune an action-conditioned world model on demonstrations, play, failures and disturbed actions together.

Latents are cached once per dataset. A batch takes windows of one random length, with the robot steps that they show,
and remembers earlier frames of the same episodes: the first latent frame of a window is the encoding of its first
picture alone, so what is remembered costs nothing to encode.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dreamgen.core.clip import Past, Prompt
from dreamgen.core.manifest import Stage, fingerprint
from dreamgen.core.seeding import rng_for, seed_for
from dreamgen.data.cache import Cache
from dreamgen.data.lerobot import Dataset
from dreamgen.data.motion import motion_of, weights
from dreamgen.data.recordings import noted
from dreamgen.data.windows import Windows
from dreamgen.engine.compiling import compile_blocks, wanted
from dreamgen.engine.processes import require_alone
from dreamgen.engine.progress import progress
from dreamgen.engine.train import clear_state, train
from dreamgen.video.metrics import psnr
from dreamgen.video.mp4 import write_mp4
from dreamgen.worlds.action import ActionWorld
from dreamgen.worlds.rollout import extend

METHODS = ("full", "lora", "actions")


def finetune_actions(
    world_model: ActionWorld,
    datasets: Sequence[Dataset],
    *,
    out: Path,
    shares: Sequence[float | int] | None = None,
    lengths: Sequence[int] | None = None,
    rest: float = 1.0,
    steps: int = 1000,
    batch_size: int = 16,
    lr: float = 3e-4,
    muon_lr: float | None = None,
    warmup: int = 50,
    ema: float | None = 0.995,
    method: str = "full",
    rank: int = 16,
    alpha: int = 16,
    text_dropout: float = 0.3,
    validation: int = 8,
    hop: int = 2,
    validate_every: int = 250,
    samples: int = 4,
    compile: bool | str = "auto",
    replicas: int = 1,
    seed: int = 0,
    record: dict,
) -> dict:
    """Train on windows of all `datasets` (every `hop`-th row); out: an `ActionWorld.load`, losses and sample videos.

    shares: of a batch, one per dataset; by default as their windows. lengths: frames of a batch's windows, drawn per
    batch (default: one latent frame, half and all of the model's frames). rest: share of a dataset's windows that is
    drawn uniformly; the others are drawn by how much is commanded in them, since robots often wait. method: "full",
    "lora" (an adapter and the action encoder) or "actions" (the encoder alone). validation: episodes of each dataset
    held out, with all that share their first state; the loss at fixed noise under true, shuffled and no actions is
    written every `validate_every` steps, and samples real above dreamt. compile: the transformers' blocks (see
    `dreamgen.engine.compiling`).

    Raises ValueError for another method, shares, lengths or a `rest` that do not fit, datasets of another robot, no
    windows.
    """
    require_alone("finetune_actions")
    world = world_model
    chosen = check(world, datasets, shares, lengths, method)
    if not 0 < rest <= 1:
        raise ValueError(f"rest is {rest}; expected a share above 0 and up to 1, which draws all windows alike")
    parents = {f"dataset_{k}": dataset.root for k, dataset in enumerate(datasets)}
    config = {**record, "base": world.fingerprint()}
    with Stage(out, "finetune_actions", config=config, parents=parents, seed=seed) as run:
        if run.complete:
            clear_state(out)
            return run.manifest()
        world.place()
        sources = [Source(world, dataset, hop=hop, validation=validation, rest=rest, out=out, seed=seed)
                   for dataset in datasets]  # fmt: skip
        for source in sources:
            for _ in progress(source.build(), len(source.cache.missing()), "encode", out, unit="shard"):
                pass
        texts = sorted({dataset.instruction(i) for dataset in datasets for i in range(len(dataset))})
        embedded = world.embed([*texts, ""]).cpu()
        number = {text: k for k, text in enumerate([*texts, ""])}
        world.extension.normaliser.load_state_dict(scales(world, sources))
        part = np.array(shares if shares is not None else [len(s.train) for s in sources], np.float64)
        part = part / part.sum()
        if method == "lora":
            world.train_lora(rank=rank, alpha=alpha)
        else:
            world.train_full() if method == "full" else world.train_actions()
        if wanted(compile, steps=steps):
            compile_blocks(*world.world.trained().values())

        def batch_at(step: int) -> dict[str, Tensor]:
            rng = rng_for(seed, "finetune_actions", step)
            frames = int(rng.choice(chosen))
            rows = []
            for which in rng.choice(len(sources), batch_size, p=part):
                rows.append((sources[which], sources[which].draw(rng)))
            silent = rng.random(batch_size) < (text_dropout if world.instructions else 1)
            text = ["" if quiet else s.text(k) for (s, k), quiet in zip(rows, silent, strict=True)]
            batch = stacked([s.row(k, frames) for s, k in rows])
            return batch | {"text": embedded[[number[t] for t in text]]}

        check_up = Check(world, sources, out, samples=samples, seed=seed)
        result = train(world, batch_at, out=out, steps=steps, lr=lr, muon_lr=muon_lr, warmup=warmup, ema=ema,
                       precision=world.precision, replicas=replicas, seed=seed, checkpoint_every=validate_every,
                       validate=check_up if check_up.rows else None, validate_every=validate_every,
                       name="finetune_actions")  # fmt: skip
        world.requires_grad_(False)
        world.save(out)
        manifest = run.finish(
            windows=sum(len(s.train) for s in sources), episodes=sum(len(d) for d in datasets),
            validation=sum(len(s.held) for s in sources), lengths=chosen,
            parameters=sum(p.numel() for p in world.extension.parameters()), **noted(*datasets),
            **{f"final_{k}": v for k, v in result.items()},
        )  # fmt: skip
        clear_state(out)
        return manifest


def check(world: ActionWorld, datasets: Sequence[Dataset], shares: Sequence[float | int] | None,
          lengths: Sequence[int] | None, method: str) -> list[int]:  # fmt: skip
    """The lengths of windows. ValueError for settings that do not fit together."""
    if method not in METHODS:
        raise ValueError(f"method is '{method}'; expected one of {', '.join(METHODS)}")
    if not datasets or (shares is not None and (len(shares) != len(datasets) or min(shares) < 0 or sum(shares) <= 0)):
        raise ValueError(f"shares are {shares} for {len(datasets)} datasets; expected one share of a batch for each")
    for dataset in datasets:
        world.robot.require(dataset.robot.contract(), f"the dataset {dataset.root}")
        dataset.require_actions("stage.datasets")
    full, gap = world.clock.frames, world.gaps
    most = (full - 1) // gap
    chosen = sorted({1 + gap * n for n in (1, -(-most // 2), most)}) if lengths is None else sorted(map(int, lengths))
    if any((frames - 1) % gap or not 1 < frames <= full for frames in chosen):
        raise ValueError(f"lengths are {chosen}; expected 1 + multiples of {gap} up to the model's {full} frames")
    return chosen


def held_out(dataset: Dataset, count: int, seed: int) -> set[int]:
    """`count` episodes to validate on, or a few more: those that share a first state (meta `pair`) stay together."""
    group = [dataset.episode(i).meta.get("pair") or i for i in range(len(dataset))]
    held: set[int] = set()
    for first in rng_for(seed, "validation").permutation(len(dataset)).tolist():
        if len(held) >= count:
            break
        held |= {i for i, name in enumerate(group) if name == group[first]}
    return held


class Source:
    """The windows of one dataset with their cached latents; some episodes are held out."""

    def __init__(self, world: ActionWorld, dataset: Dataset, *, hop: int, validation: int, out: Path, seed: int,
                 rest: float = 1.0) -> None:  # fmt: skip
        self.world, self.dataset, self.hop = world, dataset, hop
        self.windows = Windows(dataset, world.clock, hop=hop, short="drop")
        self.places = [self.windows.at(k) for k in range(len(self.windows))]
        self.number = {place: k for k, place in enumerate(self.places)}
        key = {"world": world.cache_key(), "data": fingerprint(dataset.root), "hop": hop,
               "skipped": sorted(dataset.skipped)}  # fmt: skip
        self.cache = Cache(out / "cache", key, count=len(self.windows))
        self.held = held_out(dataset, min(validation, len(dataset) // 5), seed)
        self.train = np.array([k for k, (episode, _) in enumerate(self.places) if episode not in self.held])
        if not len(self.train):
            raise ValueError(f"all windows of {dataset.root} are held out ({validation} episodes); hold out fewer")
        motion = motion_of([dataset.episode(i).action for i in range(len(dataset))])
        spans = (self.places[k] for k in self.train)
        moved = np.array([motion[i][start : start + world.clock.steps].mean() for i, start in spans])
        upto = weights(moved, rest).cumsum()
        self.upto = upto / upto[-1]

    def build(self) -> Iterator[int]:
        """Encode what is missing; yields how many windows each shard added."""

        def encode(items: range) -> np.ndarray:
            clips = [self.dataset.canvas(self.places[k][0], self.windows.rows(*self.places[k])) for k in items]
            return self.world.encode(torch.from_numpy(np.stack(clips))).cpu().numpy()

        return self.cache.build(encode)

    def draw(self, rng: np.random.Generator) -> int:
        """A window to train on."""
        return int(self.train[self.upto.searchsorted(rng.random(), side="right")])

    def text(self, k: int) -> str:
        return self.dataset.instruction(self.places[k][0])

    def row(self, k: int, frames: int) -> dict[str, np.ndarray]:
        """Latents, features, maps, memory and ages of window k, cut to `frames` frames."""
        world, (episode, start) = self.world, self.places[k]
        source, clock = self.dataset.episode(episode), world.clock.with_frames(frames)
        action, state = source.action[start : start + clock.steps], source.state[start]
        row = {"latents": self.cache[k][:, : 1 + (frames - 1) // world.gaps],
               "features": world.features(clock.rows, action, state)}  # fmt: skip
        if world.maps:
            row["maps"] = world.drawn(clock.rows, action, state)
        if world.remembered:
            per_second = float(world.robot.rate)
            rows = [0] * world.anchor + [max(0, start - round(age * per_second)) for age in world.history]
            rows = [r - r % self.hop for r in rows]
            row["memory"] = np.stack([self.cache[self.number[episode, r]][:, 0] for r in rows], 1)
            row["ages"] = np.array([(start - r) / per_second for r in rows], np.float32)
        return row


def stacked(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    return {key: torch.from_numpy(np.ascontiguousarray(np.stack([row[key] for row in rows]))) for key in rows[0]}


def scales(world: ActionWorld, sources: Sequence[Source], most: int = 400) -> dict[str, Tensor]:
    """Offset and scale of the features over windows of all datasets; what does not vary keeps scale 1."""
    found = []
    for source in sources:
        for k in np.unique(np.linspace(0, len(source.train) - 1, most).astype(int)):
            found.append(source.row(int(source.train[k]), world.clock.frames)["features"])
    values = np.concatenate(found).astype(np.float64)
    spread = values.std(0)
    return {"offset": torch.from_numpy(values.mean(0)).float(),
            "scale": torch.from_numpy(np.where(spread < 1e-5, 1.0, spread)).float()}  # fmt: skip


class Check:
    """Validation loss at fixed noise under true, shuffled and no actions; samples real above dreamt."""

    def __init__(self, world: ActionWorld, sources: Sequence[Source], out: Path, *, samples: int, seed: int) -> None:
        self.out, self.prompts, self.real = out, [], []
        first = [(s, min(k for k, (e, _) in enumerate(s.places) if e == episode)) for s in sources
                 for episode in sorted(s.held) if any(e == episode for e, _ in s.places)]  # fmt: skip
        self.rows = (first * -(-16 // max(1, len(first))))[:16] if len(first) > 1 else []
        if not self.rows:
            return
        batch = stacked([source.row(k, world.clock.frames) for source, k in self.rows])
        generator = torch.Generator().manual_seed(seed_for(seed, "validation"))
        batch |= {"noise": torch.randn(batch["latents"].shape, generator=generator),
                  "sigma": torch.linspace(0.05, 0.95, len(self.rows))}  # fmt: skip
        self.batch = {k: v.to(world.device) for k, v in batch.items()}
        self.batch["text"] = world.embed([source.text(k) if world.instructions else "" for source, k in self.rows])
        for source, k in first[:samples]:
            episode, row = source.places[k]
            clip = source.dataset.canvas(episode, source.windows.rows(episode, row))
            recorded = source.dataset.episode(episode)
            self.real.append(clip)
            self.prompts.append(Prompt(
                id=f"sample_{len(self.real)}", image=clip[0], instruction=source.text(k), state=recorded.state[row],
                seed=seed_for(seed, "sample", k), action=recorded.action[row : row + world.clock.steps],
            ))  # fmt: skip

    def __call__(self, world: ActionWorld, step: int) -> dict[str, float]:
        figures = {"loss": float(world.loss(self.batch)[0])}
        other = {key: self.batch[key].roll(1, 0) for key in ("features", "maps") if key in self.batch}
        figures["loss_shuffled"] = float(world.loss(self.batch | other)[0])
        pasts = [Past.begin(prompt, world.robot.action_dim) for prompt in self.prompts]
        if pasts:
            videos = [p.video for p in extend(world, pasts, [p.action for p in self.prompts])]
            pairs = [np.concatenate([r, v], 1) for r, v in zip(self.real, videos, strict=True)]
            write_mp4(self.out / "samples" / f"step_{step:06d}.mp4", np.concatenate(pairs, 2), world.clock.video_hz)
            figures["psnr"] = float(np.mean([psnr(r[1:], v[1:]) for r, v in zip(self.real, videos, strict=True)]))
        return figures
