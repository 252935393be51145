"""A gymnasium environment whose world is a model: policies act in a dream, a judge says whether they succeeded.

Episodes run in step with each other, in one batch. What a policy sees are the dreamt views, its instruction, and the
state by the embodiment's rule from the executed commands: nothing that a robot would not give it. First states are
prompts, from a simulator, a recording (at any row) or a photo; of a photo the state is unknown, NaN, and stays so.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dreamgen.core.clip import Clip, Observation, Past, Prompt
from dreamgen.core.embodiment import Embodiment
from dreamgen.core.kinematics import clipped, follow, within
from dreamgen.core.protocols import ActionWorldModel, Judge, Policy
from dreamgen.core.seeding import seed_for
from dreamgen.sims.rollout import ask
from dreamgen.video.tiling import untile
from dreamgen.worlds.rollout import extend

try:
    import gymnasium
    from gymnasium.vector import AutoresetMode, VectorEnv
except ImportError as error:
    raise ImportError("DreamEnv needs the package gymnasium: pip install -e '.[sim]' in dreamgen's folder") from error

LOOKS = ("last", "every")
log = logging.getLogger(__name__)


class DreamEnv(VectorEnv):
    """num_envs dreams at once; an action of one of them is a part of a chunk (execute, a), in units of the robot.

    steps: robot steps after which an episode is truncated. looks: when the judge is asked: at the "last" step, or after
    "every" part, where the first yes ends an episode. confidence: dream all twice, with another noise; the share of
    agreement of the two judgements is told. threshold: of the judge; None takes the judge's own, else 0.5.

    An observation is {view: (n h w 3) uint8, "state": (n d) float32}; `observations()` gives them to policies. n is the
    number of prompts, and num_envs, which the spaces speak of, the most there may be. A state is NaN, which no space
    contains, where the prompt has none; parts that no rule of the embodiment moves keep their first value. All episodes
    begin and are reset together. info: instruction, probability (n,), abstained (n,) where the judge says nothing,
    agreement (n,).

    Raises ValueError: a judge of another robot; first frames of another size than the embodiment's canvas; states of
    another width; actions outside the limits; `execute` steps that do not end on a frame of the model's clock; a step
    before the first reset, and a reset of some episodes.
    """

    metadata = {"render_modes": ["rgb_array"], "autoreset_mode": AutoresetMode.DISABLED}
    render_mode = "rgb_array"

    def __init__(self, *, world: ActionWorldModel, judge: Judge, num_envs: int = 8, steps: int = 48, execute: int = 8,
                 looks: str = "last", confidence: bool = False, threshold: float | None = None) -> None:  # fmt: skip
        if looks not in LOOKS or steps % execute:
            raise ValueError(f"looks is '{looks}', steps is {steps}, execute {execute}; expected one of "
                             f"{', '.join(LOOKS)}, and steps a multiple of execute")  # fmt: skip
        world.robot.require_same(judge, "the judge")
        self.world, self.judge, self.num_envs = world, judge, num_envs
        self.steps, self.execute, self.looks, self.confidence = steps, execute, looks, confidence
        self.threshold = getattr(judge, "threshold", 0.5) if threshold is None else threshold
        robot = world.robot
        limits = [part.limits or (-np.inf, np.inf) for part in robot.action for _ in range(part.width)]
        low, high = np.array(limits, np.float32).T
        self.single_action_space = gymnasium.spaces.Box(np.tile(low, (execute, 1)), np.tile(high, (execute, 1)))
        views = {view.name: gymnasium.spaces.Box(0, 255, (view.height, view.width, 3), np.uint8)
                 for view in robot.views}  # fmt: skip
        state = gymnasium.spaces.Box(-np.inf, np.inf, (robot.state_dim,))
        self.single_observation_space = gymnasium.spaces.Dict({**views, "state": state})
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, num_envs)
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.pasts: list[Past] = []
        self.held = held_parts(robot)  # said once, by the first episode whose state is known

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """options: {"prompts": at most num_envs prompts}; a seed is added to theirs."""
        prompts: Sequence[Prompt] = (options or {}).get("prompts", ())
        robot = self.world.robot
        if "reset_mask" in (options or {}):
            raise ValueError("reset got a reset_mask; dreams advance in step with each other and are reset together. "
                             "Give options={'prompts': [...]} alone once all have ended")  # fmt: skip
        if not 0 < len(prompts) <= self.num_envs:
            raise ValueError(f"reset got {len(prompts)} prompts; give options={{'prompts': [...]}} with 1 to "
                             f"{self.num_envs} first frames and instructions")  # fmt: skip
        for prompt in prompts:
            if prompt.image.shape != (*robot.canvas, 3):
                raise ValueError(f"the first frame of '{prompt.id}' is {prompt.image.shape}, another camera than that "
                                 f"of embodiment '{robot.name}', whose canvas is {(*robot.canvas, 3)}")  # fmt: skip
            if prompt.state.shape not in ((robot.state_dim,), (0,)):
                raise ValueError(f"the state of '{prompt.id}' has {prompt.state.shape[0]} entries; embodiment "
                                 f"'{robot.name}' has {robot.state_dim}")  # fmt: skip
        if self.held and any(prompt.state.size for prompt in prompts):
            log.warning("no command of embodiment '%s' says where it leads the state parts %s; policies are told their "
                        "first value throughout. Give the action parts that move them `moves`, binary ones `sets`.",
                        robot.name, ", ".join(self.held))  # fmt: skip
            self.held = []
        if seed is not None:
            prompts = [replace(p, seed=seed_for(seed, "dream", str(p.seed))) for p in prompts]
        self.pasts = [Past.begin(prompt, robot.action_dim) for prompt in prompts]
        second = [replace(p, seed=seed_for(p.seed, "again")) for p in prompts]
        self.second = [Past.begin(prompt, robot.action_dim) for prompt in second] if self.confidence else []
        self.done = np.zeros(len(prompts), bool)
        self.probability, self.agreement = np.full((2, len(prompts)), np.nan)
        return self._seen(), {"instruction": [p.instruction for p in prompts]}

    def _seen(self) -> dict[str, np.ndarray]:
        views = untile(self.world.robot, np.stack([past.video[-1] for past in self.pasts]))
        return {**views, "state": np.stack([seen.state for seen in self.observations()])}

    def observations(self) -> list[Observation]:
        """What a policy is given of each episode."""
        return [seen_of(self.world.robot, past) for past in self.pasts]

    def step(self, actions: np.ndarray) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray, dict]:
        """actions (n, execute, a). Episodes that have ended stay as they are."""
        robot, n = self.world.robot, len(self.pasts)
        if not n:
            raise ValueError("step before reset; call reset(options={'prompts': [...]}) with first frames and "
                             "instructions")  # fmt: skip
        wanted = (n, self.execute, robot.action_dim)
        if np.shape(actions) != wanted:
            raise ValueError(f"actions are {np.shape(actions)}; expected {wanted}: episodes, steps that are executed "
                             f"before the policy is asked again, entries")  # fmt: skip
        actions = within(robot, actions, "DreamEnv.step")
        alive = np.flatnonzero(~self.done)
        for pasts in filter(None, (self.pasts, self.second)):
            if len(alive):
                moved = extend(self.world, [pasts[i] for i in alive], [actions[i] for i in alive])
                for i, past in zip(alive, moved, strict=True):
                    pasts[i] = past
        over = max(len(past.action) for past in self.pasts) >= self.steps
        if self.looks == "every" or over:
            self._ask(alive)
        terminated = self.probability >= self.threshold  # nan: an abstention is no success
        reward = (terminated & ~self.done).astype(np.float64)
        self.done |= terminated | over
        info = {"probability": self.probability.copy(), "agreement": self.agreement.copy(),
                "abstained": np.isnan(self.probability) & self.done}  # fmt: skip
        return self._seen(), reward, terminated, np.full(n, over) & ~terminated, info

    def _ask(self, alive: np.ndarray) -> None:
        found = judged(self.judge, [self.pasts[i] for i in alive], self.world.clock.video_hz)
        self.probability[alive] = found
        if self.second:
            again = judged(self.judge, [self.second[i] for i in alive], self.world.clock.video_hz)
            same = ((found >= self.threshold) == (again >= self.threshold)).astype(float)
            self.agreement[alive] = np.where(np.isnan(found) | np.isnan(again), np.nan, same)

    def render(self) -> tuple[np.ndarray, ...]:
        """The canvas of every episode now, (h w 3) each."""
        return tuple(past.video[-1] for past in self.pasts)

    def close_extras(self, **kwargs: Any) -> None:
        self.pasts, self.second = [], []


def seen_of(robot: Embodiment, past: Past) -> Observation:
    """What a policy sees of an episode now; an unknown state is NaN."""
    state = past.state if len(past.state) else np.full(robot.state_dim, np.nan, np.float32)
    return Observation(views=untile(robot, past.video[-1]), state=state, instruction=past.prompt.instruction)


def held_parts(robot: Embodiment) -> list[str]:
    """The state parts that no command moves by the embodiment's rule."""
    known = follow(robot, np.zeros(robot.state_dim), np.zeros((0, robot.action_dim)))[1]
    return [part.name for part in robot.state if not known[part.slice].all()]


def judged(judge: Judge, pasts: Sequence[Past], video_hz: str) -> np.ndarray:
    """Probability of success (b,) of episodes so far; nan where the judge abstains."""
    return np.asarray(judge.judge([clip_of(past, video_hz) for past in pasts]), np.float64)


def looked(env: DreamEnv, pasts: Sequence[Past], judge: Judge | None = None) -> np.ndarray:
    """Probability of success (b,) of whole episodes by `judge` (None: that of `env`), asked when `env` asks its own:
    with looks="every" at the first yes, else at the end; nan where it abstains."""
    judge, limit = (env.judge, env.threshold) if judge is None else (judge, getattr(judge, "threshold", 0.5))
    hz, found = env.world.clock.video_hz, np.full(len(pasts), np.nan)
    parts = [max(1, len(past.action) // env.execute) if env.looks == "every" else 1 for past in pasts]
    for part in range(1, max(parts, default=0) + 1):
        open_ = [k for k, count in enumerate(parts) if part <= count and not found[k] >= limit]
        if open_:
            found[open_] = judged(judge, [until(pasts[k], part, parts[k]) for k in open_], hz)
    return found


def until(past: Past, part: int, parts: int) -> Past:
    """The first `part` of `parts` equal parts of an episode."""
    frames, steps = (len(past.video) - 1) * part // parts, len(past.action) * part // parts
    return replace(past, video=past.video[: frames + 1], action=past.action[:steps])


def clip_of(past: Past, video_hz: str) -> Clip:
    """An episode so far as a clip."""
    p = past.prompt
    return Clip(id=p.id, video=past.video, video_hz=video_hz, instruction=p.instruction, seed=p.seed, pair=p.pair,
                state=p.state, action=past.action, origin=p.origin)  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Dreamt:
    """One closed-loop episode in the dream. probability and agreement are nan where the judge abstained."""

    past: Past
    probability: float
    agreement: float


def dream_episodes(env: DreamEnv, policy: Policy, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Dreamt]:
    """`policy` in the dreams of `prompts`, in order; chunk noise is seeded as in the simulator (`sims.rollout`).

    Raises ValueError for a policy of another robot, or whose chunks are shorter than what is executed of them.
    """
    env.world.robot.require(policy.robot.contract(), "the policy")
    if policy.horizon < env.execute:
        raise ValueError(f"the policy's chunks have {policy.horizon} steps, execute is {env.execute}; execute at most "
                         "as many as it plans")  # fmt: skip
    done: list[Dreamt] = []
    for start in range(0, len(prompts), env.num_envs):
        env.reset(options={"prompts": prompts[start : start + env.num_envs]})
        own = seeds[start : start + env.num_envs]
        memories: list[dict] = [{} for _ in own]
        for taken in range(0, env.steps, env.execute):
            chunks = ask(policy, env.observations(), [seed_for(seed, "chunk", taken) for seed in own], memories, taken)
            env.step(clipped(env.world.robot, np.asarray(chunks)[:, : env.execute]))
            if env.done.all():
                break
        done += [Dreamt(past=past, probability=float(p), agreement=float(a))
                 for past, p, a in zip(env.pasts, env.probability, env.agreement, strict=True)]  # fmt: skip
    return done
