"""What else could have happened: one first frame, many streams of actions. A list maker like those of `data.prompts`.

The first stream of a pair is the expert's (from a simulator) or the recorded one (from a dataset); the others are
changed ones, another episode's, a policy's, or found by searching for failure. Prompts of one first frame share `pair`;
origin holds `stream`, its name, and `actions`, so that the simulator can execute exactly what was dreamt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dreamgen.core.clip import Observation, Past, Prompt
from dreamgen.core.protocols import Policy, Sim
from dreamgen.core.seeding import rng_for, seed_for
from dreamgen.data.lerobot import Dataset
from dreamgen.data.streams import late, mirrored, noisy, still, stuck
from dreamgen.video.tiling import tile, untile
from dreamgen.worlds.rollout import extend
from dreamgen.worlds.search import AdversarialSearch

STREAMS = ("small", "large", "mirrored", "stuck", "late", "still", "other", "policy", "adversarial")


@dataclass(frozen=True, kw_only=True, eq=False)
class ActionPrompts:
    """first_frames: how many, from `sim` (spread over `instructions`, all by default) or from the start of episodes of
    `dataset`; exactly one of the two is given. rows: robot steps of each stream.

    streams: which, of small and large noise, mirrored, stuck, late, still, other (another first frame's own actions),
    policy (needs `policy`; in the dream if `world` is given, else one chunk after another blindly from the first
    frame), adversarial (needs `search`).
    """

    sim: Callable[[], Sim] | None = None
    dataset: Dataset | None = None
    first_frames: int = 8
    rows: int = 32
    instructions: Sequence[str] | None = None
    streams: Sequence[str] = ("small", "large", "mirrored", "stuck", "other")
    policy: Policy | None = None
    execute: int = 8
    world: object | None = None
    search: AdversarialSearch | None = None
    seed: int = 0

    def __call__(self) -> list[Prompt]:
        unknown = [name for name in self.streams if name not in STREAMS]
        needs = {"policy": self.policy and self.world, "adversarial": self.search}
        lacking = [name for name in needs if name in self.streams and needs[name] is None]
        if unknown or lacking or (self.sim is None) == (self.dataset is None):
            raise ValueError(f"streams are {list(self.streams)}; expected some of {', '.join(STREAMS)}, a policy and a "
                             "world for 'policy', a search for 'adversarial', and either a simulator or a dataset for "
                             "first frames")  # fmt: skip
        first = self._simulated() if self.sim is not None else self._recorded()
        robot = (self.dataset or self.policy or self.world or self.sim).robot if self.sim is None else self._robot()
        made = []
        for k, prompt in enumerate(first):
            made.append(self._named(prompt, "own", prompt.action))
            for name in self.streams:
                rng = rng_for(self.seed, "stream", prompt.pair, name)
                action = {
                    "small": lambda a, rng=rng: noisy(robot, a, 0.1, rng, smooth=0.6),
                    "large": lambda a, rng=rng: noisy(robot, a, 0.6, rng, smooth=0.6),
                    "mirrored": lambda a: mirrored(robot, a),
                    "stuck": lambda a, rng=rng: stuck(robot, a, high=bool(rng.integers(2))),
                    "late": lambda a: late(robot, a, len(a) // 4),
                    "still": lambda a: still(robot, a),
                    "other": lambda a, k=k: first[(k + 1) % len(first)].action,
                    "policy": lambda a, p=prompt: self._acted(p),
                    "adversarial": lambda a, p=prompt: self.search(p, a, seed_for(self.seed, p.pair))[0],
                }[name](prompt.action)
                made.append(self._named(prompt, name, action))
        return made

    def _robot(self) -> object:
        sim = self.sim()
        sim.close()
        return sim.robot

    def _named(self, prompt: Prompt, name: str, action: np.ndarray) -> Prompt:
        id = f"{prompt.pair}_{name}"
        origin = {**prompt.origin, "stream": name, "actions": np.asarray(action, float).round(6).tolist()}
        return replace(prompt, id=id, action=np.asarray(action, np.float32), origin=origin,
                       seed=seed_for(self.seed, "dream", id))  # fmt: skip

    def _simulated(self) -> list[Prompt]:
        sim, made = self.sim(), []
        texts = list(self.instructions or sim.instructions)
        if unknown := [text for text in texts if text not in sim.instructions]:
            raise ValueError(f"the simulator does not know {unknown}; it knows {list(sim.instructions)}")
        for k in range(self.first_frames):
            text, own = texts[k * len(texts) // self.first_frames], seed_for(self.seed, "first frame", k)
            sim.reset(text, own)
            seen = sim.observe()
            expert, action = sim.expert(), []
            for _ in range(self.rows):
                action.append(np.asarray(next(expert), np.float32))
                sim.step(action[-1])
            image = tile(sim.robot, {name: view[None] for name, view in seen.views.items()})[0]
            origin = {"sim": type(sim).__name__.lower(), "instruction": text, "seed": own}
            made.append(Prompt(id=f"a{k:06d}", pair=f"a{k:06d}", image=image, instruction=text, seed=own,
                               state=seen.state, action=np.stack(action), origin=origin))  # fmt: skip
        sim.close()
        return made

    def _recorded(self) -> list[Prompt]:
        data, made = self.dataset, []
        fit = [i for i in range(len(data)) if data.length(i) >= self.rows]
        if len(fit) < self.first_frames:
            raise ValueError(f"{data.root} has {len(fit)} episodes of {self.rows} rows or more; {self.first_frames} "
                             "first frames were asked for")  # fmt: skip
        for i in sorted(rng_for(self.seed, "first frames").permutation(fit)[: self.first_frames].tolist()):
            episode = data.episode(i)
            origin = {k: v for k, v in episode.meta.items() if k in ("sim", "seed", "instruction")}
            name = f"e{data.index(i):06d}"
            made.append(Prompt(id=name, pair=name, image=data.canvas(i, [0])[0], instruction=data.instruction(i),
                               seed=i, state=episode.state[0], action=episode.action[: self.rows],
                               origin=origin | {"episode": data.index(i), "row": 0}))  # fmt: skip
        return made

    def _acted(self, prompt: Prompt) -> np.ndarray:
        """The policy's own actions, closed-loop in the dream."""
        past = Past.begin(prompt, self.world.robot.action_dim)
        while len(past.action) < self.rows:
            seen = Observation(views=untile(self.world.robot, past.video[-1]), state=past.state,
                               instruction=prompt.instruction)  # fmt: skip
            chunk = self.policy.act([seen], [seed_for(self.seed, prompt.pair, len(past.action))])[0]
            (past,) = extend(self.world, [past], [chunk[: min(self.execute, self.rows - len(past.action))]])
        return past.action
