"""Record episodes in a simulator as a LeRobot dataset: of the expert, of play and failures, or of a policy.

Disturbed experts come in groups that share a first state: the expert itself, then others, each with its own outcome.
They are executed counterfactuals, labelled by the simulator.

Episode k is a pure function of (seed, k): processes take parts of the list, a part is stored once it is whole, and
the dataset is the same for any number of processes and after any kill.
"""

import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dreamgen.core import rotations
from dreamgen.core.clip import Episode
from dreamgen.core.manifest import Stage, replacing
from dreamgen.core.protocols import Policy, Sim
from dreamgen.core.seeding import rng_for, seed_for
from dreamgen.data.streams import disturbed, noisy, still, stuck, told
from dreamgen.data.writer import require_free, write_dataset
from dreamgen.engine.progress import progress
from dreamgen.sims.rollout import ask, one_thread
from dreamgen.sims.workers import shared_out
from dreamgen.stages.served import served

SOURCES = ("expert", "play", "policy", "perturbed")
PERTURBED = ("small noise", "large noise", "stuck gripper", "delay", "wrong instruction")
PART = 10  # episodes in one stored part
ATTEMPTS = 20  # seeds that an expert may fail on before its task is called broken


def collect(
    sim: Callable[[], Sim],
    *,
    out: Path,
    episodes: int,
    instructions: list[str] | None = None,
    source: Literal["expert", "play", "policy", "perturbed"] = "expert",
    policy: Policy | None = None,
    pairs: int = 1,
    truth: bool = False,
    execute: int = 8,
    rows: int = 36,
    keep_failures: bool = False,
    seed: int = 0,
    workers: int = 1,
    record: dict,
) -> dict:
    """Record `episodes` episodes of `rows` robot steps each, spread evenly over `instructions` (None: all).

    sim: makes a simulator; must be picklable. source: "expert" keeps successes alone (failed seeds are counted), or
    all that it does with `keep_failures`;
    "play" mixes random motion and experts with noise and bias, failures included;
    "policy" runs `policy`, `execute` steps a chunk; "perturbed" is an expert with noise, a stuck gripper, a delay or a
    wrong instruction (meta `perturbed`), failures included. pairs: so many episodes on end share a first state and the
    meta `pair`; of perturbed ones the first is undisturbed. truth: also record where things are (columns object.*).
    Episode.meta: sim, instruction, seed, source, success.

    Raises ValueError for an unknown instruction or source, for an expert that fails on 20 seeds in a row, for a worker
    that is killed, and if `out` holds data that is not of this run.
    """
    if source not in SOURCES or (source == "policy") != (policy is not None):
        raise ValueError(f"source is '{source}' and policy is {type(policy).__name__}; expected one of "
                         f"{', '.join(SOURCES)}, and a policy for 'policy' alone")  # fmt: skip
    if episodes < 1 or pairs < 1:
        raise ValueError(f"episodes is {episodes}, pairs is {pairs}; expected 1 or more")
    if pairs > 1 and source == "expert":
        raise ValueError("experts from one first state are all alike; for pairs use source=perturbed, play or policy")
    require_free(out)
    with Stage(out, "collect", config=record | served({"policy": policy}), seed=seed) as run:
        if run.complete:
            shutil.rmtree(out / "parts", ignore_errors=True)  # killed after the manifest
            return run.manifest()
        world = sim()
        robot, known = world.robot, list(world.instructions)
        if truth and not hasattr(world, "objects"):
            raise ValueError(f"{type(world).__name__} does not tell where its objects are; collect with truth=false")
        world.close()
        wanted = list(instructions) if instructions is not None else known
        unknown = [text for text in wanted if text not in known]
        if unknown:
            raise ValueError(f"the simulator does not know {unknown}; it knows {known}")
        # neighbours share an instruction: a simulator may have to rebuild its scene for another one
        plan = [(k, wanted[k // pairs * pairs * len(wanted) // episodes]) for k in range(episodes)]
        parts = [plan[i : i + PART] for i in range(0, episodes, PART)]
        task = partial(_part, sim=sim, policy=policy, source=source, execute=execute, rows=rows, seed=seed,
                       keep_failures=keep_failures, pairs=pairs, truth=truth, folder=out / "parts")  # fmt: skip
        stored = progress(_mapped(task, parts, workers), len(parts), "collect", out, unit="part")
        counts = {"failed_seeds": 0, "successes": 0}

        def recorded() -> Iterator[Episode]:
            for path in stored:
                for episode in _read(path):
                    counts["failed_seeds"] += episode.meta.pop("failed_seeds")
                    counts["successes"] += episode.meta["success"]
                    yield episode

        written = write_dataset(out, recorded(), robot)
        while _SIMS:  # of this process: at its end the drawing contexts could no longer be freed
            _SIMS.popitem()[1].close()
        manifest = run.finish(**{k: v for k, v in written.items() if k != "skipped"}, **counts)
        shutil.rmtree(out / "parts")  # last: a dataset whose manifest is missing is written from them anew
        return manifest


def _mapped(task: Callable, parts: list, workers: int) -> Iterator[Path]:
    """Results in order, whatever finishes first."""
    yield from map(task, parts) if workers <= 1 else shared_out(task, parts, workers)


_SIMS: dict[str, Sim] = {}  # one per process and configuration: a scene takes seconds to compile


def _part(plan: list[tuple[int, str]], *, sim: Callable[[], Sim], policy: Policy | None, source: str, execute: int,
          rows: int, seed: int, keep_failures: bool, pairs: int, truth: bool, folder: Path) -> Path:  # fmt: skip
    """Record one part and store it; a stored one is only named."""
    path = folder / f"{plan[0][0]:06d}.npz"
    if path.is_file():
        return path
    world = _SIMS.setdefault(repr(sim), None) or sim()
    _SIMS[repr(sim)] = world
    arrays: dict[str, np.ndarray] = {}
    for number, (k, instruction) in enumerate(plan):
        with one_thread():  # a policy's: the same in any number of processes, and two of them do not fight
            episode = _record(world, k, instruction, policy=policy, source=source, execute=execute, rows=rows,
                              seed=seed, keep_failures=keep_failures, pairs=pairs, truth=truth)  # fmt: skip
        arrays |= {f"{number}/video/{view}": frames for view, frames in episode.video.items()}
        arrays |= {f"{number}/extra/{name}": values for name, values in episode.extra.items()}
        arrays |= {f"{number}/state": episode.state, f"{number}/action": episode.action}
        arrays[f"{number}/meta"] = np.frombuffer(json.dumps(episode.meta).encode(), np.uint8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)
    return path


def _read(path: Path) -> Iterator[Episode]:
    with np.load(path, allow_pickle=False) as arrays:
        for number in range(sum(name.endswith("/meta") for name in arrays.files)):
            meta = json.loads(arrays[f"{number}/meta"].tobytes())
            video, extra = (
                {name.split("/", 2)[2]: arrays[name] for name in arrays.files if name.startswith(f"{number}/{kind}/")}
                for kind in ("video", "extra")
            )
            yield Episode(
                instruction=meta["instruction"], state=arrays[f"{number}/state"], action=arrays[f"{number}/action"],
                video=video, extra=extra, meta=meta,
            )  # fmt: skip


def _record(world: Sim, k: int, instruction: str, *, policy: Policy | None, source: str, execute: int, rows: int,
            seed: int, keep_failures: bool, pairs: int, truth: bool) -> Episode:  # fmt: skip
    """Episode k. An expert is given seeds until it succeeds."""
    group, member = divmod(k, pairs)
    for attempt in range(ATTEMPTS):
        own = seed_for(seed, "collect", group, attempt)
        mine = own if pairs == 1 else seed_for(own, "member", member)
        world.reset(instruction, own)
        kind = "none"
        if source == "perturbed":
            kind = str(rng_for(mine, "perturbed").choice(possible(world))) if pairs == 1 or member else "none"
            motion = perturbed(world, instruction, kind, mine, rows)
        else:
            motion = _motion(world, instruction, mine, source, policy, execute)
        views, states, actions, objects, success = [], [], [], [], False
        for _ in range(rows):
            seen = world.observe()
            if truth:
                objects.append(world.objects())
            action = np.asarray(motion(seen), np.float32)
            views.append(seen.views)
            states.append(seen.state)
            actions.append(action)
            success |= bool(world.step(action))
        if success or keep_failures or source != "expert":
            break
    else:
        raise ValueError(f"the expert failed at '{instruction}' on {ATTEMPTS} seeds in a row within {rows} steps")
    meta = {"sim": type(world).__name__.lower(), "instruction": instruction, "seed": own, "source": source,
            "success": success, "failed_seeds": attempt}  # fmt: skip
    meta |= {"pair": f"p{group:06d}"} if pairs > 1 else {}
    meta |= {"perturbed": kind} if source == "perturbed" else {}
    extra = {f"object.{name}": np.stack([row[name] for row in objects]).astype(np.float32)
             for name in (objects[0] if truth else ())}  # fmt: skip
    return Episode(instruction=instruction, state=np.stack(states), action=np.stack(actions), meta=meta, extra=extra,
                   video={name: np.stack([view[name] for view in views]) for name in views[0]})  # fmt: skip


def _motion(world: Sim, instruction: str, seed: int, source: str, policy: Policy | None, execute: int) -> Callable:
    """What moves the robot: a function of the observation to an action (a,)."""
    if source == "expert":
        actions = world.expert()
        return lambda seen: next(actions)
    if source == "policy":
        return _PolicyMotion(policy, seed, execute)
    rng = rng_for(seed, "play")
    limits = [part.limits or (-1.0, 1.0) for part in world.robot.action for _ in range(part.width)]
    low, high = np.array(limits, np.float32).T
    kind = rng.choice(("random", "disturbed"), p=(0.4, 0.6))
    actions = world.expert()
    sigma, bias = rng.uniform(0.1, 0.8), rng.normal(0, 0.2, len(low))
    binary = np.array([part.kind == "binary" for part in world.robot.action for _ in range(part.width)])
    smooth, grip = rng.normal(0, 0.5, len(low)), rng.choice(high[binary] if binary.any() else [1.0])

    def act(seen: object) -> np.ndarray:
        nonlocal smooth, grip
        if rng.random() < 0.1:
            grip = -grip
        if kind == "random":
            smooth = 0.85 * smooth + 0.5 * rng.normal(0, 0.7, len(low))
            return told(world.robot, np.where(binary, grip, smooth).clip(low, high))
        action = np.asarray(next(actions))
        moved = action + bias + rng.normal(0, sigma, len(low))
        return told(world.robot, np.where(binary, action, moved).clip(low, high))

    return act


def possible(world: Sim) -> list[str]:
    """The ways of PERTURBED that this simulator and robot allow."""
    lacking = set()
    if len(world.instructions) < 2 or not inspect.signature(world.expert).parameters:
        lacking.add("wrong instruction")
    if not any(part.kind == "binary" for part in world.robot.action):
        lacking.add("stuck gripper")
    return [kind for kind in PERTURBED if kind not in lacking]


def _expert(world: Any, *of: str) -> Iterator[np.ndarray]:
    """The expert of the episode's instruction, or `of` another where the simulator can."""
    return world.expert(*of)


def perturbed(world: Sim, instruction: str, kind: str, seed: int, rows: int) -> Callable:
    """The expert of the episode that was reset last, disturbed in one of the ways of PERTURBED, or "none"."""
    rng, robot = rng_for(seed, "perturbed", kind), world.robot
    others = [text for text in world.instructions if text != instruction]
    of = (str(rng.choice(others)),) if kind == "wrong instruction" else ()
    actions = _expert(world, *of)
    if kind in ("small noise", "large noise"):
        size = rng.uniform(0.05, 0.2) if kind == "small noise" else rng.uniform(0.4, 1.0)
        rest = np.concatenate([part.rest for part in robot.action]).astype(np.float32)
        noise = noisy(robot, np.tile(rest, (rows, 1)), size, rng, smooth=0.6)
    wait, high = int(rng.integers(4, 16)), bool(rng.integers(2))
    row = -1

    def act(seen: object) -> np.ndarray:
        nonlocal row
        row += 1
        if kind == "delay" and row < wait:
            return still(robot, np.zeros((1, robot.action_dim), np.float32))[0]
        action = np.asarray(next(actions), np.float32)
        if kind == "stuck gripper":
            return stuck(robot, action[None], high=high)[0]
        if kind.endswith("noise"):
            made = action.astype(np.float64)
            for part in robot.action:
                by = noise[row : row + 1, part.slice] * (part.kind != "binary")
                by = rotations.vectors(part, by) if part.rotation else by
                made[part.slice] = disturbed(part, action[None, part.slice], by)[0]
            return made
        return action

    return act


class _PolicyMotion:
    """A policy's chunks, played `execute` steps at a time."""

    def __init__(self, policy: Policy, seed: int, execute: int) -> None:
        self.policy, self.seed, self.execute, self.step = policy, seed, min(execute, policy.horizon), 0
        self.memory: dict = {}

    def __call__(self, seen: object) -> np.ndarray:
        if self.step % self.execute == 0:
            seed = seed_for(self.seed, "chunk", self.step)
            self.chunk = ask(self.policy, [seen], [seed], [self.memory], self.step)[0]
        self.step += 1
        return self.chunk[(self.step - 1) % self.execute]
