"""Fine-tune an action-conditioned world model on demonstrations, play, failures and disturbed actions together.

A batch takes windows of one random length (see `action_windows`), with the robot steps that they show, and remembers
earlier frames of the same episodes. On one process or, as `finetune`, on several.
"""

from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dreamgen.core.clip import Prompt
from dreamgen.core.manifest import Stage
from dreamgen.core.seeding import rng_for, seed_for
from dreamgen.data.cache import require_known
from dreamgen.data.groups import group_of, others
from dreamgen.data.lerobot import Dataset
from dreamgen.data.recordings import noted
from dreamgen.engine.compiling import compile_blocks, wanted
from dreamgen.engine.cost import Transformer
from dreamgen.engine.precision import best_device
from dreamgen.engine.processes import join, require_sharding, wait
from dreamgen.engine.replicas import possible
from dreamgen.engine.shares import Rows, require_rows
from dreamgen.engine.train import clear_state, train
from dreamgen.stages.action_windows import Source, scales, stacked
from dreamgen.stages.latents import build, embeddings
from dreamgen.stages.memory import require_memory
from dreamgen.video.metrics import psnr
from dreamgen.video.mp4 import write_mp4
from dreamgen.worlds.action import ActionWorld
from dreamgen.worlds.rollout import follow_prompts
from dreamgen.worlds.sampler import enough

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
    rank: int | None = None,
    alpha: int | None = None,
    text_dropout: float = 0.3,
    validation: int = 8,
    hop: int = 2,
    validate_every: int = 250,
    samples: int = 4,
    cache: Path | None = None,
    accumulate: int = 1,
    checkpointing: bool = False,
    compile: bool | str = "auto",
    sharding: str = "ddp",
    replicas: int = 1,
    seed: int = 0,
    record: dict,
) -> dict:
    """Train on windows of all `datasets` (every `hop`-th row); out: an `ActionWorld.load`, losses and sample videos.

    shares: of a batch, one per dataset; by default as their windows. lengths: frames of a batch's windows, drawn per
    batch (default: one latent frame, half and all of the model's frames). rest: share of a dataset's windows that is
    drawn uniformly; the others are drawn by how much is commanded in them, since robots often wait. method: "full",
    "lora" (an adapter and the action encoder) or "actions" (the encoder alone); adapters that the world model came with
    become part of its weights. validation: episodes of each dataset held out, with all that share their first state;
    the loss at fixed noise under true, shuffled and no actions is written every `validate_every` steps (0: at the end
    alone), and samples real above dreamt, both of all datasets in turn. batch_size: rows of all processes together.
    cache: a folder of latents to share between runs; `out/cache` where None. accumulate: parts of a batch whose
    gradients are added up; these, and the shares of processes, have errors weighted within themselves (`tool_weight`).
    checkpointing: keep only the inputs of blocks, and compute these again in the backward pass. compile: the
    transformers' blocks (see `dreamgen.engine.compiling`). sharding, replicas: see `dreamgen.engine.train`.

    Windows that begin in a state which nobody knows are left out where pose maps show it, and those of labelled video
    that show a picture of an earlier row; both are counted.

    Raises ValueError for another method or sharding, shares, lengths or a `rest` that do not fit, datasets of another
    robot, no windows, a batch of fewer rows than parts, an instruction that is read and has more tokens than are, a
    cache of other content, and on a GPU where the first step cannot fit.
    """
    require_sharding(sharding)
    world = world_model
    chosen = check(world, datasets, shares, lengths, method)
    if not 0 < rest <= 1:
        raise ValueError(f"rest is {rest}; expected a share above 0 and up to 1, which draws all windows alike")
    process, count = join()
    forks, shards = possible(replicas, best_device()) if count == 1 else 1, count if sharding == "fsdp2" else 1
    require_rows(batch_size, count * forks, accumulate)
    parents = {f"dataset_{k}": dataset.root for k, dataset in enumerate(datasets)}
    base = world.fingerprint()
    with Stage(out, "finetune_actions", config={**record, "base": base}, parents=parents, seed=seed,
               writes=process == 0) as run:  # fmt: skip
        if run.complete:
            clear_state(out)
            return run.manifest()
        wait()
        world.place(experts=shards == 1)  # what is cut goes to the GPU block by block
        world.world.fuse_adapters()
        world.world.require_plain()
        told = datasets if world.instructions else ()  # a model that reads none is asked for none
        texts = sorted({dataset.instruction(i) for dataset in told for i in range(len(dataset))})
        prompts = [world.world.prompt(text) for text in texts]
        world.world.layout.require_read(prompts)
        where = out / "cache" if cache is None else Path(cache)
        sources = [Source(world, dataset, hop=hop, validation=validation, rest=rest, root=where, seed=seed)
                   for dataset in datasets]  # fmt: skip
        if cache is not None:
            require_known(where, [source.cache.key for source in sources])
        build([(source.cache, source.encode) for source in sources], out, rank=process, count=count,
              replicas=possible(replicas, best_device()))  # fmt: skip
        embedded = embeddings(world.world, prompts, where, base=base, first=process == 0)
        number = {text: k for k, text in enumerate([*texts, ""])}
        world.extension.normaliser.load_state_dict(scales(world, sources))
        part = np.array(shares if shares is not None else [len(s.train) for s in sources], np.float64)
        part = part / part.sum()
        if method == "lora":
            torch.manual_seed(seed_for(seed, "adapter"))  # whatever was drawn before, here or before a kill
            world.train_lora(rank=rank, alpha=alpha)
        elif method == "actions":
            world.train_actions()
        _require_memory(world, -(-batch_size // (count * accumulate * forks)), embedded.length, lora=method != "full",
                        checkpointing=checkpointing, ema=bool(ema), accumulate=accumulate, shards=shards)  # fmt: skip
        if method == "full":
            world.train_full()  # in fp32: for that there is room
        transformers = world.world.trained().values()
        for module in transformers if checkpointing else ():
            module.enable_gradient_checkpointing()
        if wanted(compile, steps=steps):
            compile_blocks(*transformers)

        def batch_at(step: int) -> Rows:
            rng = rng_for(seed, "finetune_actions", step)
            frames = int(rng.choice(chosen))
            rows = []
            for which in rng.choice(len(sources), batch_size, p=part):
                rows.append((sources[which], sources[which].draw(rng)))
            silent = rng.random(batch_size) < (text_dropout if world.instructions else 1)
            text = [number["" if quiet else s.text(k)] for (s, k), quiet in zip(rows, silent, strict=True)]
            return Rows(batch_size, lambda mine: stacked([s.row(k, frames) for s, k in rows[mine]])
                        | {"text": embedded.take(text[mine])})  # fmt: skip

        check_up = Check(world, sources, out, lambda texts: embedded.take([number[text] for text in texts]),
                         samples=samples, size=-(-batch_size // (count * accumulate)), seed=seed,
                         write=process == 0)  # fmt: skip
        result = train(world, batch_at, out=out, steps=steps, lr=lr, muon_lr=muon_lr, warmup=warmup, ema=ema,
                       precision=world.precision, replicas=replicas, seed=seed, accumulate=accumulate,
                       sharding=sharding, checkpoint_every=validate_every or 250, validate_every=validate_every,
                       validate=check_up if check_up.rows else None, name="finetune_actions")  # fmt: skip
        world.requires_grad_(False)
        for module in transformers if checkpointing else ():
            module.disable_gradient_checkpointing()
        if process == 0:
            world.save(out)
        manifest = run.finish(
            windows=sum(len(s.train) for s in sources), episodes=sum(len(d) for d in datasets),
            windows_of_unknown_state=sum(s.unknown for s in sources),
            windows_of_old_pictures=sum(s.old for s in sources), validation=sum(len(s.held) for s in sources),
            lengths=chosen,
            parameters=sum(p.numel() for p in world.extension.parameters()), **noted(*datasets),
            **{f"final_{k}": v for k, v in result.items()},
        )  # fmt: skip
        if process == 0:
            clear_state(out)
        wait()
        return manifest


def check(world: ActionWorld, datasets: Sequence[Dataset], shares: Sequence[float | int] | None,
          lengths: Sequence[int] | None, method: str) -> list[int]:  # fmt: skip
    """The lengths of windows. ValueError for settings that do not fit together."""
    if method not in METHODS:
        raise ValueError(f"method is '{method}'; expected one of {', '.join(METHODS)}")
    if (expert := getattr(world.world, "expert", "both")) != "both":
        raise ValueError(f"the world model would train its expert '{expert}' alone, and actions enter both by the same "
                         f"weights: set stage.world_model.world.expert=both")  # fmt: skip
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


def _require_memory(world: ActionWorld, clips: int, text: int, **how: Any) -> None:
    """See `require_memory`; windows are as long as they come, behind the frames that are remembered."""
    base, (_, time, h, w) = world.world, world.world.latent_shape
    sizes = Transformer.of({**base.transformer.config, "_class_name": type(base.transformer).__name__})
    tokens = sizes.tokens((time + world.remembered, h, w))
    require_memory([*base.trained().values(), world.extension], sizes, [(clips, tokens)], text, held=base.weights,
                   **how)  # fmt: skip


class Check:
    """Validation loss at fixed noise under true, shuffled and no actions; samples real above dreamt. `size` rows of
    either at a time."""

    def __init__(self, world: ActionWorld, sources: Sequence[Source], out: Path,
                 embed: Callable[[Sequence[str]], Tensor], *, samples: int, size: int, seed: int,
                 write: bool) -> None:  # fmt: skip
        self.out, self.size, self.write, self.prompts, self.real = out, size, write, [], []
        held = []
        for source in sources:
            begun = {source.places[k][0]: k for k in reversed(source.kept)}
            held.append([(source, begun[episode]) for episode in sorted(source.held) if episode in begun])
        first = [row for turn in zip_longest(*held) for row in turn if row is not None]  # of all datasets in turn
        self.rows = (first * -(-16 // max(1, len(first))))[:16] if len(first) > 1 else []
        self.other = others([(id(source), group_of(source.dataset, source.places[k][0])) for source, k in self.rows])
        if not self.rows:
            return

        def read(source: Source, k: int) -> str:
            return source.text(k) if world.instructions else ""

        batch = stacked([source.row(k, world.clock.frames) for source, k in self.rows])
        generator = torch.Generator().manual_seed(seed_for(seed, "validation"))
        low, high = world.world.times
        batch |= {"noise": torch.randn(batch["latents"].shape, generator=generator),
                  "sigma": low + (high - low) * torch.linspace(0.05, 0.95, len(self.rows)),
                  "present": torch.ones(len(self.rows), dtype=torch.bool),
                  "text": embed([read(source, k) for source, k in self.rows])}  # fmt: skip
        self.batch = {k: v.to(world.device) for k, v in batch.items()}
        for source, k in first[:samples]:
            episode, row = source.places[k]
            clip = source.dataset.canvas(episode, source.windows.rows(episode, row))
            recorded = source.dataset.episode(episode)
            self.real.append(clip)
            self.prompts.append(Prompt(
                id=f"sample_{len(self.real)}", image=clip[0], instruction=read(source, k), state=source.state(k),
                seed=seed_for(seed, "sample", k), action=recorded.action[row : row + world.clock.steps],
            ))  # fmt: skip
        if self.prompts:
            world.read([prompt.instruction for prompt in self.prompts])

    def __call__(self, world: ActionWorld, step: int) -> dict[str, float]:
        other = {key: self.batch[key][self.other] for key in ("features", "maps") if key in self.batch}
        none = {"present": torch.zeros_like(self.batch["present"])}
        streams = {"loss": {}, "loss_shuffled": other, "loss_without": none}
        figures = {name: self._loss(world, self.batch | changed) for name, changed in streams.items()}
        if self.prompts:
            videos = self._dreamed(world, step)
            pairs = [np.concatenate([r, v], 1) for r, v in zip(self.real, videos, strict=True)]
            if self.write:
                film = self.out / "samples" / f"step_{step:06d}.mp4"
                write_mp4(film, np.concatenate(pairs, 2), world.clock.video_hz)
            figures["psnr"] = float(np.mean([psnr(r[1:], v[1:]) for r, v in zip(self.real, videos, strict=True)]))
        return figures

    def _dreamed(self, world: ActionWorld, step: int) -> list[np.ndarray]:
        less = "stage.samples=0, which leaves them out, or world_model.guidance_mode=two_pass"
        with enough(f"dreaming samples at step {step}, {self.size} at a time", less):
            return [past.video for past in follow_prompts(world, self.prompts, batch_size=self.size)]

    def _loss(self, world: ActionWorld, batch: dict[str, Tensor]) -> float:
        total, rows = 0.0, len(self.rows)
        for start in range(0, rows, self.size):
            part = {key: value[start : start + self.size] for key, value in batch.items()}
            total += float(world.loss(part)[0]) * len(part["sigma"])
        return total / rows
