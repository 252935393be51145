"""The values that cross borders between rooms: frozen, shaped, typed. Dicts do not cross.

Letters: b batch, t frames, s robot steps, v views, h w pixels, c channels, d state width, a action width.
Pictures are uint8 RGB in [0, 255]; a canvas is the tiled picture of all views of an embodiment.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32, UInt8


@dataclass(frozen=True, kw_only=True, eq=False)
class Observation:
    """What a policy sees at one robot step: one picture per view, the state, the instruction."""

    views: dict[str, UInt8[np.ndarray, "h w 3"]]
    state: Float32[np.ndarray, " d"]
    instruction: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """What is dreamed: a first frame (canvas), an instruction, a seed.

    id: unique, fit for a file name. pair: shared by all prompts with one first frame (counterfactuals).
    state: proprioception at the first frame, empty where unknown. action: what the robot does from there on, one row
    per robot step, for action-conditioned models; empty where the instruction alone decides. origin: where the first
    frame came from, plain JSON (e.g. {"dataset": ..., "episode": 3, "row": 0} or {"sim": "tabletop", "instruction":
    ..., "seed": 7}).
    """

    id: str
    image: UInt8[np.ndarray, "h w 3"]
    instruction: str
    seed: int
    pair: str = ""
    state: Float32[np.ndarray, " d"] = field(default_factory=lambda: np.zeros(0, np.float32))
    action: Float32[np.ndarray, "s a"] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    origin: dict = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Draft:
    """A prompt whose first frame is still to be read, so that a list of any length takes no room.

    first: gives the image and the state of a `Prompt`, the same whenever it is called; drafts of one first frame share
    it. finish: makes such prompts whole, in order, where this takes long, such as a search for their actions; those of
    a batch that share it are given together. id, instruction, seed, pair, origin: see `Prompt`.
    """

    id: str
    first: Callable[[], tuple[np.ndarray, np.ndarray]]
    instruction: str
    seed: int
    pair: str = ""
    origin: dict = field(default_factory=dict)
    finish: Callable[[Sequence[Prompt]], Sequence[Prompt]] | None = None


def read_prompts(prompts: "Sequence[Prompt | Draft]") -> list[Prompt]:
    """Prompts with their first frames; drafts that share one read it once, those that share what finishes them are
    finished together."""
    seen: dict[Callable, tuple[np.ndarray, np.ndarray]] = {}
    unfinished: dict[Callable, list[int]] = {}
    made = []
    for k, prompt in enumerate(prompts):
        if isinstance(prompt, Draft):
            if prompt.finish is not None:
                unfinished.setdefault(prompt.finish, []).append(k)
            image, state = seen[prompt.first] = seen.get(prompt.first) or prompt.first()
            prompt = Prompt(id=prompt.id, image=image, instruction=prompt.instruction, seed=prompt.seed,
                            pair=prompt.pair, state=state, origin=prompt.origin)  # fmt: skip
        made.append(prompt)
    for finish, places in unfinished.items():
        for k, prompt in zip(places, finish([made[k] for k in places]), strict=True):
            made[k] = prompt
    return made


@dataclass(frozen=True, kw_only=True, eq=False)
class Past:
    """An episode so far: its prompt, the frames since the first (the last is now), the actions executed since then.

    state: proprioception now, empty where unknown.
    """

    prompt: Prompt
    video: UInt8[np.ndarray, "t h w 3"]
    action: Float32[np.ndarray, "s a"]
    state: Float32[np.ndarray, " d"] = field(default_factory=lambda: np.zeros(0, np.float32))

    @classmethod
    def begin(cls, prompt: Prompt, width: int) -> "Past":
        """Nothing has happened yet; width: entries of an action."""
        return cls(prompt=prompt, video=prompt.image[None], action=np.zeros((0, width), np.float32),
                   state=prompt.state)  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Clip:
    """A video with its prompt's provenance: frames are `1 / video_hz` apart, frame 0 is the prompt's image.

    state: proprioception at frame 0, empty where unknown. action: what was commanded from there on, one row per robot
    step, for who judges an episode; empty where nobody says, and for labelers, which are to find it.
    """

    id: str
    video: UInt8[np.ndarray, "t h w 3"]
    video_hz: str
    instruction: str
    seed: int = 0
    pair: str = ""
    state: Float32[np.ndarray, " d"] = field(default_factory=lambda: np.zeros(0, np.float32))
    action: Float32[np.ndarray, "s a"] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    origin: dict = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Labels:
    """Pseudo-actions of one clip, one row per robot step that the clip spans, in the units of the embodiment.

    spread: standard deviation of the merged predictions per step and entry: a free confidence, same unit as value.
    """

    value: Float32[np.ndarray, "s a"]
    spread: Float32[np.ndarray, "s a"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Episode:
    """One trajectory, one row per robot step: `video[i]` and `state[i]` are seen, then `action[i]` is executed.

    video holds one array per view; it is empty where pictures are read lazily. extra: per-row columns, name to (s, k).
    meta: plain JSON that goes with the episode (provenance, success, seed).
    """

    instruction: str
    state: Float32[np.ndarray, "s d"]
    action: Float32[np.ndarray, "s a"]
    video: dict[str, UInt8[np.ndarray, "s h w 3"]] = field(default_factory=dict)
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    meta: dict = field(default_factory=dict)
