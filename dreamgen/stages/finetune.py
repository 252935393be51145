"""Stage 1: fine-tune a world model on the target robot's dataset, on cached latents and text.

On one process or, started by `torchrun` or `srun`, on several: they encode together, share each batch, and one writes.
"""

import logging
from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from dreamgen.core.manifest import Stage
from dreamgen.core.seeding import rng_for, seed_for
from dreamgen.data.buckets import Buckets, ClipPool, Shape
from dreamgen.data.cache import require_known
from dreamgen.data.groups import groups_of, held_out
from dreamgen.data.lerobot import Dataset
from dreamgen.data.recordings import noted
from dreamgen.engine.compiling import compile_blocks, wanted
from dreamgen.engine.cost import Transformer
from dreamgen.engine.journal import require_tracker
from dreamgen.engine.precision import best_device
from dreamgen.engine.processes import join, require_sharding, wait
from dreamgen.engine.replicas import possible
from dreamgen.engine.shares import Rows, require_rows
from dreamgen.engine.train import clear_state, train
from dreamgen.stages.latents import Latents
from dreamgen.stages.memory import require_memory
from dreamgen.stages.validation import Validation
from dreamgen.worlds.autoencoder import Autoencoding
from dreamgen.worlds.sampler import enough
from dreamgen.worlds.world import VideoWorld

log = logging.getLogger(__name__)
DECODER_ROWS = 4  # clips that the decoder learns from at a step, whatever shares them


def finetune(
    world_model: VideoWorld,
    dataset: Dataset | Sequence[Dataset],
    *,
    out: Path,
    steps: int = 1000,
    batch_size: int = 16,
    token_budget: int | None = None,
    lengths: Sequence[int] | None = None,
    short: str = "drop",
    lr: float = 3e-4,
    muon_lr: float | None = None,
    warmup: int = 50,
    ema: float | None = 0.995,
    method: str = "full",
    rank: int | None = None,
    alpha: int | None = None,
    text_dropout: float = 0.1,
    validation: int = 8,
    patience: int = 0,
    hop: int = 1,
    copies: int = 0,
    shift: int = 4,
    validate_every: int = 250,
    samples: int = 4,
    decoder_steps: int = 0,
    decoder_lr: float = 3e-4,
    cache: Path | None = None,
    accumulate: int = 1,
    checkpointing: bool = False,
    compile: bool | str = "auto",
    sharding: str = "ddp",
    replicas: int = 1,
    tracker: str | None = None,
    seed: int = 0,
    record: dict,
) -> dict:
    """Train on windows of `dataset` (every `hop`-th row); out: a world model for `load`, losses and sample videos.

    method: "full" trains the transformer, "lora" an adapter of `rank` and `alpha` (the world model's where None).
    validation: episodes held out, at most a fifth, but one where there are two; their loss at fixed noise and `samples`
    dreamed clips beside the real ones are written every `validate_every` steps; patience: validations without a lower
    loss after which to stop, with the best weights (0: never).
    batch_size: clips of all processes together; token_budget: instead, as many clips of one shape as have at most so
    many tokens. lengths: numbers of frames, of which an episode gives the longest that fits (the world model's own
    where None); short: "drop" or "pad" episodes that none fits.
    copies: every clip is trained on so many times more, each moved by up to `shift` pixels: a world model that sees a
    hundred episodes learns them by heart otherwise. Validation is on clips as they are.
    decoder_steps: steps in which the VAE's decoder alone learns the look of this dataset, for a small VAE that has not
    seen it; latents keep their meaning, and the encoder and other people's adapters go on fitting. Not with "lora", of
    Wan's VAE alone (that of tiny and Cosmos, too), and by at most 4 processes or replicas, which share 4 clips.
    cache: a folder of latents to share between runs; `out/cache` where None. accumulate, sharding, replicas, tracker:
    see `dreamgen.engine.train`. checkpointing: keep only the inputs of blocks, and compute these again in the backward
    pass. compile: the blocks (see `dreamgen.engine.compiling`).

    Raises ValueError for another method, sharding or tracker, for a world model with adapters or a step cache, for a
    batch of fewer clips than parts, if no episode is as long as a clip, for an instruction of more tokens than are
    read, for a cache of another VAE, dataset or transform, and on a GPU where the first step cannot fit.
    The manifest counts clips by shape, episodes too short, clips padded, and bad episodes left out.
    """
    if method not in ("full", "lora"):
        raise ValueError(f"method is '{method}'; expected 'full' or 'lora'")
    if method == "lora" and decoder_steps:
        raise ValueError(f"decoder_steps is {decoder_steps}, but method=lora writes an adapter alone, without the "
                         "decoder that was trained; set decoder_steps=0, or method=full")  # fmt: skip
    if decoder_steps and not isinstance(world_model.pipe.vae, AutoencoderKLWan):
        raise ValueError(f"decoder_steps is {decoder_steps}, but {world_model.path} has a "
                         f"{type(world_model.pipe.vae).__name__}; it trains the decoder of an AutoencoderKLWan alone. "
                         "Set decoder_steps=0")  # fmt: skip
    require_sharding(sharding)
    require_tracker(tracker)
    world_model.require_plain()
    world, lora = world_model, method == "lora"
    process, count = join()
    shards = count if sharding == "fsdp2" else 1
    datasets = [dataset] if isinstance(dataset, Dataset) else list(dataset)
    names = ["dataset"] if len(datasets) == 1 else [f"dataset_{i}" for i in range(len(datasets))]
    parents = {name: d.root for name, d in zip(names, datasets, strict=True)}
    base = world.fingerprint()
    with Stage(out, "finetune", config={**record, "base": base}, parents=parents, seed=seed,
               writes=process == 0) as run:  # fmt: skip
        states = (out, out / "decoder")
        if run.complete:
            clear_state(*states)
            return run.manifest()
        wait()
        world.place(experts=shards == 1)  # what is cut goes to the GPU block by block
        pool = ClipPool(datasets, world.clock, lengths=lengths, hop=hop, short=short, copies=copies, shift=shift)
        every = [(i, k) for i, d in enumerate(datasets) for k in range(len(d))]
        groups = [(i, group) for i, d in enumerate(datasets) for group in groups_of(d)]
        held = {every[k] for k in _held_out(groups, validation, seed)}
        rows = np.array([k for k in range(len(pool)) if pool.episode(k) not in held])
        if not len(rows):
            raise ValueError(f"all episodes of {datasets[0].root} that are long enough are held out for validation "
                             f"({validation}); hold out fewer")  # fmt: skip
        where = out / "cache" if cache is None else Path(cache)
        latents = Latents(world, pool, where, transform={"hop": hop, "copies": copies, "shift": shift if copies else 0})
        if cache is not None:
            require_known(where, [kept.key for kept in latents.caches.values()])
        sizes = Transformer.of({**world.transformer.config, "_class_name": type(world.transformer).__name__})
        video = {shape: sizes.tokens(_latent(world, shape)) for shape in latents.members}
        buckets = Buckets(rows, [latents.shapes[k] for k in rows], batch_size=batch_size, budget=token_budget,
                          tokens=video.__getitem__)  # fmt: skip
        forks = possible(replicas, best_device()) if count == 1 else 1
        require_rows(min(buckets.sizes), count * forks, accumulate)
        if decoder_steps and count * forks > DECODER_ROWS:
            raise ValueError(f"decoder_steps is {decoder_steps}; the decoder learns from {DECODER_ROWS} clips at a "
                             f"time, which cannot be cut into {count * forks} parts. Take at most {DECODER_ROWS} "
                             "processes or replicas, or set decoder_steps=0")  # fmt: skip
        clips = [-(-size // (count * accumulate * forks)) for size in buckets.sizes]
        drawn = round(steps * float(np.dot(buckets.share, buckets.sizes)))
        if 0 < drawn < len(rows):
            log.warning("%d steps draw %d clips at most, and all %d are encoded: stage.hop=%d makes about as many as "
                        "are drawn", steps, drawn, len(rows), hop * -(-len(rows) // drawn))  # fmt: skip
        if lora:  # targets that fit nowhere are told before anything is encoded
            torch.manual_seed(seed_for(seed, "adapter"))  # whatever was drawn before, here or before a kill
            world.train_lora(rank=rank, alpha=alpha)
        latents.build(out, rank=process, count=count, replicas=replicas)
        embedded, which = latents.texts(where, base=base, first=process == 0)
        if decoder_steps:
            less = "stage.decoder_steps=0, fewer frames (world_model.frames or stage.lengths), or smaller views"
            with enough(f"training the VAE's decoder, {DECODER_ROWS} clips a step", less):
                _train_decoder(world, latents, rows, out / "decoder", steps=decoder_steps, lr=decoder_lr,
                               replicas=replicas, seed=seed)  # fmt: skip
        text = embedded.length
        require_memory(world.trained().values(), sizes,
                       [(n, video[s]) for n, s in zip(clips, buckets.shapes, strict=True)], text, held=world.weights,
                       lora=lora, checkpointing=checkpointing, ema=bool(ema), accumulate=accumulate,
                       shards=shards)  # fmt: skip
        if not lora:
            world.train_full()  # in fp32: for that there is room
        check = Validation(world, latents, embedded, which, held, out, samples=samples, seed=seed, write=process == 0,
                           clips=dict(zip(buckets.shapes, clips, strict=True)))  # fmt: skip
        for module in world.trained().values():
            for weight in (p for p in module.parameters() if p.requires_grad):
                weight.data = weight.data.float()  # small steps are lost in bf16
            if checkpointing:
                module.enable_gradient_checkpointing()
            if wanted(compile, steps=steps):
                compile_blocks(module)

        def batch_at(step: int) -> Rows:
            rng = rng_for(seed, "finetune", step)
            chosen = buckets.batch(rng)
            texts = np.where(rng.random(len(chosen)) < text_dropout, len(embedded) - 1, which[chosen])
            return Rows(len(chosen), lambda part: {"latents": latents.take(chosen[part]),
                                                   "text": embedded.take(texts[part])})  # fmt: skip

        flops = sum(share * n * sizes.step(video[s], text, lora=lora)
                    for share, n, s in zip(buckets.share, buckets.sizes, buckets.shapes, strict=True))  # fmt: skip
        result = train(world, batch_at, out=out, steps=steps, lr=lr, muon_lr=muon_lr, warmup=warmup, ema=ema,
                       precision=world.precision, replicas=replicas, seed=seed, accumulate=accumulate,
                       sharding=sharding, patience=patience, tracker=tracker, flops=flops,
                       checkpoint_every=validate_every or 250, validate=check if check.batch else None,
                       validate_every=validate_every, name="finetune")  # fmt: skip
        world.requires_grad_(False)
        if checkpointing:
            for module in world.trained().values():
                module.disable_gradient_checkpointing()
        if process == 0:
            world.save(out)
        manifest = run.finish(
            windows=len(pool), episodes=sum(map(len, datasets)), episodes_too_short=pool.too_short,
            clips_padded=pool.padded, shapes=pool.counts(), validation=len(held), **noted(*datasets),
            parameters=sum(p.numel() for p in world.transformer.parameters()),
            **{f"final_{k}": v for k, v in result.items()},
        )  # fmt: skip
        if process == 0:
            clear_state(*states)
        wait()
        return manifest


def _latent(world: VideoWorld, shape: Shape) -> tuple[int, int, int]:
    """Latent frames, height, width of a clip; ValueError if the VAE cannot take it."""
    time, side = world.layout.scale
    frames, h, w = shape
    if (frames - 1) % world.layout.grain or h % world.layout.pixels or w % world.layout.pixels:
        raise ValueError(f"clips of {frames} frames of {h}x{w}; {world.path} takes 1 + a multiple of "
                         f"{world.layout.grain} frames and sides that are multiples of {world.layout.pixels}. Change "
                         "lengths or views.")  # fmt: skip
    if not world.start and shape != (world.clock.frames, *world.robot.canvas):
        raise ValueError(f"clips of {shape}; {world.path} is conditioned on a whole clip of {world.clock.frames} "
                         f"frames of {world.robot.canvas} and trains on such alone")  # fmt: skip
    return (frames - 1) // time + 1, h // side, w // side


def _train_decoder(world: VideoWorld, latents: Latents, rows: np.ndarray, out: Path,
                   *, steps: int, lr: float, replicas: int, seed: int) -> None:  # fmt: skip
    model = Autoencoding(world.pipe.vae)
    for part in (world.pipe.vae.decoder, world.pipe.vae.post_quant_conv):
        part.requires_grad_(True)
    mean, std = world.mean.cpu(), world.std.cpu()
    longest = max(latents.shapes[k] for k in rows)
    rows = np.array([k for k in rows if latents.shapes[k] == longest])

    def batch_at(step: int) -> dict[str, Tensor]:
        chosen = rows[rng_for(seed, "decoder", step).integers(0, len(rows), DECODER_ROWS)]
        video = np.stack([latents.pool.frames(int(k)) for k in chosen])
        z = latents.take(chosen)[:, : len(mean)]
        return {"video": torch.from_numpy(video), "latents": z * std + mean}

    train(model, batch_at, out=out, steps=steps, lr=lr, warmup=20, weight_decay=0.0, ema=0.98, seed=seed,
          precision=world.precision, replicas=replicas, checkpoint_every=100, name="decoder")  # fmt: skip
    model.release()


def _held_out(groups: Sequence[Hashable], count: int, seed: int) -> set[int]:
    """Numbers of the episodes for validation, by their groups (see `held_out`): at most a fifth of all, or one of two
    to nine, and their siblings."""
    most = max(len(groups) // 5, min(1, len(groups) - 1))
    if count > most:
        log.info("validation: %d of %d episodes are held out, not %d: at most a fifth", most, len(groups), count)
    return held_out(groups, min(count, most), rng_for(seed, "validation").permutation(len(groups)).tolist())
