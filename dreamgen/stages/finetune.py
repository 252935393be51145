"""Stage 1: fine-tune a world model on the target robot's dataset, on cached latents and text."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dreamgen.core.clip import Prompt
from dreamgen.core.manifest import Stage, fingerprint
from dreamgen.core.seeding import rng_for, seed_for
from dreamgen.data.cache import Cache
from dreamgen.data.lerobot import Dataset
from dreamgen.data.windows import Windows
from dreamgen.engine.progress import progress
from dreamgen.engine.train import clear_state, train
from dreamgen.video.metrics import psnr
from dreamgen.video.mp4 import write_mp4
from dreamgen.worlds.autoencoder import Autoencoding
from dreamgen.worlds.prefix import PrefixWorld


def finetune(
    world_model: PrefixWorld,
    dataset: Dataset,
    *,
    out: Path,
    steps: int = 1000,
    batch_size: int = 16,
    lr: float = 3e-4,
    muon_lr: float | None = None,
    warmup: int = 50,
    ema: float | None = 0.995,
    method: str = "full",
    rank: int = 16,
    alpha: int = 16,
    text_dropout: float = 0.1,
    validation: int = 8,
    hop: int = 1,
    validate_every: int = 250,
    samples: int = 4,
    decoder_steps: int = 0,
    decoder_lr: float = 3e-4,
    replicas: int = 1,
    seed: int = 0,
    record: dict,
) -> dict:
    """Train on windows of `dataset` (every `hop`-th row); out: a world model for `load`, losses and sample videos.

    method: "full" trains the transformer, "lora" an adapter of `rank` and `alpha`. validation: episodes held out;
    their loss at fixed noise and `samples` dreamed clips beside the real ones are written every `validate_every` steps.
    decoder_steps: steps in which the VAE's decoder alone learns the look of this dataset, for a small VAE that has not
    seen it; latents keep their meaning, and the encoder and other people's adapters go on fitting.

    Raises ValueError for another method, and if no episode is as long as a clip. The manifest counts windows, episodes
    too short, and bad episodes left out.
    """
    if method not in ("full", "lora"):
        raise ValueError(f"method is '{method}'; expected 'full' or 'lora'")
    world = world_model
    parents = {"dataset": dataset.root}
    with Stage(out, "finetune", config={**record, "base": world.fingerprint()}, parents=parents, seed=seed) as run:
        if run.complete:
            return run.manifest()
        world.place()
        windows = Windows(dataset, world.clock, hop=hop, short="drop")
        places = [windows.at(k) for k in range(len(windows))]
        cache = Cache(out / "cache", {"world": world.cache_key(), "data": fingerprint(dataset.root), "hop": hop,
                                      "skipped": sorted(dataset.skipped)}, count=len(windows))  # fmt: skip

        def encode(items: range) -> np.ndarray:
            clips = np.stack([dataset.canvas(places[k][0], windows.rows(*places[k])) for k in items])
            return world.encode(torch.from_numpy(clips)).cpu().numpy()

        for _ in progress(cache.build(encode), len(cache.missing()), "encode", out, unit="shard"):
            pass
        held = _held_out(dataset, validation, seed)
        train_rows = np.array([k for k, (episode, _) in enumerate(places) if episode not in held])
        if not len(train_rows):
            raise ValueError(f"all {len(dataset)} episodes of {dataset.root} are held out for validation "
                             f"({validation}); hold out fewer")  # fmt: skip
        texts = sorted({dataset.instruction(i) for i in range(len(dataset))})
        embedded = world.embed([*texts, ""]).cpu()
        which = np.array([texts.index(dataset.instruction(episode)) for episode, _ in places])
        if decoder_steps:
            _train_decoder(world, dataset, windows, cache, train_rows, out / "decoder", steps=decoder_steps,
                           lr=decoder_lr, replicas=replicas, seed=seed)  # fmt: skip
        if method == "full":
            world.train_full()
        else:
            world.train_lora(rank=rank, alpha=alpha)

        def batch_at(step: int) -> dict[str, Tensor]:
            rng = rng_for(seed, "finetune", step)
            rows = train_rows[rng.integers(0, len(train_rows), batch_size)]
            text = np.where(rng.random(batch_size) < text_dropout, len(texts), which[rows])
            return {"latents": torch.from_numpy(cache.take(rows)), "text": embedded[text]}

        check = _Check(world, dataset, windows, cache, held, out, samples=samples, seed=seed)
        result = train(world, batch_at, out=out, steps=steps, lr=lr, muon_lr=muon_lr, warmup=warmup, ema=ema,
                       precision=world.precision, replicas=replicas, seed=seed,
                       checkpoint_every=validate_every, validate=check if held else None,
                       validate_every=validate_every, name="finetune")  # fmt: skip
        world.requires_grad_(False)
        world.save(out)
        for folder in (out, out / "decoder"):
            clear_state(folder)
        return run.finish(
            windows=len(windows), episodes=len(dataset), episodes_too_short=windows.too_short,
            episodes_skipped={str(k): v for k, v in dataset.skipped.items()}, mended=dataset.mended,
            validation=len(held), parameters=sum(p.numel() for p in world.transformer.parameters()),
            **{f"final_{k}": v for k, v in result.items()},
        )  # fmt: skip


def _train_decoder(world: PrefixWorld, dataset: Dataset, windows: Windows, cache: Cache, rows: np.ndarray, out: Path,
                   *, steps: int, lr: float, replicas: int, seed: int) -> None:  # fmt: skip
    model = Autoencoding(world.pipe.vae)
    for part in (world.pipe.vae.decoder, world.pipe.vae.post_quant_conv):
        part.requires_grad_(True)
    mean, std = world.mean.cpu(), world.std.cpu()

    def batch_at(step: int) -> dict[str, Tensor]:
        chosen = rows[rng_for(seed, "decoder", step).integers(0, len(rows), 4)]
        places = [windows.at(int(k)) for k in chosen]
        video = np.stack([dataset.canvas(episode, windows.rows(episode, row)) for episode, row in places])
        return {"video": torch.from_numpy(video), "latents": torch.from_numpy(cache.take(chosen)) * std + mean}

    train(model, batch_at, out=out, steps=steps, lr=lr, warmup=20, weight_decay=0.0, ema=0.98, seed=seed,
          precision=world.precision, replicas=replicas, checkpoint_every=100, name="decoder")  # fmt: skip
    model.release()


def _held_out(dataset: Dataset, count: int, seed: int) -> set[int]:
    """Episodes for validation, drawn by the seed; never more than a fifth."""
    count = min(count, len(dataset) // 5)
    return set(rng_for(seed, "validation").permutation(len(dataset))[:count].tolist())


class _Check:
    """Validation loss at fixed noise and times; sample videos, real above dreamed."""

    def __init__(self, world: PrefixWorld, dataset: Dataset, windows: Windows, cache: Cache, held: set[int],
                 out: Path, *, samples: int, seed: int) -> None:  # fmt: skip
        self.out, first = out, {}
        for k in range(len(windows)):
            first.setdefault(windows.at(k)[0], k)
        chosen = [first[episode] for episode in sorted(held) if episode in first]
        if not chosen:
            return
        rows = np.array(chosen * -(-32 // len(chosen)))[:32]
        generator = torch.Generator().manual_seed(seed_for(seed, "validation"))
        latents = torch.from_numpy(cache.take(rows))
        self.batch = {
            "latents": latents.to(world.device),
            "noise": torch.randn(latents.shape, generator=generator).to(world.device),
            "sigma": torch.linspace(0.05, 0.95, len(rows)).to(world.device),
            "text": world.embed([dataset.instruction(windows.at(int(k))[0]) for k in rows]),
        }
        self.prompts, self.real = [], []
        for k in chosen[:samples]:
            episode, row = windows.at(k)
            video = dataset.canvas(episode, windows.rows(episode, row))
            self.real.append(video)
            self.prompts.append(Prompt(id=f"sample_{k}", image=video[0], instruction=dataset.instruction(episode),
                                       seed=seed_for(seed, "sample", k)))  # fmt: skip

    def __call__(self, world: PrefixWorld, step: int) -> dict[str, float]:
        figures = {"loss": float(world.loss(self.batch)[0])}
        if self.prompts:
            clips = world.dream(self.prompts)
            pairs = [np.concatenate([r, c.video], 1) for r, c in zip(self.real, clips, strict=True)]
            write_mp4(self.out / "samples" / f"step_{step:06d}.mp4", np.concatenate(pairs, 2), world.clock.video_hz)
            figures["psnr"] = float(np.mean([psnr(r[1:], c.video[1:]) for r, c in zip(self.real, clips, strict=True)]))
        return figures
