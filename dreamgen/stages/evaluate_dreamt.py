"""How often does a policy succeed in the dream? The world model stands in for the robot: no simulator is needed.

What a judge calls a success is one in so many cases; its rates on dreams, measured when it was trained, turn the share
of its yes into a rate with an honest interval. How far such figures can be believed is what `correlation` measures, of
policies that can be tried in reality too.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dreamgen.core.clip import Draft, Prompt, read_prompts
from dreamgen.core.intervals import success_interval
from dreamgen.core.manifest import Stage, read_json, require_complete, write_json
from dreamgen.core.protocols import ActionWorldModel, Judge, Policy
from dreamgen.core.seeding import seed_for
from dreamgen.data.clips import require_name
from dreamgen.engine.precision import place
from dreamgen.engine.progress import progress
from dreamgen.filters.judged import require_known
from dreamgen.filters.rates import rates_in_dreams
from dreamgen.stages.pairs import episodes_of, paired, require_comparable, require_shared
from dreamgen.stages.served import served
from dreamgen.stages.sharing import grouped
from dreamgen.video.mp4 import write_mp4
from dreamgen.worlds.env import DreamEnv, dream_episodes


def evaluate_dreamt(
    world_model: ActionWorldModel,
    judge: Judge,
    policy: Policy,
    prompts: Callable[[], Sequence[Prompt | Draft]],
    *,
    out: Path,
    steps: int = 48,
    execute: int = 8,
    execution: Callable[[Policy], Policy] | None = None,
    batch_size: int = 16,
    looks: str = "last",
    confidence: bool = False,
    against: Path | None = None,
    films: int = 12,
    seed: int = 0,
    record: dict,
) -> dict:
    """Run `policy` once from each first frame of `prompts` under its instruction, in the dream of `world_model`.

    steps, execute, execution: as in `evaluate`. looks, confidence: see `DreamEnv`. against: another such evaluation
    from the same prompts, with which this one is compared episode by episode. films: of how many episodes.

    Results: success {successes, n, rate, low, high} as the judge answers, abstentions not counted; corrected {observed,
    rate, low, high, n} by its rates on dreams, null where it has none that are better than chance and of dreams of this
    world model in this sampling (`rates_in_dreams`), and with looks="every", since they are of one look at a whole
    episode; by_instruction {text: success}, not corrected, since the rates are of all instructions together;
    abstained; agreement with a second dream (`confidence`); against {see `paired`}. Every episode is a line of
    `episodes.json` ({id, instruction, seed, first, success, probability, agreement}; null: not judged; first names the
    first frame and state by their bytes). A killed run goes on with the batch that it was at.

    Raises ValueError: no prompts, or two of one id; a judge that knows none of the instructions; parts of several
    robots; `against` an evaluation by another world model or judge, of other lengths, or of none of these first
    frames; and as `DreamEnv` and `dream_episodes` do.
    """
    path = getattr(policy, "path", None)
    parents = ({} if path is None else {"policy": path}) | ({} if against is None else {"against": against})
    if hasattr(prompts, "source") and not hasattr(prompts, "dataset"):  # of a dataset its settings tell what it holds
        parents["prompts"] = prompts.source
    config = record | served({"policy": policy})
    with Stage(out, "evaluate_dreamt", config=config, parents=parents, seed=seed) as run:
        if run.complete:
            return run.manifest()
        if against is not None:
            require_comparable(run.spec, require_complete(against, "the evaluation"), f"stage.against, {against},")
        listed = list(prompts())
        ids = [prompt.id for prompt in listed]
        for id in ids:
            require_name(id)
        if not ids or len(set(ids)) < len(ids):
            raise ValueError(f"there are {len(ids)} prompts with {len(set(ids))} ids; give one or more, each with its "
                             "own")  # fmt: skip
        require_known(judge, sorted({prompt.instruction for prompt in listed}))
        own = rates_in_dreams(judge, run.spec["config"].get("world_model")) if looks == "last" else None
        batches = grouped(listed, batch_size)
        if against is not None:
            each = (prompt for batch in batches for prompt in read_prompts(batch))
            require_shared(
                ({"instruction": p.instruction, "seed": p.seed, "first": first_of(p)} for p in each), against
            )
        place(world_model, judge, policy)
        env = DreamEnv(world=world_model, judge=judge, num_envs=batch_size, steps=steps, execute=execute, looks=looks,
                       confidence=confidence)  # fmt: skip
        acting, filmed = policy if execution is None else execution(policy), set(ids[:films])
        rows: list[dict] = []
        for number, batch in enumerate(progress(batches, len(batches), "evaluate_dreamt", run.out, unit="batch")):
            part = run.out / "parts" / f"{number:05d}.json"
            if not part.is_file():
                write_json(part, dreamt_rows(env, acting, read_prompts(batch), filmed, run.out / "films", seed))
            rows += read_json(part)
        write_json(run.out / "episodes.json", rows)
        texts = list(dict.fromkeys(row["instruction"] for row in rows))
        success = told(rows)
        found = {
            "success": success,
            "corrected": own.corrected(success["successes"], success["n"]) if own and success else None,
            "abstained": sum(row["success"] is None for row in rows),
            "by_instruction": {text: told([row for row in rows if row["instruction"] == text]) for text in texts},
        }
        if known := [row["agreement"] for row in rows if row["agreement"] is not None]:
            found["agreement"] = float(np.mean(known))
        if against is not None:
            found["against"] = paired(rows, episodes_of(against), str(against))
        return run.finish(episodes=len(rows), **found)


def dreamt_rows(env: DreamEnv, policy: Policy, prompts: Sequence[Prompt], filmed: set[str], films: Path,
                seed: int) -> list[dict]:  # fmt: skip
    """The lines of `episodes.json` of one batch; writes those of its films that are `filmed`."""
    done = dream_episodes(env, policy, prompts, [seed_for(seed, "evaluate", prompt.id) for prompt in prompts])
    rows = []
    for prompt, episode in zip(prompts, done, strict=True):
        if prompt.id in filmed:
            write_mp4(films / f"{prompt.id}.mp4", episode.past.video, env.world.clock.video_hz)
        p, agreement = (None if np.isnan(value) else value for value in (episode.probability, episode.agreement))
        rows.append({"id": prompt.id, "instruction": prompt.instruction, "seed": prompt.seed, "first": first_of(prompt),
                     "probability": p, "success": None if p is None else p >= env.threshold,
                     "agreement": agreement})  # fmt: skip
    return rows


def first_of(prompt: Prompt) -> str:
    """16 hex digits that name a first frame and the state in it."""
    held = hashlib.blake2b(np.ascontiguousarray(prompt.image).tobytes(), digest_size=8)
    held.update(np.asarray(prompt.state, np.float32).tobytes())
    return held.hexdigest()


def told(rows: Sequence[dict]) -> dict | None:
    """Success of the episodes on which the judge speaks; None where it speaks of none."""
    said = [row["success"] for row in rows if row["success"] is not None]
    return success_interval(sum(said), len(said)) if said else None
