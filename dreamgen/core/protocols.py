"""The parts that can be exchanged, on one page. Shapes: see `dreamgen.core.clip`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from dreamgen.core.clip import Clip, Labels, Observation, Past, Prompt
from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment


@runtime_checkable
class Sim(Protocol):
    """A simulated robot. `reset` then `step` until done; pictures are drawn only when `observe` is called."""

    robot: Embodiment
    instructions: Sequence[str]

    def reset(self, instruction: str, seed: int) -> None:
        """Begin an episode; the same (instruction, seed) gives the same first state, to the bit.

        Where it also takes `scene_of`, it can lay the scene out as for that other instruction.
        """
        ...

    def observe(self) -> Observation:
        """Draw all views (h w 3) and read the state (d,)."""
        ...

    def state(self) -> np.ndarray:
        """The state (d,) float32 without drawing."""
        ...

    def step(self, action: np.ndarray) -> bool:
        """Execute one action (a,) for one robot step; True once the instruction has been fulfilled."""
        ...

    def expert(self) -> Iterator[np.ndarray]:
        """Actions (a,) of the scripted expert for the episode that was reset last, one per robot step."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class WorldModel(Protocol):
    """First frames and instructions to videos."""

    clock: Clock

    def dream(self, prompts: Sequence[Prompt]) -> list[Clip]:
        """One clip per prompt, in order; a clip depends on its own prompt alone, never on its batch."""
        ...


@runtime_checkable
class ActionWorldModel(Protocol):
    """Frames and actions to the frames that follow."""

    robot: Embodiment
    clock: Clock

    def imagine(self, pasts: Sequence[Past], actions: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The new frames (n h w 3) of each past under its next actions (s a); all pasts are equally long.

        A past's frames depend on it, its actions and its prompt's seed alone, never on the batch. ValueError unless
        the actions end on a frame that the model can end on.
        """
        ...


@runtime_checkable
class Labeler(Protocol):
    """Videos to pseudo-actions."""

    robot: Embodiment

    def label(self, clips: Sequence[Clip]) -> list[Labels]:
        """One Labels (s a) per clip, in order; s is what the clip spans on the robot's clock."""
        ...


@runtime_checkable
class Policy(Protocol):
    """Observations to action chunks."""

    robot: Embodiment
    horizon: int

    def act(self, observations: Sequence[Observation], seeds: Sequence[int]) -> np.ndarray:
        """Action chunks (b, horizon, a) float32 in the units of the embodiment; seed i draws the noise of row i."""
        ...


@runtime_checkable
class Continuing(Policy, Protocol):
    """A policy whose chunk can go on from the one that is being executed while it thinks."""

    prefix: int | None  # so many given steps it was trained with; None: it cannot go on after all

    def proceed(
        self,
        observations: Sequence[Observation],
        seeds: Sequence[int],
        rests: Sequence[np.ndarray],
        *,
        delay: int,
        mode: str,
        beta: float,
    ) -> np.ndarray:
        """Chunks (b, horizon, a) as of `act`. rests: of each row, the steps (p, a) in units that the last chunk still
        holds, none or more; the first `delay` are executed before the answer comes. mode, beta: see
        `dreamgen.policies.realtime`."""
        ...


@runtime_checkable
class Filter(Protocol):
    """A curation signal."""

    name: str

    def score(self, clips: Sequence[Clip], labels: Sequence[Labels]) -> np.ndarray:
        """(b,) in [0, 1], higher is better."""
        ...


@runtime_checkable
class Judge(Protocol):
    """Did a video fulfil its instruction? At `threshold` and above its answer counts as yes."""

    threshold: float

    def judge(self, clips: Sequence[Clip]) -> np.ndarray:
        """(b,) probability of success; nan abstains."""
        ...


@runtime_checkable
class Tracker(Protocol):
    """Where is what, in a picture? It measures dreams."""

    names: Sequence[str]

    def track(self, frames: np.ndarray) -> np.ndarray:
        """Canvases (t h w 3) to positions (t n 3), m, of everything in `names`."""
        ...


@runtime_checkable
class Saved(Protocol):
    """A component that is loaded from a directory."""

    @classmethod
    def load(cls, path: Path) -> "Saved": ...
