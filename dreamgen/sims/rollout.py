"""What happens when actions or a policy move a simulated robot.

Episodes run in groups of fixed size, each group on one process and one thread: the result is the same for any number
of processes. A rollout keeps its actions, so any episode can be filmed afterwards by replaying them.
"""

import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from dreamgen.core.clip import Observation
from dreamgen.core.protocols import Policy, Sim
from dreamgen.core.seeding import seed_for
from dreamgen.sims.keyframes import FromKeyframe
from dreamgen.sims.workers import shared_out

GROUP = 8  # simulators that a policy serves at once


@dataclass(frozen=True, kw_only=True, eq=False)
class Rollout:
    """One closed-loop episode: success, and the actions (s a) that were executed until it ended."""

    instruction: str
    seed: int
    success: bool
    action: np.ndarray


def begin(sim: Sim, instruction: str, seed: int, state: np.ndarray | None = None, **scene: str) -> None:
    """Reset to the first state of (instruction, seed).

    state: (d,) that the robot had where the episode or clip began; empty or nan where it is unknown. scene: options of
    the simulator's reset, e.g. `scene_of`: the instruction whose scene it is, if another. Raises ValueError where the
    robot begins elsewhere: then this is not the simulator that the first frame was drawn in.
    """
    sim.reset(instruction, seed, **scene)
    state = np.zeros(0) if state is None else np.asarray(state, np.float64)
    if state.size and np.isfinite(state).all():
        found = np.asarray(sim.state(), np.float64)
        if found.shape != state.shape or not np.allclose(found, state, rtol=1e-3, atol=1e-3):
            raise ValueError(f"'{instruction}' with seed {seed} begins at the state {found.round(3).tolist()} in this "
                             f"simulator, but was recorded or dreamt from {state.round(3).tolist()}; choose the "
                             "simulator that the first frames came from (sim=..., and its `sim.steps`)")  # fmt: skip


def can_begin(sim: Sim, instruction: str, scene: str) -> bool:
    """Whether the simulator knows `instruction`, and can begin it in the scene of `scene` (`scene_of`, see `begin`): a
    dream may be told anything."""
    inner = sim
    while isinstance(inner, FromKeyframe):
        inner = inner.sim
    lays = instruction == scene or "scene_of" in inspect.signature(inner.reset).parameters
    return lays and {instruction, scene} <= set(sim.instructions)


def replay(sim: Sim, instruction: str, seed: int, actions: np.ndarray, state: np.ndarray | None = None,
           **scene: str) -> bool:  # fmt: skip
    """Do these actions (s a) fulfil the instruction from the first state of (instruction, seed)? See `begin`."""
    begin(sim, instruction, seed, state, **scene)
    return any(sim.step(action) for action in actions)


def film(sim: Sim, instruction: str, seed: int, actions: np.ndarray, **scene: str) -> dict[str, np.ndarray]:
    """The pictures of a replay, before each action and after the last: per view (s + 1, h, w, 3) uint8."""
    sim.reset(instruction, seed, **scene)
    pictures = [sim.observe().views]
    for action in actions:
        sim.step(action)
        pictures.append(sim.observe().views)
    return {name: np.stack([views[name] for views in pictures]) for name in pictures[0]}


def ask(policy: Policy, observations: Sequence[Observation], seeds: Sequence[int], memories: Sequence[dict],
        now: int) -> np.ndarray:  # fmt: skip
    """Chunks (b, horizon, a) of a policy at step `now` of its episodes; one whose chunks go on from the last is given
    what it remembers of each. memories: one dictionary an episode, empty at its begin."""
    known = dict(memories=memories, now=now) if getattr(policy, "remembers", False) else {}
    return policy.act(observations, seeds, **known)


def rollout(
    sim: Callable[[], Sim],
    policy: Policy,
    plan: Sequence[tuple[str, int]],
    *,
    steps: int = 60,
    execute: int = 8,
    workers: int = 1,
    place: Callable[[Policy], Any] | None = None,
) -> Iterator[Rollout]:
    """Closed-loop episodes of `policy`, one for each (instruction, seed) of `plan`, in its order.

    sim: makes a simulator; with several workers it and the policy must be picklable. steps: an episode ends on success
    or after so many. execute: steps of a chunk that are executed before the policy is asked again. place: moves the
    policy to where it computes, in each process that asks it.

    Raises ValueError if the policy's robot differs from the simulator's, its chunks are shorter than `execute`, or a
    process is killed.
    """
    groups = [plan[i : i + GROUP] for i in range(0, len(plan), GROUP)]
    found = rollouts(sim, policy, groups, steps=steps, execute=execute, workers=workers, place=place)
    yield from itertools.chain.from_iterable(found)


def rollouts(
    sim: Callable[[], Sim],
    policy: Policy,
    groups: Sequence[Sequence[tuple[str, int]]],
    *,
    steps: int = 60,
    execute: int = 8,
    workers: int = 1,
    place: Callable[[Policy], Any] | None = None,
) -> Iterator[list[Rollout]]:
    """`rollout` of plans of at most GROUP episodes, a list for each: no group's episodes depend on the others."""
    if steps < 1 or not 1 <= execute <= policy.horizon:
        raise ValueError(f"steps is {steps}, execute is {execute}, the policy's horizon is {policy.horizon}; expected "
                         f"steps >= 1 and 1 <= execute <= horizon")  # fmt: skip
    run = functools.partial(_run, steps=steps, execute=execute)
    if workers <= 1 or len(groups) <= 1:
        with one_thread():
            yield from _served(sim, policy, groups, run, place)
        return
    task = functools.partial(_in_process, run=run)
    yield from shared_out(task, groups, workers, prepare=_prepare, given=(sim, policy, place))


def _served(sim: Callable[[], Sim], policy: Policy, groups: Sequence, run: Callable,
            place: Callable | None) -> Iterator[list[Rollout]]:  # fmt: skip
    worlds = [sim() for _ in range(max(map(len, groups), default=0))]
    try:
        for world in worlds[:1]:
            world.robot.require(policy.robot.contract(), "the policy")
            if place is not None:
                place(policy)
        for group in groups:
            yield run(worlds, policy, group)
    finally:
        for world in worlds:
            world.close()


_PROCESS: dict = {}


def _prepare(sim: Callable[[], Sim], policy: Policy, place: Callable | None = None) -> None:
    import torch

    torch.set_num_threads(1)
    _PROCESS.update(sim=sim, policy=policy, place=place)


def _in_process(group: Sequence[tuple[str, int]], run: Callable) -> list[Rollout]:
    if "worlds" not in _PROCESS:
        worlds = [_PROCESS["sim"]() for _ in range(GROUP)]
        worlds[0].robot.require(_PROCESS["policy"].robot.contract(), "the policy")
        if _PROCESS["place"] is not None:
            _PROCESS["place"](_PROCESS["policy"])
        _PROCESS["worlds"] = worlds
    return run(_PROCESS["worlds"], _PROCESS["policy"], group)


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in another order round differently, and contacts amplify it: always one thread, as in a process."""
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else 1
    try:
        if torch:
            torch.set_num_threads(1)
        yield
    finally:
        if torch:
            torch.set_num_threads(before)


def _run(worlds: list[Sim], policy: Policy, group: Sequence[tuple[str, int]], *, steps: int,
         execute: int) -> list[Rollout]:  # fmt: skip
    """One group in step; an episode that has ended leaves the batch."""
    for world, (instruction, seed) in zip(worlds, group, strict=False):
        world.reset(instruction, seed)
    actions: list[list[np.ndarray]] = [[] for _ in group]
    success = [False] * len(group)
    memories: list[dict] = [{} for _ in group]
    for start in range(0, steps, execute):
        alive = [i for i in range(len(group)) if not success[i]]
        if not alive:
            break
        seeds = [seed_for(group[i][1], "chunk", start) for i in alive]
        chunks = ask(policy, [worlds[i].observe() for i in alive], seeds, [memories[i] for i in alive], start)
        for i, chunk in zip(alive, chunks, strict=True):
            for action in chunk[: min(execute, steps - start)]:
                actions[i].append(np.asarray(action, np.float32))
                if worlds[i].step(action):
                    success[i] = True
                    break
    return [Rollout(instruction=text, seed=seed, success=done, action=np.stack(taken))
            for (text, seed), done, taken in zip(group, success, actions, strict=True)]  # fmt: skip
