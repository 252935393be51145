"""Stage 2: dream videos from first frames, instructions and seeds.

Prompts are dreamed in fixed groups, in the order of the list; shards share out whole groups. So a clip's batch is the
same for any number of shards and after any kill, and its bytes are too.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

from dreamgen.core.clip import Draft, Prompt, read_prompts
from dreamgen.core.manifest import Stage, digest
from dreamgen.core.protocols import Filter, Labeler, WorldModel
from dreamgen.data.clips import ClipFolder, require_name
from dreamgen.data.recordings import noted
from dreamgen.engine.precision import place
from dreamgen.engine.progress import progress
from dreamgen.stages.dreaming import Best, Dreamer, clips_at_once
from dreamgen.stages.sharing import Shard, grouped, sweep


def dream(
    world_model: WorldModel,
    prompts: Callable[[], Sequence[Prompt | Draft]],
    *,
    out: Path,
    batch_size: int = 16,
    token_budget: int | None = None,
    best_of: int = 1,
    filter: Filter | None = None,
    labeler: Labeler | None = None,
    overlap: bool | None = None,
    shard: int = 0,
    num_shards: int = 1,
    seed: int = 0,
    needs_actions: bool = False,
    record: dict,
) -> dict:
    """Dream one clip per prompt into `out/clips`; returns the manifest once the clips of all shards are there.

    prompts: makes the list (see `dreamgen.data.prompts`); first frames of drafts are read with their group. A forward
    pass takes `batch_size` clips, or as many as hold `token_budget` latent tokens. best_of: seeds for each prompt, of
    which `filter` keeps the best (a filter of labels needs a `labeler`); with a filter the scores stand with the clips.
    overlap: decode and write while the next batch is denoised (None: where it pays). needs_actions: refuse prompts
    without actions, of which a world model that takes actions would dream one window under the instruction alone.

    Raises ValueError for a shard out of range, no prompts, ids that two prompts share or that are not fit for file
    names, prompts that lack actions, a budget smaller than a clip, and best_of without a filter.
    """
    mine, best = Shard(shard, num_shards), Best(best_of, filter, labeler)
    made_of = parents(world_model, prompts, labeler)
    with Stage(out, "dream", config=record, parents=made_of, seed=seed, shared=True) as run:
        if run.complete:
            return run.manifest()
        listed = _listed(prompts) if num_shards > 1 else tuple(prompts())
        ids = _ids(listed)
        if needs_actions:
            _require_actions(listed)
        folder = ClipFolder(Path(out) / "clips")
        stored, size = set(folder.ids()), clips_at_once(world_model, batch_size, token_budget)
        groups = grouped(listed, max(1, size // best_of))
        left, others = ([group for group in some if not stored.issuperset(prompt.id for prompt in group)]
                        for some in (mine.of(groups), groups if num_shards > 1 else ()))  # fmt: skip
        if left and hasattr(world_model, "read"):
            # before the transformer takes the text encoder's place; also for the shards that a worker is given later
            world_model.read(list(dict.fromkeys(prompt.instruction for group in [*left, *others] for prompt in group)))
        judging = vars(filter).values() if filter is not None else ()  # models that a filter scores by
        if left:
            place(world_model, labeler, *judging)
        with Dreamer(world_model, folder.write, size=size, best=best, overlap=overlap) as dreamer:
            for group in progress(left, len(left), mine.title("dream"), out, unit="batch"):
                dreamer(read_prompts(group))
        missing = set(ids) - set(folder.ids())
        if missing:
            return {"complete": False, "clips": len(ids) - len(missing), "left": len(missing)}
        sweep(folder.root)
        texts = {prompt.instruction for prompt in listed}
        pairs = {prompt.pair for prompt in listed}
        return run.finish(clips=len(ids), instructions=len(texts), first_frames=len(pairs), prompts=digest(ids),
                          **noted(getattr(prompts, "dataset", None)))  # fmt: skip


def _ids(prompts: Sequence[Prompt | Draft]) -> list[str]:
    """The ids of all prompts, fit for file names and each its own. ValueError names those that are not."""
    if not prompts:
        raise ValueError("there are no prompts; expected at least one")
    known: dict[str, Prompt | Draft] = {}
    for prompt in prompts:
        require_name(prompt.id, _picture(prompt, "; rename the picture "))
        if prompt.id in known:
            raise ValueError(f"two prompts have the id '{prompt.id}'{_picture(known[prompt.id], ': of ')}"
                             f"{_picture(prompt, ' and ')}; expected different ones. Pictures that differ by their "
                             "ending alone make the same: rename one of them")  # fmt: skip
        known[prompt.id] = prompt
    return list(known)


def _require_actions(prompts: Sequence[Prompt | Draft]) -> None:
    """ValueError for prompts that bring no actions, and that nothing will bring any."""
    bare = [p.id for p in prompts if (p.finish is None if isinstance(p, Draft) else not p.action.size)]
    if bare:
        raise ValueError(f"{len(bare)} of {len(prompts)} prompts bring no actions ('{bare[0]}' is the first), and "
                         "mode=actions dreams what follows from actions; use prompts=actions, which takes recorded "
                         "first frames, too (prompts.sim=null prompts.dataset=...)")  # fmt: skip


def _picture(prompt: Prompt | Draft, before: str) -> str:
    """The picture that a prompt's first frame was read from, "" where it was not."""
    return f"{before}{prompt.origin['picture']}" if "picture" in prompt.origin else ""


def parents(world_model: object, prompts: object, labeler: object) -> dict[str, Path]:
    """What the dreams are made of, by name, as far as it lies on disk."""
    found = {"world_model": getattr(world_model, "folder", None), "prompts": getattr(prompts, "source", None),
             "labeler": getattr(labeler, "path", None)}  # fmt: skip
    return {name: Path(path) for name, path in found.items() if path is not None}


@lru_cache(maxsize=1)
def _listed(prompts: Callable[[], Sequence[Prompt | Draft]]) -> tuple[Prompt | Draft, ...]:
    """The list, made once by a worker that dreams one shard after another."""
    return tuple(prompts())
