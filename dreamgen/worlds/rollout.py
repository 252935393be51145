"""Autoregressive rollout: an episode goes on chunk by chunk, each from the frames that were dreamt before.

All times are those of one clock that starts with the episode: frame K shows robot step floor(K * robot_hz / video_hz),
so chunks join without a lost or doubled step also where the rates do not divide.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int64

from dreamgen.core.clip import Past, Prompt
from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment
from dreamgen.core.kinematics import follow
from dreamgen.core.protocols import ActionWorldModel

Chunk = Callable[[Sequence[Past], Sequence[np.ndarray]], list[np.ndarray]]


def frame_rows(clock: Clock, now: int, steps: int, multiple: int = 1) -> Int64[np.ndarray, " t"]:
    """Robot steps, counted from frame `now`, of that frame and of all that follow within `steps`.

    Raises ValueError unless the last step ends on a frame and the new frames are a multiple of `multiple`.
    """
    most = int(steps / clock.stride) + 2
    rows = clock.with_frames(max(2, now + most + 1)).rows[now:]
    rows = rows - rows[0]
    rows = rows[rows <= steps]
    count = len(rows) - 1
    if rows[-1] != steps or count < 1 or count % multiple:
        ends = clock.with_frames(now + 4 * multiple + 1).rows[now + multiple :: multiple] - int(now * clock.stride)
        raise ValueError(f"{steps} robot steps do not end on a frame that the world model can end on "
                         f"({clock.video_hz} Hz video, {clock.robot_hz} Hz robot, frames in steps of {multiple}); it "
                         f"takes {', '.join(map(str, ends.tolist()))}, ... steps. Execute that many of the policy's "
                         "chunk, or choose a policy of another horizon.")  # fmt: skip
    return rows


def rollout(chunk: Chunk, robot: Embodiment, clock: Clock, pasts: Sequence[Past], actions: Sequence[np.ndarray], *,
            multiple: int = 1) -> list[np.ndarray]:  # fmt: skip
    """New frames (n h w 3) of each past under its actions, by calls of `chunk` for at most clock.frames - 1 frames.

    Raises ValueError for pasts or actions of several lengths, and as `frame_rows` does.
    """
    lengths = {(len(past.video), len(action)) for past, action in zip(pasts, actions, strict=True)}
    if len(lengths) != 1:
        raise ValueError(f"episodes of one batch must be equally long; got (frames, steps) {sorted(lengths)}")
    ((seen, steps),) = lengths
    rows = frame_rows(clock, seen - 1, steps, multiple)
    first, state = list(pasts), list(pasts)
    most = clock.frames - 1
    for start in range(0, len(rows) - 1, most):
        stop = min(start + most, len(rows) - 1)
        taken = [action[rows[start] : rows[stop]] for action in actions]
        made = chunk(state, taken)
        assert all(len(frames) == stop - start for frames in made), "one frame for each that the clock shows"
        state = [joined(robot, past, frames, action)
                 for past, frames, action in zip(state, made, taken, strict=True)]  # fmt: skip
    return [past.video[len(before.video) :] for past, before in zip(state, first, strict=True)]


def joined(robot: Embodiment, past: Past, frames: np.ndarray, action: np.ndarray) -> Past:
    """The past after these frames and actions, its state by the embodiment's rule (unknown stays unknown)."""
    known = robot.state_dim and len(past.state) == robot.state_dim
    state = follow(robot, past.state, action)[0][-1] if known else past.state
    return Past(prompt=past.prompt, video=np.concatenate([past.video, frames]),
                action=np.concatenate([past.action, np.asarray(action, np.float32)]), state=state)  # fmt: skip


def extend(world: ActionWorldModel, pasts: Sequence[Past], actions: Sequence[np.ndarray]) -> list[Past]:
    """The pasts after what `world` imagines of these actions, with the state by the embodiment's rule."""
    frames = world.imagine(pasts, actions)
    return [joined(world.robot, past, new, action) for past, new, action in zip(pasts, frames, actions, strict=True)]


def alike(prompts: Sequence[Prompt], batch_size: int | None) -> list[list[int]]:
    """Numbers of prompts with equally many actions, at most `batch_size` a batch; short ones first."""
    lengths = [len(prompt.action) for prompt in prompts]
    parts: list[list[int]] = []
    for i in sorted(range(len(prompts)), key=lambda i: lengths[i]):
        if not parts or lengths[parts[-1][0]] != lengths[i] or len(parts[-1]) == batch_size:
            parts.append([])
        parts[-1].append(i)
    return parts


def follow_prompts(world: ActionWorldModel, prompts: Sequence[Prompt], *,
                   batch_size: int | None = None) -> list[Past]:  # fmt: skip
    """What `world` imagines of each prompt under its own actions, in order, by batches of `alike`."""
    found: dict[int, Past] = {}
    for part in alike(prompts, batch_size):
        mine = [prompts[i] for i in part]
        pasts = [Past.begin(prompt, world.robot.action_dim) for prompt in mine]
        found |= dict(zip(part, extend(world, pasts, [prompt.action for prompt in mine]), strict=True))
    return [found[i] for i in range(len(prompts))]
