"""What fine-tuning reads: latents and text embeddings of a dataset's clips, encoded once and kept on disk."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dreamgen.core.manifest import digest, fingerprint
from dreamgen.data.buckets import ClipPool, Shape
from dreamgen.data.cache import Cache, Embeddings
from dreamgen.data.lerobot import Dataset
from dreamgen.engine.precision import best_device
from dreamgen.engine.processes import wait
from dreamgen.engine.progress import progress
from dreamgen.engine.replicas import in_forks, possible
from dreamgen.worlds.autoencoder import clips_at_once
from dreamgen.worlds.sampler import enough
from dreamgen.worlds.world import VideoWorld


class Latents:
    """Normalised latents of all clips of `pool`, one cache for each shape, under `root`.

    transform: what the pool made of the datasets. Raises ValueError for a video that has no instruction or too long a
    one.
    """

    def __init__(self, world: VideoWorld, pool: ClipPool, root: Path, *, transform: dict) -> None:
        self.world, self.pool = world, pool
        shapes = [pool.shape(k) for k in range(len(pool))]
        self.shapes: list[Shape] = shapes
        self.number = np.zeros(len(pool), dtype=np.int64)  # of a clip within its shape
        self.members: dict[Shape, np.ndarray] = {}
        for shape in dict.fromkeys(shapes):
            self.members[shape] = np.array([k for k, other in enumerate(shapes) if other == shape])
            self.number[self.members[shape]] = np.arange(len(self.members[shape]))
        # before anything is encoded: a dataset may lack one
        self.prompts = sorted({world.prompt(d.instruction(i), d.robot) for d in pool.datasets for i in range(len(d))})
        world.layout.require_read(self.prompts)
        given = world.cache_key()
        transform = transform | {key: given.pop(key) for key in ("clock", "canvas", "precision") if key in given}
        if any(d.robot.rate != world.robot.rate for d in pool.datasets):  # else the clock says it
            transform["rates"] = [d.robot.robot_hz for d in pool.datasets]
        about = {"vae": digest(given), "data": [fingerprint(d.root) for d in pool.datasets], "transform": transform,
                 "episodes": [taken(d) for d in pool.datasets], "views": [seen(d) for d in pool.datasets],
                 "clips": sorted(f"{k} {n}" for k, n in pool.counts().items())}  # fmt: skip
        keys = {shape: {**about, "shape": list(shape)} for shape in self.members}
        self.caches = {shape: Cache(root, key, count=len(self.members[shape]), size=shard_size(shape))
                       for shape, key in keys.items()}  # fmt: skip

    def build(self, out: Path, *, rank: int, count: int, replicas: int) -> int:
        """Encode what is missing, over `count` processes with `replicas` forks each; returns how many shards it was."""
        work = [(cache, partial(self._encode, shape)) for shape, cache in self.caches.items()]
        return build(work, out, rank=rank, count=count, replicas=possible(replicas, self.world.device))

    def _encode(self, shape: Shape, items: range) -> np.ndarray:
        clips, size, found = self.members[shape][items.start : items.stop], clips_at_once(*shape), []
        with encoding(shape, min(size, len(clips))):
            for start in range(0, len(clips), size):
                some = np.stack([self.pool.frames(int(k)) for k in clips[start : start + size]])
                found.append(self.world.encode(torch.from_numpy(some)).cpu().numpy())
        return np.concatenate(found)

    def take(self, clips: Sequence[int] | np.ndarray) -> Tensor:
        """Latents (b c t h w) of clips of one shape."""
        shape = self.shapes[int(clips[0])]
        return torch.from_numpy(self.caches[shape].take(self.number[np.asarray(clips)]))

    def texts(self, root: Path, *, base: str, first: bool) -> tuple[Embeddings, np.ndarray]:
        """Embeddings of the distinct prompts, the last of no text, and which one each clip has.

        base: names the weights of the text encoder. first: of several processes one encodes, and the others wait.
        """
        pool, made = self.pool, embeddings(self.world, self.prompts, root, base=base, first=first)
        number = {text: i for i, text in enumerate(self.prompts)}
        texts = [self.world.prompt(pool.instruction(k), pool.robot(k)) for k in range(len(pool))]
        return made, np.array([number[text] for text in texts])


def encoding(shape: Shape, clips: int) -> AbstractContextManager[None]:
    """Turn an allocation that fails while clips of `shape` are encoded, so many at a time, into advice."""
    doing = f"encoding {clips} clips of {shape[0]} frames of {shape[1]}x{shape[2]} at a time"
    return enough(doing, "fewer frames (world_model.frames or stage.lengths), smaller views, or a larger device")


def build(work: Sequence[tuple[Cache, Callable[[range], np.ndarray]]], out: Path, *, rank: int, count: int,
          replicas: int) -> int:  # fmt: skip
    """Compute what these caches lack, over `count` processes with `replicas` forks each, of which this is number
    `rank`; returns how many shards it was, once all have theirs."""
    shards = sum(len(cache.missing()) for cache, _ in work)
    replicas = max(1, min(replicas, sum(-(-cache.count // cache.size) for cache, _ in work)))  # the same for all

    def mine(replica: int) -> None:
        part, parts = rank * replicas + replica, count * replicas
        for cache, compute in work:
            done = cache.build(compute, part, parts)
            for _ in progress(done, len(cache.missing(part, parts)), "encode", out if not part else None, unit="shard"):
                pass

    in_forks(mine, replicas if shards else 1)
    wait()
    return shards


def embeddings(world: VideoWorld, texts: Sequence[str], root: Path, *, base: str, first: bool) -> Embeddings:
    """Of finished prompts, and last of no text; base, first: see `Latents.texts`."""
    key = {"base": base, "length": world.text_length, "dtype": str(world.transformer.dtype)}
    if not first:
        wait()
    device = best_device()
    world.layout.allow([text for text in texts if text not in world.texts])

    def read(texts: Sequence[str]) -> Iterator[Tensor]:
        return progress(world.texts.read(texts, device), len(texts), "read texts", unit="text")

    made = Embeddings(root, key, [*texts, ""], read, name=world.layout.cleaned)
    if first:
        wait()
    return made


def shard_size(shape: Shape) -> int:
    """Clips of a shard: few where they are large, so that several processes find work, and a kill loses little."""
    return min(64, 4 * clips_at_once(*shape))


def taken(dataset: Dataset) -> str:
    """Names the episodes that are taken, by the dataset's own numbers."""
    numbers = [dataset.index(i) for i in range(len(dataset))]
    return f"{len(numbers)} ({digest(numbers)})"


def seen(dataset: Dataset) -> list[list[str | None]]:
    """The cameras on the canvas, row by row, by their keys in the dataset, and how their pictures are fitted."""
    robot = dataset.robot
    views = {view.name: f"{view.key} ({view.fit})" for view in robot.views}
    return [[name and views[name] for name in row] for row in robot.grid]
