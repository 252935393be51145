"""How often does a policy succeed in closed loop?

Episode i of an instruction has the seed `seed_for(seed, "evaluate", instruction, i)` for every policy, so policies are
compared on the same first states, and the result is the same for any number of processes, and for a run that was killed
and goes on: each group of episodes is stored once it has ended.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from dreamgen.core.intervals import success_interval
from dreamgen.core.manifest import Stage, replacing, require_complete, write_json
from dreamgen.core.protocols import Policy, Sim
from dreamgen.core.seeding import seed_for
from dreamgen.engine.precision import place
from dreamgen.engine.progress import progress
from dreamgen.sims.rollout import GROUP, Rollout, film, rollouts
from dreamgen.stages.pairs import episodes_of, paired, require_comparable, require_shared
from dreamgen.stages.served import served
from dreamgen.stages.sharing import Parts, grouped
from dreamgen.video.mp4 import write_mp4
from dreamgen.video.tiling import tile


def evaluate(
    policy: Policy,
    sim: Callable[[], Sim] | None,
    *,
    out: Path,
    episodes: int = 100,
    instructions: Sequence[str] | None = None,
    steps: int = 48,
    execute: int = 8,
    execution: Callable[[Policy], Policy] | None = None,
    against: Path | None = None,
    films: int = 6,
    seed: int = 0,
    workers: int = 1,
    record: dict,
) -> dict:
    """Run `episodes` episodes, rounded up to as many for each of `instructions` (null: all that the simulator knows).

    sim: makes a simulator; must be picklable for several workers. steps: an episode ends on success or after so many.
    execute: steps of a chunk that are executed before the policy is asked again. execution: how overlapping chunks are
    joined (`dreamgen.policies.realtime`); null takes each as it comes. against: another evaluation on the same seeds in
    the same simulator and for as many steps, with which this one is compared episode by episode. films: how many
    failures are filmed, each of another instruction while that lasts (`failures/*.mp4`).

    Results: success {successes, n, rate, low, high}, by_instruction {text: the same}, against {see `paired`}; every
    episode is a line of `episodes.json`. Raises ValueError for an unknown instruction, a policy of another robot, no
    simulator, an evaluation to compare with that shares no first states, is of another simulator or of other lengths.
    """
    if sim is None:
        raise ValueError("evaluate needs a simulator and the recipe has none; choose one with sim=..., or score the "
                         "policy on held-out episodes with stage=open_loop")  # fmt: skip
    if episodes < 1:
        raise ValueError(f"episodes is {episodes}; expected 1 or more")
    path = getattr(policy, "path", None)
    parents = ({} if path is None else {"policy": path}) | ({} if against is None else {"against": against})
    config = record | served({"policy": policy})
    with Stage(out, "evaluate", config=config, parents=parents, seed=seed) as run:
        if run.complete:
            shutil.rmtree(run.out / "parts", ignore_errors=True)  # killed after the manifest
            return run.manifest()
        if against is not None:
            require_comparable(run.spec, require_complete(against, "the evaluation"), f"stage.against, {against},")
        policy = policy if execution is None else execution(policy)
        world = sim()
        try:
            unknown = [text for text in instructions or () if text not in world.instructions]
            if unknown:
                raise ValueError(f"the simulator does not know {unknown}; it knows {list(world.instructions)}")
            wanted = list(instructions or world.instructions)
            each = -(-episodes // len(wanted))
            plan = [(text, seed_for(seed, "evaluate", text, i)) for text in wanted for i in range(each)]
            if against is not None:
                require_shared(({"instruction": text, "seed": own} for text, own in plan), against)
            groups, parts = grouped(plan, GROUP), Parts(run.out / "parts")
            left = sorted(set(range(len(groups))) - parts.stored())
            found = rollouts(sim, policy, [groups[number] for number in left], steps=steps, execute=execute,
                             workers=workers, place=place)  # fmt: skip
            shown = progress(found, len(left), "evaluate", run.out, unit="group")
            for number, ended in zip(left, shown, strict=True):
                parts.write(number, _arrays(ended))
            done = [episode for number, group in enumerate(groups) for episode in _episodes(group, parts.read(number))]
            for number, episode in enumerate(_chosen(done, films)):
                slug = "_".join(episode.instruction.split())
                with replacing(run.out / "failures" / f"{number:02d}_{slug}.mp4") as temporary:
                    write_mp4(temporary, _canvas(world, episode), float(world.robot.rate))
        finally:
            world.close()
        rows = [{"instruction": e.instruction, "seed": e.seed, "success": e.success, "steps": len(e.action)}
                for e in done]  # fmt: skip
        write_json(run.out / "episodes.json", rows)
        other = {} if against is None else {"against": paired(rows, episodes_of(against), str(against))}
        by_instruction = {text: _interval(e for e in done if e.instruction == text) for text in wanted}
        manifest = run.finish(success=_interval(done), by_instruction=by_instruction, **other)
        shutil.rmtree(parts.root)
        return manifest


def _arrays(ended: Sequence[Rollout]) -> dict[str, np.ndarray]:
    """A group as it is stored: success (n,), steps (n,), and the actions (s a) one after another."""
    return {"success": np.array([episode.success for episode in ended]),
            "steps": np.array([len(episode.action) for episode in ended]),
            "action": np.concatenate([episode.action for episode in ended])}  # fmt: skip


def _episodes(group: Sequence[tuple[str, int]], part: Mapping[str, np.ndarray]) -> list[Rollout]:
    """The inverse of `_arrays`."""
    actions = np.split(part["action"], np.cumsum(part["steps"])[:-1])
    return [Rollout(instruction=text, seed=seed, success=bool(success), action=action)
            for (text, seed), success, action in zip(group, part["success"], actions, strict=True)]  # fmt: skip


def _interval(episodes: Iterable[Rollout]) -> dict:
    won = [episode.success for episode in episodes]
    return success_interval(sum(won), len(won))


def _chosen(done: Sequence[Rollout], films: int) -> list[Rollout]:
    """The first failures, in turns over the instructions."""
    turns: dict[str, list[Rollout]] = {}
    for episode in done:
        if not episode.success:
            turns.setdefault(episode.instruction, []).append(episode)
    ranked = [(k, number, e) for number, failed in enumerate(turns.values()) for k, e in enumerate(failed)]
    return [e for *_, e in sorted(ranked, key=lambda row: row[:2])[:films]]


def _canvas(world: Sim, episode: Rollout) -> np.ndarray:
    return tile(world.robot, film(world, episode.instruction, episode.seed, episode.action))
