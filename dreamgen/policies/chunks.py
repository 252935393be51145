"""Observations with the action chunks that follow them, from the episodes of one dataset.

An observation is a row with a fresh picture: every row of a recording, `meta["frame_rows"]` of a dream, whose video
is slower than the robot. Where a chunk runs past the end of its episode the missing steps are masked: no action is
made up. With `past_end="hold"` the robot is taken to stand still there (deltas rest, other parts as in the last row),
which is right only for recordings that end at rest. Observations whose whole chunk is idle (nothing moves, no binary
part changes) teach little; `keep_idle` bounds how many of them an episode gives. What counts as moving is told in the
data's own measure, so that it does not depend on units. Pictures of small datasets stay in memory as uint8, those of
larger ones than `memory_gb` in a file (`dreamgen.policies.decoded`).
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dreamgen.core import rotations
from dreamgen.core.seeding import rng_for
from dreamgen.data.lerobot import Dataset
from dreamgen.data.states import known_states
from dreamgen.policies.decoded import Decoded

PAST_END = ("mask", "hold")
LABELS = ("own", "shuffled")
STATES = ("recorded", "masked", "zero")
STILL = 0.05  # what moves less than this of its measure stands still
PADDED = {"state": 1, "entries_known": 1, "action": 2, "pictures": 1, "future": 1}  # the axis that bodies differ in
MANY = 0.2  # share of observations left out as idle of which a warning is due
log = logging.getLogger(__name__)


def others(dataset: Dataset) -> np.ndarray:
    """For each episode another one (n,): one cycle through all of them, any as likely as any (Sattolo 1986)."""
    if len(dataset) < 2:
        raise ValueError(f"labels is 'shuffled', and {dataset.root} has one episode: there are no actions of another; "
                         f"give at least two episodes, or take labels=own")  # fmt: skip
    rng, order = rng_for(0, "labels"), np.arange(len(dataset))
    for i in range(len(order) - 1, 0, -1):
        j = rng.integers(i)
        order[[i, j]] = order[[j, i]]
    return order


class Chunks:
    """Addressed by (episode, row), and as windows of a mixture: `len` and `at`.

    body: number of the embodiment in the policy. state: "recorded" (of a dream: its pseudo-state), whose entries are
    known if the column `state_known` says so, and a row if all of them are; "masked" hides it; "zero" puts 0 for every
    entry and calls that known, as published dreams do. relative_to: entries of the state without which a chunk cannot
    be told (see `dreamgen.policies.space`); observations that have actions and lack one are left out. labels:
    "shuffled" gives each episode another's actions: a control. future_steps: how far ahead FLARE looks, None without
    FLARE. spread_scale: a step whose labels spread by s (root mean square over entries, each in units of
    `action_scale`) weighs 1 / (1 + (s / spread_scale)^2); None ignores the spread. short_left_out, unknown_left_out,
    idle_left_out: how many episodes shorter than the horizon, how many observations that lack an entry of `relative_to`
    and how many idle ones beyond `keep_idle` of each episode are not here; many idle ones, and any of the others, are
    warned of. memory_gb, folder, reserve_gb, held_gb, kept_gb: see `dreamgen.policies.decoded`.

    Raises ValueError for a horizon longer than all episodes, for shuffled labels of one episode, where `relative_to` or
    `keep_idle` leaves nothing, and for video without actions in which FLARE finds no future (elsewhere a warning).
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        horizon: int,
        body: int = 0,
        past_end: str = "mask",
        state: str = "recorded",
        relative_to: Sequence[int] = (),
        labels: str = "own",
        future_steps: int | None = None,
        spread_scale: float | None = None,
        action_scale: np.ndarray | None = None,
        keep_idle: int | None = None,
        memory_gb: float = 2.0,
        folder: Path | None = None,
        reserve_gb: float = 0.0,
    ) -> None:
        if past_end not in PAST_END or state not in STATES or labels not in LABELS:
            raise ValueError(f"past_end is '{past_end}', state is '{state}', labels is '{labels}'; expected one of "
                             f"{PAST_END}, {STATES}, {LABELS}")  # fmt: skip
        self.donor = others(dataset) if labels == "shuffled" else range(len(dataset))
        self.dataset, self.horizon, self.body = dataset, horizon, body
        self.past_end, self.state, self.future_steps = past_end, state, future_steps
        self.spread_scale, self.action_scale = spread_scale, action_scale
        self.features: Callable[[int, int], np.ndarray] | None = None  # see `dreamgen.policies.features`
        self.views = [view.name for view in dataset.robot.views]
        self._frames: dict[int, np.ndarray] = {}  # episode -> frame rows, ascending
        for i in range(len(dataset)):
            if (length := dataset.length(i)) >= horizon:
                rows = dataset.episode(i).meta.get("frame_rows")
                rows = np.arange(length) if rows is None else np.asarray(rows, np.int64)
                self._frames[i] = rows[rows < length]
        self.short_left_out = len(dataset) - len(self._frames)
        told = {i: rows[self._tellable(i, rows, relative_to)] for i, rows in self._frames.items()}
        self.unknown_left_out = sum(map(len, self._frames.values())) - sum(map(len, told.values()))
        self._places = self._chosen(told, keep_idle)
        self.idle_left_out = sum(map(len, told.values())) - len(self._places)
        self._tell()
        self._decoded = Decoded(dataset, self._frames, memory_gb=memory_gb, folder=folder, reserve_gb=reserve_gb)
        self.held_gb, self.kept_gb = self._decoded.held_gb, self._decoded.kept_gb

    def __len__(self) -> int:
        return len(self._places)

    def at(self, k: int) -> tuple[int, int]:
        """Episode and row of observation k."""
        return self._places[k]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._places)

    def _tell(self) -> None:
        """Say what is left out; ValueError where nothing is left."""
        root, told = self.dataset.root, len(self) + self.idle_left_out
        if not self._frames:
            longest = max((self.dataset.length(i) for i in range(len(self.dataset))), default=0)
            raise ValueError(f"no episode of {root} is as long as the policy's horizon, {self.horizon} rows; the "
                             f"longest has {longest}: choose a horizon of at most that, or other data")  # fmt: skip
        if self.short_left_out:
            log.warning("%s: %d of %d episodes are shorter than the policy's horizon, %d rows, and left out", root,
                        self.short_left_out, len(self.dataset), self.horizon)  # fmt: skip
        if self.unknown_left_out:
            why = (f"{root}: {self.unknown_left_out} of {told + self.unknown_left_out} observations are left out "
                   f"because the policy tells chunks relative to the state at their start, which is not known there; "
                   f"policy.frame=recorded takes all, as do labels whose states are read from the frames")  # fmt: skip
            if not told:
                raise ValueError(why)
            log.warning(why)
        if not len(self):
            raise ValueError(f"in none of the {told} observations of {root} anything moves, and keep_idle is 0; take "
                             f"some of each episode (keep_idle=2), or all of them (null)")  # fmt: skip
        if self.future_steps is not None and not any(self._later(*place)[1] for place in self):
            longest = max(map(self.dataset.length, self._frames))
            why = (
                f"{root}: FLARE learns nothing of it, for {self.future_steps} rows after an observation no episode "
                f"shows a new picture; the longest has {longest} rows: choose another policy.align_horizon"
            )
            if not self.dataset.has_actions:
                raise ValueError(why)
            log.warning(why)
        if self.idle_left_out > MANY * told:
            log.warning("%s: %d of %d observations are left out because nothing moves in their chunks; keep_idle=null "
                        "takes all", root, self.idle_left_out, told)  # fmt: skip

    def _tellable(self, episode: int, rows: np.ndarray, relative_to: Sequence[int]) -> np.ndarray:
        """Which observation rows have the state that their chunk is told relative to, or no actions to tell."""
        if not relative_to or self.dataset.episode(episode).meta.get("action_known") is False:
            return np.ones(len(rows), bool)
        return np.isfinite(self._state(episode, rows)[:, list(relative_to)]).all(1)

    def _chosen(self, told: dict[int, np.ndarray], keep_idle: int | None) -> list[tuple[int, int]]:
        """All observations `told`, but for the idle ones of an episode after the first `keep_idle`."""
        places = []
        measures = None if keep_idle is None else self._measures()
        for i, rows in told.items():
            idle = np.array([measures is not None and self._idle(i, row, measures) for row in rows.tolist()], bool)
            spare = idle & (np.cumsum(idle) > (keep_idle or 0))
            places += [(i, row) for row in rows[~spare].tolist()]
        return places

    def _measures(self) -> list[float | np.ndarray]:
        """What each action part is measured by: its larger limit where it is a delta that has some (in radians, if it
        is a rotation), half the way between its commands where it is binary, else the standard deviation of each entry,
        of a rotation that of its angle from their mean."""
        known = [e.action for e in map(self.dataset.episode, self._frames) if e.meta.get("action_known") is not False]
        std = np.nanstd(np.concatenate(known), 0, dtype=np.float64) if known else np.ones(self.dataset.robot.action_dim)
        std = np.maximum(std, np.finfo(np.float32).tiny)  # an entry that never changes stands still only at 0
        found: list[float | np.ndarray] = []
        for part in self.dataset.robot.action:
            spread = std[part.slice]
            if part.rotation and known:
                told = np.concatenate(known)[:, part.slice]
                told = told[np.isfinite(told).all(1)]
                off = rotations.vectors(part, told, rotations.mean(rotations.read(part, told)))
                spread = np.sqrt((off**2).sum(1).mean()) + 1e-9
            limited = part.kind == "delta" and part.limits is not None and not (part.rotation and part.width > 3)
            half = (part.limits[1] - part.limits[0]) / 2 if part.kind == "binary" else spread
            found.append(max(map(abs, part.limits)) if limited else half)
        return found

    def _idle(self, episode: int, row: int, measures: Sequence[float | np.ndarray]) -> bool:
        """Whether no delta entry of the chunk passes `STILL` of its measure and no other entry changes by more."""
        action = self.dataset.episode(episode).action[row : row + self.horizon]
        for part, measure in zip(self.dataset.robot.action, measures, strict=True):
            entry = action[:, part.slice]
            if part.rotation:
                first = None if part.kind == "delta" else rotations.read(part, entry[0])
                moving = rotations.vectors(part, entry, first)
            else:
                moving = entry if part.kind == "delta" else entry - entry[:1]
            if not (np.abs(moving / measure) <= STILL).all():
                return False
        return self.dataset.episode(episode).meta.get("action_known") is not False

    def whole(self, most: int = 20000) -> np.ndarray:
        """Evenly spread chunks all of whose steps exist (n H a), for statistics; n may be 0."""
        wanted = np.unique(np.linspace(0, len(self) - 1, min(most, len(self))).astype(int))
        found = [self.actions(*self.at(int(k))) for k in wanted]
        kept = [action for action, valid, _ in found if valid.all()]
        return np.stack(kept) if kept else np.zeros((0, *found[0][0].shape), np.float32)

    def starts(self, most: int = 20000) -> np.ndarray:
        """The states (n d) at which the chunks of `whole` start, NaN where unknown."""
        wanted = np.unique(np.linspace(0, len(self) - 1, min(most, len(self))).astype(int))
        kept = [self.at(int(k)) for k in wanted if self.actions(*self.at(int(k)))[1].all()]
        states = [self._state(i, row) for i, row in kept]
        return np.array(states, np.float32).reshape(len(kept), self.dataset.robot.state_dim)

    def states(self) -> np.ndarray:
        """The states of all episodes (n d), NaN where unknown, for statistics."""
        return np.concatenate([known_states(self.dataset.episode(i)) for i in range(len(self.dataset))])

    def _state(self, episode: int, row: int | np.ndarray) -> np.ndarray:
        """The state of a row (d,), or of several (n d), NaN in entries that may not be used."""
        source = self.dataset.episode(episode)
        if self.state == "recorded":
            return known_states(source, row)
        return np.full_like(source.state[row], 0 if self.state == "zero" else np.nan)

    def futures(self) -> Iterator[tuple[int, int]]:
        """The places that FLARE looks at after the observations."""
        if self.future_steps is not None:
            yield from ((i, self._later(i, row)[0]) for i, row in self)

    def look(self, places: Sequence[tuple[int, int]]) -> np.ndarray:
        """Pictures (n v h w 3) at observation rows, or their features where `features` gives them."""
        if self.features is None:
            return self._decoded.at(places)
        return np.stack([self.features(*place) for place in places])

    def sample(self, most: int) -> np.ndarray:
        """Pictures (n v h w 3) of evenly spread observations, for an encoder that is fitted to some."""
        wanted = np.unique(np.linspace(0, len(self) - 1, min(most, len(self))).astype(int))
        return self._decoded.at([self.at(int(k)) for k in wanted])

    def pictures(self, episode: int, row: int) -> np.ndarray:
        """All views (v h w 3) at an observation row."""
        return self._decoded(episode, row)

    def actions(self, episode: int, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The chunk (H a) from `row` on, which of its steps exist (H,), their weights (H,)."""
        source = self.dataset.episode(int(self.donor[episode]))
        rows = np.arange(row, row + self.horizon)
        inside = rows < len(source.action)
        rows = np.minimum(rows, len(source.action) - 1)
        action = source.action[rows].astype(np.float32)
        weight = np.ones(self.horizon, np.float32)
        if self.spread_scale is not None and "label_spread" in source.extra:
            spread = source.extra["label_spread"][rows] / (1.0 if self.action_scale is None else self.action_scale)
            weight = 1 / (1 + np.square(spread).mean(1) / self.spread_scale**2)
        valid = inside.copy()
        if self.past_end == "hold":
            for part in self.dataset.robot.action:
                if part.kind == "delta":
                    action[~inside, part.slice] = part.rest
            valid[:] = True
        if source.meta.get("action_known") is False:
            valid[:] = False
        valid &= np.isfinite(action).all(1)
        return np.where(valid[:, None], action, 0), valid, weight.astype(np.float32)

    def batch(self, places: Sequence[tuple[int, int]]) -> dict[str, np.ndarray | list[str]]:
        """Rows of a batch: arrays as in `FlowPolicy`, and the instructions."""
        episodes = [self.dataset.episode(i) for i, _ in places]
        chunks = [self.actions(i, row) for i, row in places]
        states = np.stack([self._state(i, row) for i, row in places]).astype(np.float32)
        known = np.isfinite(states)
        batch = {
            "pictures": self.look(places),
            "instruction": [e.instruction for e in episodes],
            "state": np.nan_to_num(states),
            "state_known": known.all(1) & (self.state != "masked"),
            "entries_known": known,
            "body": np.full(len(places), self.body, np.int64),
            "action": np.stack([chunk[0] for chunk in chunks]),
            "valid": np.stack([chunk[1] for chunk in chunks]),
            "weight": np.stack([chunk[2] for chunk in chunks]),
        }
        if self.future_steps is not None:
            later = [self._later(i, row) for i, row in places]
            batch["future"] = self.look([(i, row) for (i, _), (row, _) in zip(places, later, strict=True)])
            batch["future_known"] = np.array([found for _, found in later])
        return batch

    def _later(self, episode: int, row: int) -> tuple[int, bool]:
        """The last row with a picture up to `future_steps` after the observation at `row`; False if the episode ends
        before, or shows nothing new by then."""
        frames, later = self._frames[episode], row + (self.future_steps or 0)
        shown = int(frames[np.searchsorted(frames, later, side="right") - 1])
        return shown, row < shown and later < self.dataset.length(episode)


def collate(parts: Sequence[dict], words: Callable[[Sequence[str]], Tensor]) -> dict[str, Tensor]:
    """One batch of tensors from the parts of several datasets, narrower states and actions, and fewer views, padded
    with 0; `words` is the encoder's."""
    if len({part["pictures"].shape[1] for part in parts}) > 1:
        for part in parts:
            part["seen"] = np.full(len(part["body"]), part["pictures"].shape[1], np.int64)
    for key, axis in PADDED.items():
        widest = max(part[key].shape[axis] for part in parts) if key in parts[0] else 0
        for part in parts if widest else ():
            lacking = [(0, widest - size if k == axis else 0) for k, size in enumerate(part[key].shape)]
            part[key] = np.pad(part[key], lacking) if part[key].shape[axis] < widest else part[key]
    batch = {key: torch.from_numpy(np.concatenate([part[key] for part in parts]))
             for key in parts[0] if key != "instruction"}  # fmt: skip
    told = [text for part in parts for text in part["instruction"]]
    number = {text: k for k, text in enumerate(dict.fromkeys(told))}
    batch["words"] = words(list(number))[[number[text] for text in told]]
    return batch
