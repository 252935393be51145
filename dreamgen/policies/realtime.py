"""Chunks that go on from the one being executed, because thinking takes time and the robot does not wait.

A chunk asked for at step s takes effect `delay` steps later: its first `delay` actions are those of the chunk before,
and the rest has to go on from there (Black et al. 2025, Real-Time Execution of Action Chunking Flow Policies).

    guided    any policy: each Euler step is pulled towards the previous chunk,
              v <- v + min(beta, c(t)) * VJP((prev - x1_hat) * W),  x1_hat = x_t + (1 - t) v,
              c(t) = (t^2 + (1 - t)^2) / (t (1 - t)),  W as in `weights`
    trained   policies trained with `prefix`: the frozen actions stand in the chunk, clean, at every step

`proceed` is this for a flow policy; a policy behind a server is asked for the same over the wire. Wrappers hold
nothing: what they remember of an episode lies in its `memory`, a dictionary of whoever runs it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn import functional as F

from dreamgen.core import rotations
from dreamgen.core.clip import Observation
from dreamgen.core.kinematics import command
from dreamgen.core.protocols import Continuing, Policy
from dreamgen.policies.flow import euler

MODES = ("guided", "trained")


def weights(horizon: int, delay: int, planned: int) -> np.ndarray:
    """W (H,): 1 for the `delay` steps that will have been executed, decaying to 0 at `planned`, where the previous
    chunk ends: c (e^c - 1) / (e - 1) with c falling evenly from below 1 to 0."""
    step = np.arange(horizon)
    c = np.clip((planned - step) / max(1, planned - delay + 1), 0, 1)
    return np.where(step < min(delay, planned), 1.0, np.where(step < planned, c * np.expm1(c) / np.expm1(1), 0.0))


def guided(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x_t: Float[Tensor, "b h a"],
    t: Float[Tensor, " b"],
    previous: Float[Tensor, "b h a"],
    weight: Float[Tensor, "b h 1"],
    beta: float,
) -> Float[Tensor, "b h a"]:
    """The velocity at (x_t, t), pulled towards `previous`; rows of weight 0 are left as they are."""
    time = float(t[0])
    strength = min(beta, (time**2 + (1 - time) ** 2) / (time * (1 - time))) if 0 < time < 1 else beta
    with torch.enable_grad():
        x = x_t.detach().requires_grad_()
        v = velocity(x, t)
        x1 = x + (1 - time) * v
        pull = torch.autograd.grad(x1, x, (previous - x1.detach()) * weight)[0]
    return v.detach() + strength * pull


def require_delay(policy: Any, delay: int, mode: str, beta: float) -> None:
    """ValueError for an unknown mode, a delay that leaves nothing of a chunk, mode "trained" for a policy that was
    trained with shorter prefixes than `delay`, a pull that is no number, and a policy that cannot go on at all."""
    if getattr(policy, "prefix", None) is None:
        raise ValueError(f"{type(policy).__name__} cannot go on from a chunk; take a flow policy, a server of one, or "
                         f"dreamgen.policies.realtime.Ensembled")  # fmt: skip
    if mode not in MODES or not 0 <= delay < policy.horizon:
        raise ValueError(f"mode is '{mode}', delay is {delay}; expected one of {MODES} and 0 <= delay < "
                         f"{policy.horizon}, the policy's horizon")  # fmt: skip
    if mode == "trained" and policy.prefix < delay:
        raise ValueError(f"the policy was trained with prefixes of up to {policy.prefix} steps; delay is {delay}: "
                         f"train with prefix={delay}, or use mode 'guided'")  # fmt: skip
    if not beta >= 0 or not math.isfinite(beta):
        raise ValueError(f"beta is {beta}; expected 0 or more")


@torch.no_grad()
def proceed(
    policy: Any,
    observations: Sequence[Observation],
    seeds: Sequence[int],
    rests: Sequence[Float32[np.ndarray, "p a"]],
    *,
    delay: int,
    mode: str,
    beta: float,
) -> Float32[np.ndarray, "b h a"]:
    """Chunks of a flow policy that go on from `rests`; see `dreamgen.core.protocols.Continuing`. Not compiled, whatever
    the policy's `compile` says: a pull needs the velocity's gradient, and given steps have a time of their own."""
    require_delay(policy, delay, mode, beta)
    if short := [len(rest) for rest in rests if 0 < len(rest) < delay]:
        raise ValueError(f"a rest of {short[0]} steps is left of a chunk, and delay is {delay}: it runs out before the "
                         f"answer comes; ask while at least {delay} are left, or give none to begin anew")  # fmt: skip
    shape = (len(observations), policy.horizon, policy.robot.action_dim)
    before, weight = np.zeros(shape, np.float32), np.zeros(shape[:2], np.float32)
    for i, rest in enumerate(rests):
        before[i, : len(rest)] = rest
        weight[i] = weights(policy.horizon, delay, len(rest))
    seen = policy.observe(observations)
    device = policy.position.device
    previous = policy.space.chunk(torch.from_numpy(before).to(device), seen.states[:, : policy.robot.state_dim])
    previous = F.pad(previous, (0, policy.spaces.action_dim - shape[2]))
    entries = policy.spaces.entries(seen.body, device)
    entries = 1 if entries is None else entries
    frozen = torch.from_numpy(weight == 1)[..., None].to(device)
    pull = torch.from_numpy(weight)[..., None].to(device)

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        return policy.velocity(x_t, t, seen.state, seen.plan, seen.context, seen.body)[0]

    def step(x_t: Tensor, t: Tensor) -> Tensor:
        if mode == "guided":
            return guided(velocity, x_t, t, previous, pull, beta) * entries  # nothing is pulled into the padding
        clean = torch.where(frozen, previous, x_t)
        return policy.velocity(clean, t, seen.state, seen.plan, seen.context, seen.body, clean=frozen[..., 0])[0]

    x = euler(step, policy.noise(seeds), policy.euler_steps)
    x = torch.where(frozen, previous, x)  # what a velocity says of given steps is nothing that it was trained to say
    chunk = policy.finish(x, seen.states)
    done = weight == 1
    chunk[done] = before[done]  # will have been executed by then
    return chunk


class RealTime:
    """A policy asked `delay` robot steps before its chunk is needed. delay: how long an answer takes, in steps.

    The policy is a flow policy of ours, or a client of a server that serves one. It is asked again once the last chunk
    has come, `delay` steps after it was asked for, and while `delay` steps of it are left.

    Raises ValueError where chunks are too short for that, and where it is asked sooner or later; other errors: see
    `require_delay`.
    """

    remembers = True

    def __init__(self, policy: Continuing, *, delay: int, mode: str = "guided", beta: float = 5.0) -> None:
        require_delay(policy, delay, mode, beta)
        if 2 * delay > policy.horizon:
            raise ValueError(f"delay is {delay}, and the policy's chunks have {policy.horizon} steps: the next one is "
                             f"asked for when one comes, {delay} steps into it, and {delay} must be left; expected at "
                             f"most {policy.horizon // 2}")  # fmt: skip
        self.policy, self.how = policy, dict(delay=delay, mode=mode, beta=beta)
        self.robot, self.horizon, self.path = policy.robot, policy.horizon, getattr(policy, "path", None)

    def act(
        self,
        observations: Sequence[Observation],
        seeds: Sequence[int],
        memories: Sequence[dict] | None = None,
        now: int = 0,
    ) -> Float32[np.ndarray, "b h a"]:
        """Action chunks in units from step `now` on; memories: one dictionary an episode, empty at its begin."""
        memories = [{} for _ in observations] if memories is None else memories
        rests = [self._rest(memory, now) for memory in memories]
        chunks = self.policy.proceed(observations, seeds, rests, **self.how)
        for memory, chunk in zip(memories, chunks, strict=True):
            memory.update(start=now, chunk=chunk)
        return chunks

    def _rest(self, memory: dict, now: int) -> Float32[np.ndarray, "p a"]:
        """What is left at step `now` of the last chunk, nothing where there is none."""
        if not memory:
            return np.zeros((0, self.robot.action_dim), np.float32)
        after, delay = now - memory["start"], self.how["delay"]
        if not delay <= after <= self.horizon - delay:
            raise ValueError(f"the policy is asked again after {after} steps; with delay={delay} and chunks of "
                             f"{self.horizon} steps expected {delay} to {self.horizon - delay}: sooner the last chunk "
                             f"has not come, later it runs out before the next one comes. Set execute, or take a "
                             f"smaller delay")  # fmt: skip
        return memory["chunk"][after:]


class Ensembled:
    """Any policy, its overlapping chunks averaged with weights exp(-decay * i), i = 0 the oldest (Zhao et al. 2023).

    Binary parts become the nearer of their two values, of rotations the mean is that of `dreamgen.core.rotations`.
    decay 0 is the plain mean.
    """

    remembers = True

    def __init__(self, policy: Policy, *, decay: float = 0.01) -> None:
        if not decay >= 0 or not math.isfinite(decay):
            raise ValueError(f"decay is {decay}; expected 0 or more")
        self.policy, self.decay = policy, decay
        self.robot, self.horizon, self.path = policy.robot, policy.horizon, getattr(policy, "path", None)

    def act(
        self,
        observations: Sequence[Observation],
        seeds: Sequence[int],
        memories: Sequence[dict] | None = None,
        now: int = 0,
    ) -> Float32[np.ndarray, "b h a"]:
        """Action chunks in units from step `now` on; memories: one dictionary an episode, empty at its begin."""
        memories = [{} for _ in observations] if memories is None else memories
        fresh = self.policy.act(observations, seeds)
        merged, turns = np.zeros_like(fresh), [part for part in self.robot.action if part.rotation]
        for i, memory in enumerate(memories):
            kept = [(start, c) for start, c in memory.get("chunks", []) if now - start < self.horizon]
            memory["chunks"] = kept = [*kept, (now, fresh[i])]
            total, moments = np.zeros((self.horizon, 1), np.float32), np.zeros((len(turns), self.horizon, 4, 4))
            for rank, (start, chunk) in enumerate(kept):
                share = np.float32(math.exp(-self.decay * rank))
                rest = chunk[now - start :]
                merged[i, : len(rest)] += share * rest
                total[: len(rest)] += share
                for part, sums in zip(turns, moments, strict=True):
                    q = rotations.read(part, rest[:, part.slice])
                    sums[: len(rest)] += share * q[:, :, None] * q[:, None]
            merged[i] /= total
            for part, sums in zip(turns, moments, strict=True):
                merged[i, :, part.slice] = rotations.entries(part, rotations.principal(sums), fresh[i, :, part.slice])
        return command(self.robot, merged)
