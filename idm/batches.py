"""Training clips, addressed by step: batch `step` is a pure function of (seed, step), of one robot or several."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from dreamgen.core.clip import Episode
from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment
from dreamgen.core.seeding import rng_for
from dreamgen.data.mixture import shares
from dreamgen.data.motion import motion_of, weights
from dreamgen.data.video_rate import shown_rows

log = logging.getLogger(__name__)
Asked = Callable[[int], np.ndarray]
Degrade = Callable[[Asked, Sequence[str], Sequence[str]], Sequence[np.ndarray]]


@runtime_checkable
class Recorded(Protocol):
    """What is needed of a dataset; `dreamgen.data.lerobot.Dataset` is one."""

    robot: Embodiment

    def __len__(self) -> int: ...

    def length(self, index: int) -> int: ...

    def episode(self, index: int) -> Episode: ...

    def canvas(self, index: int, rows: Sequence[int]) -> np.ndarray: ...


def in_all_phases(clock: Clock, window: int, most: int) -> Clock:
    """`clock` with as many more frames, up to `most`, as it takes until a window of `window` frames has begun in each
    of its phases: where a frame gap is p/q robot steps, q windows in a row differ in where their frames lie."""
    return clock.with_frames(max(clock.frames, min(most, window - 1 + clock.stride.denominator)))


def fresh_starts(shown: np.ndarray, clock: Clock) -> np.ndarray:
    """First rows (n,) of the clips on `clock` each frame of which is of its own row; shown: see `shown_rows`."""
    starts = np.arange(max(0, len(shown) - clock.steps))
    rows = starts[:, None] + clock.rows
    return starts[(shown[rows] == rows).all(1)]


class Batches:
    """Batches of `batch_size` clips of `frames` frames at the rates of `clocks`, from `episodes` of a dataset.

    rest: share of the clips drawn uniformly; the others are drawn by how much moves in them, as robots often wait.
    first: share of the clips that begin where their episode does, as those that will be labelled: no frame shows what
    came before.
    degrade: of clips 0 <= n < count, uint8 (t H W 3), which it asks for by number, of their rates and instructions, the
    same clips as a world model would draw them. It is called once, for at most `degraded_clips` clips of
    `degrade_frames` frames, as many as it can take, whose results are kept: with probability `degraded` a training clip
    is a part of one of them.

    Calling gives a dict: video (b f H W 3) uint8, action (b s a), state (b f d), rows (f,), spacing (): robot steps a
    gap. All clips of one batch share one clock.

    Of labelled video, which repeats a picture until the next one, clips show new pictures alone.

    Episodes that are shorter than the clips of a clock bring none of these. Raises ValueError where all are, for
    episodes that are all shorter than a clip to degrade, and for labelled video of another rate.
    """

    def __init__(self, dataset: Recorded, episodes: Sequence[int], clocks: Sequence[Clock], *, batch_size: int,
                 seed: int, rest: float = 0.4, first: float = 0.2, degrade: Degrade | None = None,
                 degraded: float = 0.5, degraded_clips: int = 64, degrade_frames: int = 17) -> None:  # fmt: skip
        self.dataset, self.clocks, self.seed, self.batch_size = dataset, list(clocks), seed, batch_size
        self.long = {clock: [i for i in episodes if dataset.length(i) > clock.steps] for clock in self.clocks}
        for clock, long in self.long.items():
            if not long:
                raise ValueError(f"none of {len(episodes)} episodes of robot '{dataset.robot.name}' has the "
                                 f"{clock.steps + 1} rows that a training clip at {clock.video_hz} Hz spans; lower the "
                                 f"labeler's `train_frames`, label video of a rate that divides the robot's, or record "
                                 f"longer episodes")  # fmt: skip
            if len(long) < len(episodes):
                log.warning("%d of %d episodes of robot '%s' bring no training clips at %s Hz: they are shorter than "
                            "the %d rows of one", len(episodes) - len(long), len(episodes), dataset.robot.name,
                            clock.video_hz, clock.steps + 1)  # fmt: skip
        self.episodes = max(self.long.values(), key=len)
        self.rows, self.first = {i: dataset.episode(i) for i in self.episodes}, first
        self.shown = {i: shown_rows(episode) for i, episode in self.rows.items()}
        self.starts = {clock: self._starts(clock, rest) for clock in self.clocks}
        self.degraded = degraded if degrade else 0.0
        self.dreamlike = self._degrade(degrade, degraded_clips, degrade_frames) if self.degraded else []

    def __len__(self) -> int:
        """Rows at which a clip on the first of the clocks may begin."""
        return len(self.starts[self.clocks[0]][0])

    def _starts(self, clock: Clock, rest: float) -> tuple[np.ndarray, np.ndarray]:
        """All (episode, first row) of clips on `clock` (n 2), and the sums (n,) of their probabilities up to each."""
        found, means = [], []
        motions = motion_of(self.dataset.robot.action, [e.action for e in self.rows.values()])
        for index, motion in zip(self.rows, motions, strict=True):
            if len(motion) <= clock.steps:
                continue
            new = fresh_starts(self.shown[index], clock)
            found.append(np.column_stack([np.full(len(new), index), new]))
            means.append(sliding_window_view(motion, clock.steps)[:-1].mean(-1)[new])
        if not sum(map(len, means)):
            raise ValueError(f"no clip of {clock.frames} frames at {clock.video_hz} Hz shows new pictures alone: what "
                             f"was labelled repeats them at a rate of its own; train a labeler of that rate, or on "
                             f"recordings")  # fmt: skip
        starts, weight = np.concatenate(found), weights(np.concatenate(means), rest)
        opening = starts[:, 1] == 0
        for chosen, share in ((opening, self.first), (~opening, 1 - self.first)):
            weight[chosen] *= share / max(weight[chosen].sum(), 1e-6)
        upto = (weight / weight.sum()).astype(np.float64).cumsum()
        return starts, upto / upto[-1]

    def _degrade(self, degrade: Degrade, count: int, frames: int) -> list[tuple[int, np.ndarray, np.ndarray, Clock]]:
        """(episode, rows, degraded video, clock) of `count` clips, spread over the episodes."""
        places = []
        fit = {clock: [i for i in self.long[clock] if len(self.rows[i].action) > clock.with_frames(frames).steps]
               for clock in self.clocks}  # fmt: skip
        for n in range(count):
            rng = rng_for(self.seed, "degrade", n)
            clock = self.clocks[n % len(self.clocks)]
            long = clock.with_frames(frames)
            every = fit[clock]
            if not every:
                continue
            index = every[n * len(every) // count if len(every) > count else n % len(every)]
            new, latest = fresh_starts(self.shown[index], long), len(self.rows[index].action) - long.steps
            start = 0 if rng.random() < self.first else rng.integers(latest)
            if len(new):
                places.append((index, long.rows + new[new.searchsorted(start, side="right") - 1], clock))
        if count and not places:
            rows = min(clock.with_frames(frames).steps for clock in self.clocks) + 1
            robot = self.dataset.robot.name
            raise ValueError(f"none of {len(self.episodes)} episodes of robot '{robot}' has the {rows} rows that "
                             f"{frames} frames for the world model span; record longer ones, or set "
                             f"stage.world_model=null")  # fmt: skip
        videos = degrade(
            lambda n: self.dataset.canvas(*places[n][:2]),
            [clock.video_hz for _, _, clock in places],
            [self.rows[index].instruction for index, _, _ in places],
        )
        return [(index, rows, video, clock) for (index, rows, clock), video in zip(places, videos, strict=True)]

    def __call__(self, step: int) -> dict[str, torch.Tensor | np.ndarray]:
        rng = rng_for(self.seed, "labeler batch", step)
        clock = self.clocks[int(rng.integers(len(self.clocks)))]
        starts, upto = self.starts[clock]
        pool = [item for item in self.dreamlike if item[3] == clock]
        video, action, state = [], [], []
        for _ in range(self.batch_size):
            if pool and rng.random() < self.degraded:
                index, rows, pictures, _ = pool[int(rng.integers(len(pool)))]
                # a clip within the degraded one begins where its rows repeat the clock's pattern
                firsts = [k for k in range(len(rows) - clock.frames + 1)
                          if np.array_equal(rows[k : k + clock.frames] - rows[k], clock.rows)]  # fmt: skip
                k = 0 if rows[0] == 0 and rng.random() < self.first else firsts[int(rng.integers(len(firsts)))]
                video.append(pictures[k : k + clock.frames])
                start = int(rows[k])
            else:
                index, start = map(int, starts[upto.searchsorted(rng.random(), side="right")])
                video.append(self.dataset.canvas(index, start + clock.rows))
            action.append(self.rows[index].action[start : start + clock.steps])
            state.append(self.rows[index].state[start + clock.rows])
        return {
            "video": torch.from_numpy(np.stack(video)),
            "action": torch.from_numpy(np.stack(action)).float(),
            "state": torch.from_numpy(np.stack(state)).float(),
            "rows": clock.rows,
            "spacing": torch.tensor(float(clock.stride)),
        }


class Alternating:
    """Batches of several robots by name, each of one of them, which is drawn anew at every step.

    own_share: of the steps that are the first robot's; the others are drawn with weights n^0.43 among each other (n
    places where clips may begin, see `dreamgen.data.mixture`). By default all are drawn so.
    Calling gives the robot's own batch of that step, and its name as `robot`.

    Raises ValueError for a share that leaves a robot out.
    """

    def __init__(self, batches: Mapping[str, Batches], *, own_share: float | None = None, seed: int) -> None:
        if own_share is not None and not 0 < own_share < 1:
            raise ValueError(f"own_share is {own_share}; expected a share between 0 and 1 of the steps that are the "
                             f"robot's own, or null for one that follows from how much there is of each")  # fmt: skip
        self.batches, self.seed = dict(batches), seed
        sizes = [len(one) for one in self.batches.values()]
        self.shares = shares(sizes) if own_share is None else [own_share, *(1 - own_share) * shares(sizes[1:])]

    def name(self, step: int) -> str:
        """Whose batch `step` is."""
        number = rng_for(self.seed, "labeler robot", step).choice(len(self.shares), p=self.shares)
        return list(self.batches)[int(number)]

    def __call__(self, step: int) -> dict[str, torch.Tensor | np.ndarray | str]:
        name = self.name(step)
        return {**self.batches[name](step), "robot": name}
