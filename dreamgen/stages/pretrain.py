"""Train a tiny base from scratch on video without actions: its VAE, then its transformer and text encoder.

The VAE's encoder is fitted in closed form (`dreamgen.worlds.linear_code`) and stays; its decoder learns from pictures,
then from clips.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline
from torch import Tensor

from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment
from dreamgen.core.manifest import Stage, fingerprint
from dreamgen.core.seeding import rng_for
from dreamgen.data.cache import Cache
from dreamgen.data.lerobot import Dataset
from dreamgen.data.recordings import noted
from dreamgen.data.windows import Windows
from dreamgen.engine.compiling import compile_blocks, wanted
from dreamgen.engine.precision import autocast
from dreamgen.engine.processes import require_alone
from dreamgen.engine.progress import progress
from dreamgen.engine.train import clear_state, train
from dreamgen.video.metrics import psnr
from dreamgen.worlds.autoencoder import Autoencoding, to_video
from dreamgen.worlds.linear_code import encode_linearly
from dreamgen.worlds.prefix import PrefixWorld, open_pipeline
from dreamgen.worlds.tiny import TinyLayout, build

PARTS = ("frames", "vae", "transformer")  # trained one after another, each in its folder


class Pool:
    """Windows of several datasets as one list."""

    def __init__(self, datasets: Sequence[Dataset], span: Clock | int, *, hop: int) -> None:
        self.datasets = datasets
        self.windows = [Windows(dataset, span, hop=hop, short="drop") for dataset in datasets]
        self.ends = np.cumsum([len(w) for w in self.windows])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _at(self, k: int) -> tuple[int, int, int]:
        source = int(np.searchsorted(self.ends, k, side="right"))
        episode, row = self.windows[source].at(int(k) - (int(self.ends[source - 1]) if source else 0))
        return source, episode, row

    def frames(self, k: int) -> np.ndarray:
        """Canvas frames (t h w 3) of window k."""
        source, episode, row = self._at(k)
        return self.datasets[source].canvas(episode, self.windows[source].rows(episode, row))

    def instruction(self, k: int) -> str:
        source, episode, _ = self._at(k)
        return self.datasets[source].instruction(episode)

    def batch(self, indices: np.ndarray) -> Tensor:
        return torch.from_numpy(np.stack([self.frames(int(k)) for k in indices]))


def pretrain(
    datasets: Sequence[Dataset],
    heldout: Dataset,
    *,
    out: Path,
    robot: Embodiment,
    layout: TinyLayout,
    start: str | None = None,
    video_hz: str = "10",
    frames: int = 17,
    hop: int = 4,
    text_length: int = 32,
    frame_batch: int = 48,
    frame_steps: int = 4000,
    vae_frames: int = 17,
    vae_batch: int = 4,
    vae_steps: int = 4000,
    vae_lr: float = 1e-3,
    vae_muon_lr: float | None = 0.02,
    steps: int = 6000,
    batch_size: int = 32,
    lr: float = 5e-4,
    muon_lr: float | None = 0.02,
    text_dropout: float = 0.1,
    precision: str = "auto",
    replicas: int = 1,
    compile: bool | str = "auto",
    seed: int = 0,
    record: dict,
) -> dict:
    """Train on `datasets` (their actions are not read); `heldout` only measures, and looks unlike all of them.

    layout: sizes of a new pipeline. start: a pipeline to go on from instead ("tiny": the one that ships).
    frame_steps, frame_batch: the decoder learns from pictures first, which is cheap; then from vae_batch clips of
    vae_frames, as long as those that are dreamt: its memory of past frames reaches further than a few.
    hop: rows between the clips that the transformer learns from; few clips are learned by heart.
    out: a world model (`PrefixWorld.load`), bf16. Returns the manifest: PSNR of the VAE and validation losses.
    """
    require_alone("pretrain")
    parents = {f"dataset_{i}": d.root for i, d in enumerate(datasets)} | {"heldout": heldout.root}
    with Stage(out, "pretrain", config=record, parents=parents, seed=seed) as run:
        if run.complete:
            clear_state(*(out / part for part in PARTS))
            return run.manifest()
        for dataset in datasets:  # decoded in order, which is five times faster than as the steps ask for them
            for i in progress(range(len(dataset)), len(dataset), f"read {dataset.root.name}", unit="episode"):
                dataset.canvas(i, [0])
        clock = Clock(robot_hz=robot.robot_hz, video_hz=video_hz, frames=frames)
        words = sorted({d.instruction(i) for d in datasets for i in range(len(d))})
        world = PrefixWorld(robot=robot, video_hz=video_hz, frames=frames, text_length=text_length,
                            precision=precision, pipeline=_begin(start, layout, words, seed))  # fmt: skip
        world.layout.require_read([*words, *(heldout.instruction(i) for i in range(len(heldout)))])
        if start is None:
            _fit_encoder(world, datasets, clock.with_frames(5), seed)
        world.place()
        options = {"lr": vae_lr, "muon_lr": vae_muon_lr, "precision": precision, "replicas": replicas, "seed": seed}
        still = _train_vae(world, datasets, heldout, out / "frames", 1, frame_batch, steps=frame_steps, **options)
        vae = _train_vae(world, datasets, heldout, out / "vae", clock.with_frames(vae_frames), vae_batch,
                         steps=vae_steps, **options)  # fmt: skip
        pool = Pool(datasets, clock, hop=hop)
        key = {"vae": world.cache_key(), "data": [fingerprint(d.root) for d in datasets]}
        cache = Cache(out / "cache", key, count=len(pool))
        build_cache = cache.build(lambda items: world.encode(pool.batch(np.array(items))).cpu().numpy())
        for _ in progress(build_cache, len(cache.missing()), "encode", out, unit="shard"):
            pass
        mean, std = _moments(cache)
        world.pipe.vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
        world.mean, world.std = (value.view(-1, 1, 1, 1).to(world.device) for value in (mean, std))
        losses = _train_transformer(world, pool, cache, heldout, out / "transformer", batch_size, text_dropout,
                                    steps=steps, compile=compile, lr=lr, muon_lr=muon_lr, precision=precision,
                                    replicas=replicas, seed=seed)  # fmt: skip
        world.save(out, dtype=torch.bfloat16)
        manifest = run.finish(
            frames=still, vae=vae, transformer=losses, windows=len(pool), episodes=sum(len(d) for d in datasets),
            **noted(*datasets, heldout),
        )  # fmt: skip
        clear_state(*(out / part for part in PARTS))
        return manifest


def _begin(start: str | None, layout: TinyLayout, words: list[str], seed: int) -> WanImageToVideoPipeline:
    if start is None:
        return build(layout, words, seed=seed)
    pipeline = open_pipeline(start).to(torch.float32)
    size = pipeline.vae.config.z_dim  # what `start` normalised its latents by is measured anew
    pipeline.vae.register_to_config(latents_mean=[0.0] * size, latents_std=[1.0] * size)
    return pipeline


def _fit_encoder(world: PrefixWorld, datasets: Sequence[Dataset], span: Clock, seed: int, count: int = 400) -> None:
    pool = Pool(datasets, span, hop=1)
    clips = pool.batch(rng_for(seed, "encoder").integers(0, len(pool), count))
    encode_linearly(world.pipe.vae, to_video(clips))


def _train_vae(world: PrefixWorld, datasets: Sequence[Dataset], heldout: Dataset, out: Path, span: Clock | int,
               batch: int, *, seed: int, steps: int, **options: Any) -> dict:  # fmt: skip
    """Clips of `span` or, with 1, pictures; validated on the first frames alike."""
    if not steps:
        return {}
    pool, held = Pool(datasets, span, hop=1), Pool([heldout], world.clock, hop=world.clock.steps)
    model = Autoencoding(world.pipe.vae.requires_grad_(False))
    for part in (world.pipe.vae.decoder, world.pipe.vae.post_quant_conv):
        part.requires_grad_(True)
    fixed = held.batch(np.linspace(0, len(held) - 1, 24).astype(int))[:, : 1 if span == 1 else None]

    def batch_at(step: int) -> dict[str, Tensor]:
        return {"video": pool.batch(rng_for(seed, out.name, step).integers(0, len(pool), batch))}

    def validate(model: Autoencoding, step: int) -> dict[str, float]:
        again = torch.cat([model.reconstruct(part).cpu() for part in fixed.split(8)])
        _write_pair(out / "heldout.png", fixed[:6, ::4], again[:6, ::4])
        return {"psnr": float(np.mean([psnr(a.numpy(), b.numpy()) for a, b in zip(fixed, again, strict=True)]))}

    result = train(model, batch_at, out=out, steps=steps, warmup=50, weight_decay=0.0, ema=0.998, seed=seed,
                   checkpoint_every=100, validate=validate, validate_every=250, name=out.name, **options)  # fmt: skip
    model.release()
    return result


def _write_pair(path: Path, real: Tensor, again: Tensor) -> None:
    """Clips above, their reconstructions below: to be looked at, since a PSNR hides a vanished block."""
    from PIL import Image

    def sheet(x: Tensor) -> np.ndarray:
        return np.concatenate([np.concatenate(list(clip), 1) for clip in x.numpy()], 0)

    picture = Image.fromarray(np.concatenate([sheet(real), sheet(again)], 1))
    picture.resize((picture.width * 3, picture.height * 3), Image.Resampling.NEAREST).save(path)


def _moments(cache: Cache) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent channel."""
    z = torch.from_numpy(cache.take(np.arange(len(cache)))).double().transpose(0, 1).flatten(1)
    return z.mean(1).float(), z.std(1).float()


def _train_transformer(world: PrefixWorld, pool: Pool, cache: Cache, heldout: Dataset, out: Path, batch: int,
                       dropout: float, *, seed: int, steps: int, compile: bool | str,
                       **options: Any) -> dict:  # fmt: skip
    texts = sorted({pool.instruction(k) for k in range(len(pool))})
    number = {text: i for i, text in enumerate(texts)}
    which = np.array([number[pool.instruction(k)] for k in range(len(pool))])
    tokens = world.tokens([*texts, ""])
    latents = torch.from_numpy(cache.take(np.arange(len(cache))))
    latents = (latents - world.mean.cpu()) / world.std.cpu()
    world.train_full()
    if wanted(compile, steps=steps):
        compile_blocks(world.transformer)
    world.pipe.text_encoder.requires_grad_(True)
    world.text_encoder = world.pipe.text_encoder  # as a submodule, so that the loop sees its weights
    held = Pool([heldout], world.clock, hop=world.clock.steps)
    chosen = np.linspace(0, len(held) - 1, min(64, len(held))).astype(int)
    with autocast(world.precision, world.device):
        fixed = {"latents": world.encode(held.batch(chosen))}
    words = world.tokens([held.instruction(int(k)) for k in chosen])
    generator = torch.Generator().manual_seed(seed)
    fixed |= {"noise": torch.randn(fixed["latents"].shape, generator=generator), **words,
              "sigma": torch.linspace(0.05, 0.95, len(chosen))}  # fmt: skip
    fixed = {key: value.to(world.device) for key, value in fixed.items()}

    def batch_at(step: int) -> dict[str, Tensor]:
        rng = rng_for(seed, "transformer", step)
        rows = rng.integers(0, len(cache), batch)
        text = np.where(rng.random(batch) < dropout, len(texts), which[rows])
        return {"latents": latents[rows], "ids": tokens["ids"][text], "mask": tokens["mask"][text]}

    result = train(world, batch_at, out=out, steps=steps, warmup=100, ema=0.999, seed=seed, checkpoint_every=250,
                   validate=lambda model, step: {"loss": float(model.loss(fixed)[0])}, validate_every=250,
                   name="transformer", **options)  # fmt: skip
    del world.text_encoder
    world.requires_grad_(False)
    world.pipe.text_encoder.requires_grad_(False)
    return result
