"""The 14 instructions of the tabletop, how their scenes are laid out, and when they are fulfilled.

A task is fulfilled by its own behaviour only: "put" needs the release, "push" a block that was never lifted, "lift" a
block held high above the place where it stood for several steps, which no other behaviour does on its way.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dreamgen.sims.tabletop import scene
from dreamgen.sims.tabletop.scene import COLOURS

OPEN = 0.65  # gripper opening above which a block is released
CLOSED = 0.4  # and below which it is closed: a hand that wanders with open fingers presses now and then
HIGH = 0.145  # a lifted block is above this height; carried blocks stay below it (m)
HELD = 3  # for so many control steps
ZONE = np.array([[-0.18, 0.0], [0.47, 0.72]])  # where blocks and plate stand: lowest and highest x, y (m)


@dataclass
class Facts:
    """What success depends on, measured after each control step. Lengths in m."""

    blocks: dict[str, np.ndarray]
    start: dict[str, np.ndarray]
    highest: dict[str, float]
    held: dict[str, int]
    plate: np.ndarray
    tray: np.ndarray
    drawer: float
    drawer_at_start: float
    button: float
    opening: float


@dataclass(frozen=True, kw_only=True)
class Task:
    """One instruction. verb and colour choose the expert; drawer is how far it is out at the start (None: either)."""

    text: str
    verb: str
    colour: str | None
    drawer: float | None
    fulfilled: Callable[[Facts], bool]


def _plate(colour: str) -> Callable[[Facts], bool]:
    def fulfilled(f: Facts) -> bool:
        p = f.blocks[colour]
        return bool(np.linalg.norm(p[:2] - f.plate) < 0.05 and p[2] < 0.04 and f.opening > OPEN)

    return fulfilled


def _push(colour: str) -> Callable[[Facts], bool]:
    def fulfilled(f: Facts) -> bool:
        moved = f.blocks[colour] - f.start[colour]
        return bool(moved[1] > 0.08 and abs(moved[0]) < 0.06 and f.highest[colour] < 0.045)

    return fulfilled


def _lift(colour: str) -> Callable[[Facts], bool]:
    return lambda f: f.held[colour] >= HELD


def _stack(f: Facts) -> bool:
    up = f.blocks["red"] - f.blocks["green"]
    return bool(np.linalg.norm(up[:2]) < 0.035 and 0.045 < up[2] < 0.065 and f.opening > OPEN)


def _in_drawer(f: Facts) -> bool:
    p = f.blocks["red"]
    inside = (np.abs(p[:2] - f.tray) < scene.TRAY).all() and p[2] < 0.06
    return bool(inside and f.drawer < -0.08 and f.opening > OPEN)


def _tasks() -> tuple[Task, ...]:
    shut, out = 0.0, -scene.DRAWER_TRAVEL
    rows: list[tuple[str, str, str | None, float | None, Callable[[Facts], bool]]]
    rows = [(f"put the {c} block on the plate", "plate", c, None, _plate(c)) for c in COLOURS]
    rows += [(f"push the {c} block forward", "push", c, None, _push(c)) for c in COLOURS]
    rows += [("stack the red block on the green block", "stack", "red", None, _stack),
             ("open the drawer", "open", None, shut, lambda f: f.drawer < -0.085 < f.drawer_at_start),
             ("close the drawer", "close", None, out, lambda f: f.drawer > -0.015 > f.drawer_at_start),
             ("press the button", "button", None, None, lambda f: f.button < -0.015 and f.opening < CLOSED),
             ("put the red block in the drawer", "drawer", "red", out, _in_drawer)]  # fmt: skip
    rows += [(f"lift the {c} block", "lift", c, None, _lift(c)) for c in COLOURS]
    return tuple(Task(text=t, verb=v, colour=c, drawer=d, fulfilled=f) for t, v, c, d, f in rows)


TASKS = {task.text: task for task in _tasks()}


def named(instruction: str) -> Task:
    """The task of an instruction. Raises ValueError that lists the known ones."""
    if instruction not in TASKS:
        raise ValueError(f"the tabletop does not know the instruction {instruction!r}; it knows: " + "; ".join(TASKS))
    return TASKS[instruction]


def layout(task: Task, rng: np.random.Generator) -> tuple[dict[str, np.ndarray], np.ndarray, float, np.ndarray]:
    """Draw a scene: block positions (x, y), plate (x, y), drawer opening (negative is out), start of the hand (3,).

    Objects stand apart, so that an open gripper fits beside each; a block to be pushed has a free lane.
    """
    drawer = float(rng.choice([0.0, -scene.DRAWER_TRAVEL]))
    drawer = drawer if task.drawer is None else task.drawer
    hand = scene.HAND_START + rng.uniform(-1, 1, 3) * (0.03, 0.03, 0.015)
    while True:
        spots = rng.uniform(ZONE[:, 0], ZONE[:, 1], (4, 2))
        gaps = np.abs(spots[:, None] - spots[None])[np.triu_indices(4, 1)]
        if (np.linalg.norm(gaps, axis=1) < 0.085).any() or ((gaps[:, 0] < 0.055) & (gaps[:, 1] < 0.115)).any():
            continue
        if task.verb == "push":
            k = COLOURS.index(task.colour)
            ahead = np.delete(spots[:3], k, 0) - spots[k]
            if not 0.5 < spots[k, 1] < 0.64 or ((abs(ahead[:, 0]) < 0.08) & (abs(ahead[:, 1] - 0.02) < 0.16)).any():
                continue
        return dict(zip(COLOURS, spots, strict=False)), spots[3], drawer, hand
