"""Record episodes in a simulator as a LeRobot dataset: of the expert, of play and failures, or of a policy.

Episode k is a pure function of (seed, k): processes take parts of the list, a part is stored once it is whole, and
the dataset is the same for any number of processes and after any kill.
"""

import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from dreamgen.core.clip import Episode
from dreamgen.core.manifest import Stage, replacing
from dreamgen.core.protocols import Policy, Sim
from dreamgen.core.seeding import rng_for, seed_for
from dreamgen.data.writer import write_dataset
from dreamgen.engine.progress import progress

SOURCES = ("expert", "play", "policy")
PART = 10  # episodes in one stored part
ATTEMPTS = 20  # seeds that an expert may fail on before its task is called broken


def collect(
    sim: Callable[[], Sim],
    *,
    out: Path,
    episodes: int,
    instructions: list[str] | None = None,
    source: Literal["expert", "play", "policy"] = "expert",
    policy: Policy | None = None,
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
    "policy" runs `policy`, `execute` steps a chunk. Episode.meta: sim, instruction, seed, source, success.

    Raises ValueError for an unknown instruction or source, and for an expert that fails on 20 seeds in a row.
    """
    if source not in SOURCES or (source == "policy") != (policy is not None):
        raise ValueError(f"source is '{source}' and policy is {type(policy).__name__}; expected one of "
                         f"{', '.join(SOURCES)}, and a policy for 'policy' alone")  # fmt: skip
    if episodes < 1:
        raise ValueError(f"episodes is {episodes}; expected 1 or more")
    with Stage(out, "collect", config=record, seed=seed) as run:
        if run.complete:
            return run.manifest()
        world = sim()
        robot, known = world.robot, list(world.instructions)
        world.close()
        wanted = list(instructions) if instructions is not None else known
        unknown = [text for text in wanted if text not in known]
        if unknown:
            raise ValueError(f"the simulator does not know {unknown}; it knows {known}")
        # neighbours share an instruction: a simulator may have to rebuild its scene for another one
        plan = [(k, wanted[k * len(wanted) // episodes]) for k in range(episodes)]
        parts = [plan[i : i + PART] for i in range(0, episodes, PART)]
        task = partial(_part, sim=sim, policy=policy, source=source, execute=execute, rows=rows, seed=seed,
                       keep_failures=keep_failures, folder=out / "parts")  # fmt: skip
        stored = progress(_mapped(task, parts, workers), len(parts), "collect", out, unit="part")
        counts = {"failed_seeds": 0, "successes": 0}

        def recorded() -> Iterator[Episode]:
            for path in stored:
                for episode in _read(path):
                    counts["failed_seeds"] += episode.meta.pop("failed_seeds")
                    counts["successes"] += episode.meta["success"]
                    yield episode

        written = write_dataset(out, recorded(), robot)
        shutil.rmtree(out / "parts")
        return run.finish(**{k: v for k, v in written.items() if k != "skipped"}, **counts)


def _mapped(task: Callable, parts: list, workers: int) -> Iterator[Path]:
    """Results in order, whatever finishes first."""
    if workers <= 1:
        yield from map(task, parts)
        return
    with multiprocessing.get_context("spawn").Pool(min(workers, len(parts))) as pool:
        yield from pool.imap(task, parts)


_SIMS: dict[str, Sim] = {}  # one per process and configuration: a scene takes seconds to compile


def _part(plan: list[tuple[int, str]], *, sim: Callable[[], Sim], policy: Policy | None, source: str, execute: int,
          rows: int, seed: int, keep_failures: bool, folder: Path) -> Path:  # fmt: skip
    """Record one part and store it; a stored one is only named."""
    path = folder / f"{plan[0][0]:06d}.npz"
    if path.is_file():
        return path
    world = _SIMS.setdefault(repr(sim), None) or sim()
    _SIMS[repr(sim)] = world
    arrays: dict[str, np.ndarray] = {}
    for number, (k, instruction) in enumerate(plan):
        episode = _record(world, k, instruction, policy=policy, source=source, execute=execute, rows=rows, seed=seed,
                          keep_failures=keep_failures)  # fmt: skip
        arrays |= {f"{number}/video/{view}": frames for view, frames in episode.video.items()}
        arrays |= {f"{number}/state": episode.state, f"{number}/action": episode.action}
        arrays[f"{number}/meta"] = np.frombuffer(json.dumps(episode.meta).encode(), np.uint8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)
    return path


def _read(path: Path) -> Iterator[Episode]:
    with np.load(path, allow_pickle=False) as arrays:
        for number in range(sum(name.endswith("/meta") for name in arrays.files)):
            meta = json.loads(arrays[f"{number}/meta"].tobytes())
            views = [name for name in arrays.files if name.startswith(f"{number}/video/")]
            yield Episode(
                instruction=meta["instruction"], state=arrays[f"{number}/state"], action=arrays[f"{number}/action"],
                video={name.split("/", 2)[2]: arrays[name] for name in views}, meta=meta,
            )  # fmt: skip


def _record(world: Sim, k: int, instruction: str, *, policy: Policy | None, source: str, execute: int, rows: int,
            seed: int, keep_failures: bool) -> Episode:  # fmt: skip
    """Episode k. An expert is given seeds until it succeeds."""
    for attempt in range(ATTEMPTS):
        own = seed_for(seed, "collect", k, attempt)
        world.reset(instruction, own)
        motion = _motion(world, instruction, own, source, policy, execute)
        views, states, actions, success = [], [], [], False
        for _ in range(rows):
            seen = world.observe()
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
    return Episode(instruction=instruction, state=np.stack(states), action=np.stack(actions), meta=meta,
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
            return np.where(binary, grip, smooth).clip(low, high)
        action = np.asarray(next(actions))
        moved = action + bias + rng.normal(0, sigma, len(low))
        return np.where(binary, action, moved).clip(low, high)

    return act


class _PolicyMotion:
    """A policy's chunks, played `execute` steps at a time."""

    def __init__(self, policy: Policy, seed: int, execute: int) -> None:
        self.policy, self.seed, self.execute, self.step = policy, seed, min(execute, policy.horizon), 0

    def __call__(self, seen: object) -> np.ndarray:
        if self.step % self.execute == 0:
            self.chunk = self.policy.act([seen], [seed_for(self.seed, "chunk", self.step)])[0]
        self.step += 1
        return self.chunk[(self.step - 1) % self.execute]
