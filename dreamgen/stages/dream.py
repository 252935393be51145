"""Stage 2: dream videos from first frames, instructions and seeds.

Prompts are dreamed in fixed groups, in the order of the list; shards share out whole groups. So a clip's batch is the
same for any number of shards and after any kill, and its bytes are too.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from dreamgen.core.clip import Prompt
from dreamgen.core.manifest import Stage, digest
from dreamgen.core.protocols import WorldModel
from dreamgen.data.clips import ClipFolder
from dreamgen.engine.progress import progress


def dream(
    world_model: WorldModel,
    prompts: Callable[[], Sequence[Prompt]],
    *,
    out: Path,
    batch_size: int = 16,
    shard: int = 0,
    num_shards: int = 1,
    seed: int = 0,
    parent: Path | None = None,
    record: dict,
) -> dict:
    """Dream one clip per prompt into `out/clips`; returns the manifest once the clips of all shards are there.

    prompts: makes the list (see `dreamgen.data.prompts`). parent: the checkpoint's folder, for the manifest.
    Raises ValueError for a shard out of range, no prompts, and two prompts of one id.
    """
    if not 0 <= shard < num_shards:
        raise ValueError(f"shard is {shard} of {num_shards}; expected 0 <= shard < num_shards")
    parents = {"world_model": parent} if parent is not None else {}
    with Stage(out, "dream", config=record, parents=parents, seed=seed) as run:
        if run.complete:
            return run.manifest()
        listed = list(prompts())
        ids = [prompt.id for prompt in listed]
        if not ids or len(set(ids)) < len(ids):
            raise ValueError(f"{len(ids)} prompts, {len(set(ids))} different ids; expected at least one, each unique")
        folder = ClipFolder(out / "clips")
        groups = [listed[i : i + batch_size] for i in range(0, len(listed), batch_size)]
        mine = [group for group in groups[shard::num_shards] if not all(folder.has(p.id) for p in group)]
        if mine and hasattr(world_model, "place"):
            world_model.place()
        name = "dream" if num_shards == 1 else f"dream {shard} of {num_shards}"
        for group in progress(mine, len(mine), name, out, unit="batch"):
            for clip in world_model.dream(group):
                folder.write(clip)
        left = sum(not folder.has(id) for id in ids)
        if left:
            return {"complete": False, "clips": len(ids) - left, "left": left}
        texts = {prompt.instruction for prompt in listed}
        pairs = {prompt.pair for prompt in listed}
        return run.finish(clips=len(ids), instructions=len(texts), first_frames=len(pairs), prompts=digest(ids))
