"""Does success in the dream foretell success in reality? k policies, the same first states in both.

Blind evaluators stand beside the dream: what they know is not what the policy does from these first states, so a dream
that is no better than they are evaluates nothing. Every policy is one item on disk; a killed run goes on.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np

from dreamgen.core.clip import Prompt
from dreamgen.core.clock import Clock
from dreamgen.core.intervals import success_interval
from dreamgen.core.manifest import Stage, read_json, write_json
from dreamgen.core.protocols import ActionWorldModel, Judge, Policy, Sim
from dreamgen.core.seeding import seed_for
from dreamgen.data.lerobot import Dataset
from dreamgen.data.recordings import noted
from dreamgen.engine.precision import place, withdraw
from dreamgen.engine.progress import progress
from dreamgen.filters.judged import require_known
from dreamgen.filters.rates import Rates, rates_in_dreams, rates_on
from dreamgen.sims.rollout import Rollout, film, rollout
from dreamgen.stages.agreement import auroc_interval
from dreamgen.stages.blind import BLIND, first_frame, shuffled_actions
from dreamgen.stages.open_loop import open_loop_error
from dreamgen.stages.report_card import DRAWS, card, draws_of
from dreamgen.stages.served import served
from dreamgen.video.mp4 import write_mp4
from dreamgen.video.tiling import tile
from dreamgen.worlds.env import DreamEnv, Dreamt, dream_episodes, looked
from dreamgen.worlds.oracle import OracleWorld

log = logging.getLogger(__name__)


def correlation(
    world_model: ActionWorldModel | None,
    judge: Judge,
    sim: Callable[[], Sim] | None,
    policies: Mapping[str, Policy] | None,
    *,
    out: Path,
    probe: Judge | None = None,
    degraded: Mapping[str, Callable[..., Policy]] | None = None,
    episodes: int = 40,
    instructions: Sequence[str] | None = None,
    steps: int = 48,
    execute: int = 8,
    batch_size: int = 16,
    looks: str = "last",
    confidence: bool = False,
    video_hz: str | int = "10",
    seen: Sequence[str] = (),
    demos: Mapping[str, float | int] | None = None,
    validation: Dataset | None = None,
    blind: Sequence[str] = BLIND,
    films: int = 6,
    seed: int = 0,
    workers: int = 1,
    record: dict,
) -> dict:
    """Run every policy for `episodes` episodes (as many for each instruction) in the simulator and in the dream.

    world_model: None puts the simulator in its place, filmed at `video_hz`: what is left is the judge's error on real
    video. probe: a second judge of the same dreamt episodes, which ends none; one of positions tells what goes wrong in
    the dream from what the first misreads in it. degraded: name to maker of a worse policy from `policy=`; each is made
    of every policy, as `<policy>_<name>`. seen: names of policies that gave data to the world model; the headline is of
    the others. demos: policy to number of demonstrations. Both speak of what is made of a policy, too. validation:
    recordings of experts for the open-loop error. blind: which blind evaluators to run. films: of how many episodes of
    a policy, from the first to the last.

    Writes `policies/<name>.json` ({real, probability, agreement, probe, ... per episode}), films real | dreamt, and
    `results/correlation.json`: k, r, r_low, r_high, rho, mmrv, mae, bias, regret, episode_auroc, tpr, tnr of the dream,
    with `_low` and `_high` of rho, mmrv, mae, bias and episode_auroc over first states (see `report_card`); the same of
    the `probe` and of each of `blind`; `corrected` by the judge's own rates, where they are of what it
    judged here: of recordings, or of dreams of this world model in this sampling, at one look a whole episode; `seen`;
    `policies`, real and dream with Wilson's interval. Episodes on which the judge abstains count on neither side.

    Raises ValueError: no simulator, fewer than 2 policies, an unknown name or instruction, `demos` of some policies and
    not of others, a judge or probe that knows none of the instructions, is of another robot or abstains on every
    episode of a policy, and what the parts say of robots, rates, limits.
    """
    plain, policies = dict(policies or {}), dict(policies or {})
    for how, make in (degraded or {}).items():
        policies |= {f"{name}_{how}": make(policy=policy) for name, policy in plain.items()}
    check(sim, policies, seen, demos or {}, blind)
    demos = demos if "demos" in blind else None
    known_demos = {name: demos[base] for base in (demos or {}) for name in made_of(base, policies, degraded or {})}
    if known_demos and (missing := [name for name in policies if name not in known_demos]):
        raise ValueError(f"stage.demos does not say how many demonstrations {', '.join(missing)} learned from; add "
                         "them, or leave 'demos' out of stage.blind")  # fmt: skip
    left = [key for key, found in (("demos", known_demos), ("validation", validation)) if key in blind and not found]
    if left:
        log.warning("blind evaluators left out, since stage.%s is not given: %s", left[0], ", ".join(left))
    seen = [name for base in seen for name in made_of(base, policies, degraded or {})]
    parents = {name: path for name, p in policies.items() if (path := getattr(p, "path", None)) is not None}
    if validation is not None:
        parents["validation"] = validation.root
    config = record | served(policies)
    with Stage(out, "correlation", config=config, parents=parents, seed=seed) as run, ExitStack() as opened:
        if run.complete:
            return run.manifest()
        world = world_model
        if world is None:
            world = OracleWorld(sim=sim, video_hz=video_hz)
            opened.callback(world.close)
        place(world, judge, probe)
        plan, prompts = first_states(sim, [judge, probe], instructions, episodes, seed)
        env = DreamEnv(world=world, judge=judge, num_envs=batch_size, steps=steps, execute=execute, looks=looks,
                       confidence=confidence)  # fmt: skip
        world.robot.require_same(probe, "the probe")
        own = {}
        if looks == "last":  # a judge's rates are of one look at a whole episode
            shown = run.spec["config"].get("world_model")
            own = {key: rates_on(one, "real") if world_model is None else rates_in_dreams(one, shown)
                   for key, one in (("probability", judge), ("probe", probe)) if one is not None}  # fmt: skip
        rows = {}
        for name in progress(policies, len(policies), "correlation", run.out, unit="policy"):
            path = run.out / "policies" / f"{name}.json"
            if not path.is_file():
                row = one_policy(name, policies[name], env, sim, plan, prompts, run.out, probe=probe, blind=blind,
                                 validation=validation, workers=workers, films=films, seed=seed)  # fmt: skip
                write_json(path, row)
                withdraw(policies[name])
            rows[name] = read_json(path)
            if name in known_demos:
                rows[name]["demos"] = float(known_demos[name])
        results = summary(rows, probe, seen, env.threshold, own, seed)
        write_json(run.out / "results" / "correlation.json", results)
        return run.finish(correlation=results, **noted(validation))


def check(sim: object, policies: Mapping, seen: Sequence[str], demos: Mapping, blind: Sequence[str]) -> None:
    """ValueError for a request that cannot be run."""
    if sim is None:
        raise ValueError("correlation compares with a simulator and the recipe has none; choose one with sim=...")
    if len(policies) < 2:
        raise ValueError(f"correlation got {len(policies)} policies; name 2 or more in stage.policies (20 or more for "
                         "an interval that says something)")  # fmt: skip
    unknown = sorted({*seen, *demos} - set(policies)) or sorted(set(blind) - set(BLIND))
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no such policy or blind evaluator; policies are "
                         f"{', '.join(policies)}, blind evaluators {', '.join(BLIND)}")  # fmt: skip


def made_of(base: str, policies: Mapping, degraded: Mapping) -> list[str]:
    """The names of a policy and of the worse ones that are made of it."""
    return [name for name in (base, *(f"{base}_{how}" for how in degraded)) if name in policies]


def first_states(sim: Callable[[], Sim], judges: Sequence[Judge | None], instructions: Sequence[str] | None,
                 episodes: int, seed: int) -> tuple[list[tuple[str, int]], list[Prompt]]:  # fmt: skip
    """(instruction, seed) of every episode, and the same first states as prompts."""
    world = sim()
    try:
        wanted = list(instructions or world.instructions)
        if unknown := [text for text in wanted if text not in world.instructions]:
            raise ValueError(f"the simulator does not know {unknown}; it knows {list(world.instructions)}")
        for judge in filter(None, judges):
            require_known(judge, wanted)
        each = max(1, -(-episodes // len(wanted)))
        plan = [(text, seed_for(seed, "evaluate", text, i)) for text in wanted for i in range(each)]
        prompts = []
        for number, (text, own) in enumerate(plan):
            world.reset(text, own)
            seen = world.observe()
            image = tile(world.robot, {name: view[None] for name, view in seen.views.items()})[0]
            prompts.append(Prompt(id=f"c{number:05d}", image=image, instruction=text, seed=seed_for(own, "dream"),
                                  state=seen.state, origin={"sim": type(world).__name__.lower(), "instruction": text,
                                                            "seed": own}))  # fmt: skip
    finally:
        world.close()
    return plan, prompts


def one_policy(name: str, policy: Policy, env: DreamEnv, sim: Callable[[], Sim], plan: Sequence[tuple[str, int]],
               prompts: Sequence[Prompt], out: Path, *, probe: Judge | None, blind: Sequence[str],
               validation: Dataset | None, workers: int, films: int, seed: int) -> dict[str, Any]:  # fmt: skip
    """All that is measured of one policy, plain JSON, nan as None."""
    real = list(rollout(sim, policy, plan, steps=env.steps, execute=env.execute, workers=workers,
                        place=place))  # fmt: skip
    place(policy)
    dreamt = dream_episodes(env, policy, prompts, [own for _, own in plan])
    hz = env.world.clock.video_hz
    with closing(sim()) as world:
        for k in np.unique(np.linspace(0, len(plan) - 1, films).astype(int)):
            write_mp4(out / "films" / name / f"{k:02d}.mp4", beside(world, real[k], dreamt[k], env.world.clock), hz)
    found: dict[str, Any] = {"real": [bool(e.success) for e in real], "probability": [e.probability for e in dreamt],
                             "agreement": [e.agreement for e in dreamt]}  # fmt: skip
    if probe is not None:
        found["probe"] = looked(env, [e.past for e in dreamt], probe).tolist()
    if "first_frame" in blind:
        found["first_frame"] = first_frame(env, prompts, dreamt)
    if "shuffled_actions" in blind:
        found["shuffled_actions"] = shuffled_actions(env, dreamt, seed)
    if "validation" in blind and validation is not None:
        found["validation"] = -open_loop_error(policy, validation, seed=seed)
    return {key: none(value) for key, value in found.items()}


def beside(world: Sim, real: Rollout, dreamt: Dreamt, clock: Clock) -> np.ndarray:
    """Film of an episode (t h 2w 3), real | dreamt; the real one stands still once it has succeeded."""
    video = dreamt.past.video
    pictures = tile(world.robot, film(world, real.instruction, real.seed, real.action))
    rows = clock.with_frames(max(2, len(video))).rows[: len(video)].clip(max=len(pictures) - 1)
    return np.concatenate([pictures[rows], video], 2)


def none(value: Any) -> Any:
    """What is not a number becomes None: JSON has no nan."""
    if isinstance(value, list):
        return [none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def known(values: Sequence[float | bool | None]) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values], np.float64)


def rates_of(name: str, key: str, row: Mapping, threshold: float) -> tuple[float, float, int]:
    """Real and judged success rate of a policy over the episodes that the judge speaks of, and how many these are."""
    told = known(row[key])
    spoken = np.isfinite(told)
    if not spoken.any():
        raise ValueError(f"the judge abstained on every episode of policy '{name}' ({key}): it was not trained on "
                         "their instructions. Train it with jobs.train_judge, or choose others.")  # fmt: skip
    real = np.array(row["real"], bool)[spoken]
    return float(real.mean()), float((told[spoken] >= threshold).mean()), int(spoken.sum())


def drawn_rates(rows: Mapping[str, dict], key: str, threshold: float, often: np.ndarray) -> np.ndarray:
    """Real and judged success rates (2 d k) where first states count `often` (d n); nan where none is spoken of."""
    told, real = np.array([known(row[key]) for row in rows.values()]), np.array([row["real"] for row in rows.values()])
    spoken = np.isfinite(told)
    with np.errstate(invalid="ignore"):
        return np.stack([often @ (yes & spoken).T for yes in (real, told >= threshold)]) / (often @ spoken.T)


def outcome(rows: Mapping[str, dict], key: str, threshold: float, seed: int) -> dict:
    """episode_auroc with its percentile interval over first states, tpr, tnr and abstentions of judged probabilities
    against reality, all episodes together."""
    told = np.concatenate([known(row[key]) for row in rows.values()])
    real = np.concatenate([np.array(row["real"], bool) for row in rows.values()])
    spoken = np.isfinite(told)
    yes = told >= threshold
    share = {"tpr": yes[spoken & real], "tnr": ~yes[spoken & ~real]}
    states = [str(k) for row in rows.values() for k in range(len(row["real"]))]
    area = auroc_interval(told, real, groups=states, draws=DRAWS, seed=seed)
    return {"episode_auroc": area["auroc"], "episode_auroc_low": area["low"], "episode_auroc_high": area["high"],
            "abstained": int((~spoken).sum()),
            **{k: float(v.mean()) if len(v) else math.nan for k, v in share.items()}}  # fmt: skip


def compared(rows: Mapping[str, dict], probe: Judge | None, threshold: float, own: Mapping[str, Rates | None],
             seed: int) -> dict:  # fmt: skip
    """Report cards of the dream, by judge and by probe, and of the blind evaluators over the policies of `rows`.

    own: the rates by which what stands under a key of the rows is corrected; intervals do not count their uncertainty.
    """
    often = draws_of(len(next(iter(rows.values()))["real"]), seed)

    def told(key: str, threshold: float) -> dict:
        real, said = np.array([rates_of(name, key, row, threshold)[:2] for name, row in rows.items()]).T
        drawn = drawn_rates(rows, key, threshold, often)
        found = card(real, said, drawn=(drawn[0], drawn[1])) | outcome(rows, key, threshold, seed)
        if by := own.get(key):
            found["corrected"] = card(real, by.behind(said), drawn=(drawn[0], by.behind(drawn[1])))
        return found

    found = told("probability", threshold)
    if probe is not None:
        found["probe"] = told("probe", probe.threshold)
    blind = {}
    for key in ("shuffled_actions", "first_frame"):
        if all(np.isfinite(known(row.get(key, []))).any() for row in rows.values()):
            blind[key] = told(key, threshold)
    for key in ("demos", "validation"):
        if all(row.get(key) is not None for row in rows.values()):
            every = np.array([np.mean(row["real"]) for row in rows.values()])  # they speak of the policy as a whole
            score, drawn = np.array([row[key] for row in rows.values()]), drawn_rates(rows, "real", 0.5, often)[0]
            blind[key] = card(every, score, rate=False, drawn=(drawn, np.broadcast_to(score, drawn.shape)))
            blind[key] |= dict.fromkeys(("episode_auroc", "tpr", "tnr"))
    agreement = np.concatenate([known(row["agreement"]) for row in rows.values()])
    if np.isfinite(agreement).any():
        found["agreement"] = float(np.nanmean(agreement))
    return found | {"blind": blind}


def summary(rows: Mapping[str, dict], probe: Judge | None, seen: Sequence[str], threshold: float,
            own: Mapping[str, Rates | None], seed: int) -> dict:  # fmt: skip
    """The content of results/correlation.json."""
    fresh = {name: row for name, row in rows.items() if name not in seen}
    headline = fresh if len(fresh) >= 2 else rows
    found = compared(headline, probe, threshold, own, seed)
    found["headline"] = "unseen policies" if headline is fresh else "all"
    if seen and len(seen) >= 2:
        found["seen"] = compared({name: rows[name] for name in seen}, probe, threshold, own, seed)
    found["policies"] = {}
    for name, row in rows.items():
        real, dream, n = rates_of(name, "probability", row, threshold)
        found["policies"][name] = {"real": real, "dream": dream, "n": n, "seen": name in seen}
        for key, rate in (("real", real), ("dream", dream)):
            ends = success_interval(round(rate * n), n)
            found["policies"][name] |= {f"{key}_low": ends["low"], f"{key}_high": ends["high"]}
        if by := own.get("probability"):
            found["policies"][name]["corrected"] = by.corrected(round(dream * n), n)
    return clean(found)


def clean(value: Any) -> Any:
    """Plain JSON without nan."""
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    return none([clean(item) for item in value]) if isinstance(value, list) else none(value)
