"""What else could have happened: one first frame, many streams of actions. A list maker like those of `data.prompts`.

The first stream of a pair is the expert's (from a simulator) or the recorded one (from a dataset); the others are
changed ones, another episode's, a policy's, or found by searching for failure. Prompts of one first frame share `pair`;
origin holds `stream`, its name, and `actions`, so that the simulator can execute exactly what was dreamt. What a policy
does and what a search finds is dreamt when the clip's turn has come: a share of the list pays for its own alone. A
policy acts in all the clips of a batch at once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from dreamgen.core.clip import Draft, Past, Prompt
from dreamgen.core.embodiment import Embodiment
from dreamgen.core.kinematics import clipped
from dreamgen.core.manifest import fingerprint
from dreamgen.core.protocols import Policy, Sim
from dreamgen.core.seeding import rng_for, seed_for
from dreamgen.data.lerobot import Dataset
from dreamgen.data.prompts import key_rows, require_shares
from dreamgen.data.states import state_in_dream
from dreamgen.data.streams import late, mirrored, noisy, still, stuck
from dreamgen.engine.precision import place
from dreamgen.sims.rollout import ask
from dreamgen.video.tiling import tile
from dreamgen.worlds.env import seen_of
from dreamgen.worlds.rollout import extend
from dreamgen.worlds.search import AdversarialSearch

STREAMS = ("small", "large", "mirrored", "stuck", "late", "still", "other", "policy", "adversarial")


@dataclass(frozen=True, kw_only=True, eq=False)
class ActionPrompts:
    """first_frames: how many, from `sim` (spread over `instructions`, all by default) or from episodes of `dataset`;
    exactly one of the two is given. keyframes: where in each recorded episode, shares of its rows in [0, 1); 0 is its
    first row. rows: robot steps of each stream, which the episode must still hold from there on.

    streams: which, of small and large noise, mirrored, stuck, late, still, other (another first frame's own actions),
    policy (needs `policy`, and the `world` in whose dream it acts), adversarial (needs `search`; origin holds the
    `probability` of success that it came down to).

    Raises ValueError for streams that are unknown, lack what they need, or could only repeat the first frame's own,
    for other keyframes, or keyframes of a simulator, and for fewer recorded first frames than were asked for.
    """

    sim: Callable[[], Sim] | None = None
    dataset: Dataset | None = None
    first_frames: int = 8
    keyframes: Sequence[float | int] = (0,)
    rows: int = 32
    instructions: Sequence[str] | None = None
    streams: Sequence[str] = ("small", "large", "mirrored", "stuck", "other")
    policy: Policy | None = None
    execute: int = 8
    world: object | None = None
    search: AdversarialSearch | None = None
    seed: int = 0

    def __call__(self) -> list[Prompt | Draft]:
        if unknown := [name for name in self.streams if name not in STREAMS]:
            raise ValueError(f"there are no streams {unknown}; expected some of {', '.join(STREAMS)}")
        if (self.sim is None) == (self.dataset is None):
            raise ValueError("first frames come from either a simulator or a dataset; give exactly one of prompts.sim "
                             "and prompts.dataset")  # fmt: skip
        require_shares(self.keyframes)
        if self.sim is not None and any(self.keyframes):
            raise ValueError(f"prompts.keyframes is {list(self.keyframes)} and first frames come from a simulator, "
                             "which begins episodes at their start; give recordings (prompts.sim=null "
                             "prompts.dataset=...), or one that begins midway (sim=tabletop_midway)")  # fmt: skip
        if "policy" in self.streams and (self.policy is None or self.world is None):
            raise ValueError("the stream 'policy' needs a policy and a world in whose dream it acts; give "
                             "prompts.policy and prompts.world, or leave the stream out")  # fmt: skip
        if "adversarial" in self.streams and self.search is None:
            raise ValueError("the stream 'adversarial' needs a search; give prompts.search, or leave the stream out")
        robot = self._robot() if self.dataset is None else self.dataset.robot
        same = repeating(robot, self.first_frames, self.rows)
        if lost := [name for name in self.streams if name in same]:
            raise ValueError("streams that would only repeat the first frame's own actions: "
                             + ", ".join(f"{name} ({same[name]})" for name in lost)
                             + ". Leave them out of prompts.streams.")  # fmt: skip
        first = self._simulated() if self.sim is not None else self._recorded()
        found = {prompt.pair: prompt for prompt in first}
        dreamt = {"policy": partial(self._acted, found), "adversarial": partial(self._sought, found)}
        made = []
        for k, prompt in enumerate(first):
            made.append(self._named(prompt, "own", prompt.action))
            for name in self.streams:
                if name in dreamt:
                    made.append(self._draft(prompt, name, dreamt[name]))
                    continue
                rng = rng_for(self.seed, "stream", prompt.pair, name)
                action = {
                    "small": lambda a, rng=rng: noisy(robot, a, 0.1, rng, smooth=0.6),
                    "large": lambda a, rng=rng: noisy(robot, a, 0.6, rng, smooth=0.6),
                    "mirrored": lambda a: mirrored(robot, a),
                    "stuck": lambda a, rng=rng: stuck(robot, a, high=bool(rng.integers(2))),
                    "late": lambda a: late(robot, a, len(a) // 4),
                    "still": lambda a: still(robot, a),
                    "other": lambda a, k=k: first[(k + 1) % len(first)].action,
                }[name](prompt.action)
                made.append(self._named(prompt, name, action))
        return made

    def _robot(self) -> object:
        sim = self.sim()
        sim.close()
        return sim.robot

    def _named(self, prompt: Prompt, name: str, action: np.ndarray, **found: float) -> Prompt:
        id = f"{prompt.pair}_{name}"
        origin = {**prompt.origin, "stream": name, "actions": np.asarray(action, float).round(6).tolist(), **found}
        return replace(prompt, id=id, action=np.asarray(action, np.float32), origin=origin,
                       seed=seed_for(self.seed, "dream", id))  # fmt: skip

    def _draft(self, first: Prompt, name: str, finish: Callable[[Sequence[Prompt]], list[Prompt]]) -> Draft:
        """Of a stream that is itself dreamt."""
        id = f"{first.pair}_{name}"
        return Draft(id=id, first=partial(_held, first), instruction=first.instruction, pair=first.pair,
                     seed=seed_for(self.seed, "dream", id), origin=first.origin, finish=finish)  # fmt: skip

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
        data.require_actions("prompts.dataset")
        begun = {i: [row for row in key_rows(self.keyframes, data.episode(i)) if row + self.rows <= data.length(i)]
                 for i in range(len(data))}  # fmt: skip
        order = rng_for(self.seed, "first frames").permutation([i for i, rows in begun.items() if rows]).tolist()
        chosen = [(row, i) for i in order for row in begun[i]][: self.first_frames]
        if len(chosen) < self.first_frames:
            raise ValueError(f"{data.root} has {len(chosen)} first frames with {self.rows} rows or more from there on; "
                             f"{self.first_frames} were asked for. Ask for fewer (prompts.first_frames), or shorter "
                             "streams (prompts.rows)")  # fmt: skip
        held = fingerprint(data.root)
        for row, i in sorted(chosen):  # the next one, whose actions are `other`, is of another episode where it can be
            episode = data.episode(i)
            known = ("sim", "seed", "instruction") if row == 0 else ()  # no simulator begins in its middle
            origin = {k: v for k, v in episode.meta.items() if k in known}
            name = f"e{data.index(i):06d}" + (f"_r{row}" if row else "")
            made.append(Prompt(id=name, pair=name, image=data.canvas(i, [row])[0], instruction=data.instruction(i),
                               seed=i, state=state_in_dream(data, i, row), action=episode.action[row : row + self.rows],
                               origin=origin | {"dataset": held, "episode": data.index(i), "row": row}))  # fmt: skip
        return made

    def _acted(self, first: Mapping[str, Prompt], prompts: Sequence[Prompt]) -> list[Prompt]:
        """The streams of a policy that acts in the dreams of these first frames, all in one batch."""
        place(self.world, self.policy, self.search)
        robot, own = self.world.robot, [first[prompt.pair] for prompt in prompts]
        pasts, memories = [Past.begin(prompt, robot.action_dim) for prompt in own], [{} for _ in own]
        while (now := len(pasts[0].action)) < self.rows:
            seeds = [seed_for(self.seed, prompt.pair, now) for prompt in own]
            chunks = ask(self.policy, [seen_of(robot, past) for past in pasts], seeds, memories, now)
            steps = min(self.execute, self.rows - now)
            pasts = extend(self.world, pasts, [clipped(robot, chunk[:steps]) for chunk in chunks])
        return [self._named(past.prompt, "policy", past.action) for past in pasts]

    def _sought(self, first: Mapping[str, Prompt], prompts: Sequence[Prompt]) -> list[Prompt]:
        """The streams that a search finds, one first frame after another: each has a population of its own."""
        place(self.world, self.policy, self.search)
        made = []
        for prompt in (first[prompt.pair] for prompt in prompts):
            action, least = self.search(prompt, prompt.action, seed_for(self.seed, prompt.pair))
            made.append(self._named(prompt, "adversarial", action, probability=least))
        return made


def _held(prompt: Prompt) -> tuple[np.ndarray, np.ndarray]:
    """Picture and state of a first frame that is there."""
    return prompt.image, prompt.state


def repeating(robot: Embodiment, first_frames: int, rows: int) -> dict[str, str]:
    """Streams that would equal the first frame's own, whatever it is, and why."""
    found, kinds = {}, {part.kind for part in robot.action}
    if kinds == {"binary"}:
        found |= dict.fromkeys(("small", "large", "adversarial"), f"'{robot.name}' has binary commands alone")
    if not any(part.kind == "delta" and part.width > 1 for part in robot.action):
        found["mirrored"] = f"'{robot.name}' has no delta part of 2 or more entries"
    if "binary" not in kinds:
        found["stuck"] = f"'{robot.name}' has no binary part"
    if rows < 4:
        found["late"] = f"a quarter of {rows} rows is no step"
    if first_frames < 2:
        found["other"] = "there is no other first frame"
    return found
