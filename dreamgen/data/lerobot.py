"""A LeRobot dataset (v2.0, v2.1, v3.0) seen through one robot: what is harmless is mended and said, the rest raises.

State, action and our own columns of all episodes are held in memory, other columns are left on disk; pictures are
decoded when asked for, at the embodiment's size.
"""

from collections.abc import Callable, Container, Sequence
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8

from dreamgen.core.clip import Episode
from dreamgen.core.embodiment import Embodiment, Part
from dreamgen.data.columns import BOOKKEEPING, OWN, REMEDY, TRUTH, check_numbers, is_even, read_column, stored_column
from dreamgen.data.decoders import Decoders
from dreamgen.data.fit import absent_cameras, misfits
from dreamgen.data.instructions import find_instruction
from dreamgen.data.layout import CONTRACT, PROVENANCE, Entry, check_owner, locate, pictures, read_jsonl, read_layout
from dreamgen.data.rows import Rows, read_pictures
from dreamgen.data.states import known_states
from dreamgen.video.mp4 import count_frames
from dreamgen.video.tiling import fit, tile


class Dataset:
    """Episodes of `robot` at `root`, a folder or a hub id ("org/name"). Index i counts the episodes that are kept.

    episodes: only these, by the dataset's own numbers; leave_out: not these, such as those that are held out.
    mended: what was dirty and how it was taken; skipped: episode index to reason, with `skip_bad`.
    actions: False opens it as video alone: no action column is needed nor looked at, and states may be absent too.
    Actions, and states that it does not list, are then NaN, and `meta` says `action_known: False`. So is it always for
    an embodiment without action parts.
    cache_mb: if all pictures of the dataset fit into this at the size of the views, an episode is decoded once.

    Raises ValueError: no finished dataset; made for another robot; rate, widths or cameras that do not match the
    embodiment; and, without `skip_bad`, the first bad episode: rows and frames that disagree, NaN, wrong widths, a
    missing or truncated video, an empty instruction, no rows.
    """

    def __init__(
        self,
        root: str | Path,
        robot: Embodiment,
        *,
        skip_bad: bool = False,
        actions: bool = True,
        episodes: Sequence[int] | None = None,
        leave_out: Sequence[int] | None = None,
        cache_mb: int = 512,
        revision: str | None = None,
    ) -> None:
        self.root, self.robot = locate(root, revision), robot
        layout = read_layout(self.root)
        self.info, self.version, self.mended = layout.info, layout.version, list(layout.mended)
        self.tasks = layout.tasks
        self.skipped: dict[int, str] = {}
        self.has_actions = actions and bool(robot.action)
        for misfit in misfits(self.root, self.info, robot, actions=self.has_actions):
            raise ValueError(misfit)
        absent = absent_cameras(self.root, self.info, robot, layout.entries)
        self.mended += [f"camera '{key}' is listed and not on disk; left out" for key in absent]
        self._numeric = [
            key
            for key, feature in self.info["features"].items()
            if key not in (*BOOKKEEPING, robot.state_key, robot.action_key)
            and not key.startswith(("annotation.", "next."))
            and feature.get("dtype") not in ("video", "image", "string", "language")
        ]
        ours = (self.root / CONTRACT).is_file()
        self._extra = [key for key in self._numeric if ours or key in OWN or key.startswith(TRUTH)]
        metas = {}
        if (self.root / PROVENANCE).is_file():
            metas = {row.pop("episode_index"): row for row in read_jsonl(self.root / PROVENANCE, "episode_index")}
        self._counts: dict[Path, int] = {}
        self._rows = Rows()
        self._take(layout.entries, lambda e: self._load(e, metas.get(e.index, e.meta)),
                   skip_bad=skip_bad, episodes=episodes, leave_out=leave_out, cache_mb=cache_mb)  # fmt: skip
        self._rows.forget()

    def _take(self, entries: Sequence[Entry], load: Callable[[Entry], Episode], *, skip_bad: bool, cache_mb: int,
              episodes: Sequence[int] | None, leave_out: Sequence[int] | None = None) -> None:  # fmt: skip
        """Keep what `load` makes of the `entries` that are asked for; a bad one is left out, or raises."""
        self._entries: list[Entry] = []
        self._episodes: list[Episode] = []
        self._notes: dict[str, int] = {}
        listed = {entry.index for entry in entries}
        wanted, away = listed if episodes is None else set(episodes), set(leave_out or ())
        kept = wanted - away
        chosen = [entry for entry in entries if entry.index in kept]
        if absent := sorted((wanted | away) - listed):
            raise ValueError(f"{self.root} has no episode {', '.join(map(str, absent))}; it lists {len(entries)} "
                             f"episodes")  # fmt: skip
        for entry in chosen:
            try:
                episode = load(entry)
            except ValueError as error:
                if not skip_bad:
                    raise ValueError(f"episode {entry.index} of {self.root}: {error}; {REMEDY}") from error
                self.skipped[entry.index] = str(error)
                continue
            self._entries.append(entry)
            self._episodes.append(episode)
        self.mended += [note if n == len(chosen) else f"{note} ({n} episodes)" for note, n in self._notes.items()]
        if not self._episodes:
            reasons = "; ".join(f"episode {i}: {why}" for i, why in list(self.skipped.items())[:3])
            none = "all are left out" if entries else "it lists none"
            raise ValueError(f"{self.root} holds no usable episode ({reasons or none})")
        size = sum(self.length(i) for i in range(len(self))) * len(self.robot.views) * 3
        size *= self.robot.views[0].height * self.robot.views[0].width
        self._cached: dict[int, dict[str, np.ndarray]] | None = {} if size <= cache_mb * 2**20 else None
        self._videos = Decoders()

    def __len__(self) -> int:
        return len(self._episodes)

    @property
    def rate(self) -> Fraction:
        """Rows a second."""
        return self.robot.rate

    def index(self, i: int) -> int:
        """The dataset's own number of episode i (they differ after skipped episodes)."""
        return self._entries[i].index

    def length(self, i: int) -> int:
        """Rows of episode i."""
        return len(self._episodes[i].action)

    def instruction(self, i: int) -> str:
        return self._episodes[i].instruction

    def episode(self, i: int) -> Episode:
        """State, action, extra columns and meta of episode i; its video is empty, see `views`. Of a dataset that others
        made, extra are the columns that dreamgen knows by name."""
        return self._episodes[i]

    @cached_property
    def others(self) -> list[str]:
        """Columns of numbers that `episode` leaves on disk, as wide in all rows as their features say; reads them."""
        columns = {key: stored_column(self.info["features"][key]) for key in self._numeric if key not in self._extra}
        even = {key: column.width for key, column in columns.items() if column is not None}
        for i in range(len(self) if even else 0):
            table = self.table(i, even)
            even = {key: width for key, width in even.items()
                    if key in table.column_names and is_even(table, key, width)}  # fmt: skip
        return list(even)

    def extra(self, i: int) -> dict[str, np.ndarray]:
        """All columns of numbers of episode i (s k) beside state and action: those that are held, and `others`."""
        table = self.table(i, self.others) if self.others else None
        told = self.info["features"]
        found = self._episodes[i].extra | {key: read_column(table, key, told[key]) for key in self.others}
        return {key: found[key] for key in self._numeric if key in found}

    def entry(self, i: int) -> Entry:
        """Where the parts of episode i lie on disk."""
        return self._entries[i]

    def video(self, i: int) -> tuple[Path, np.ndarray] | None:
        """The file that shows the first view of episode i, and the number there of each row's frame; None where its
        pictures are in a table."""
        found = self._entries[i].videos.get(self.robot.views[0].key)
        return None if found is None else (found[0], found[1] + np.arange(self.length(i)))

    def columns(self, i: int) -> list[str]:
        """Names of the columns of episode i as they are stored."""
        return self._rows.columns(self._entries[i].data)

    def table(self, i: int, columns: Container[str] | None = None) -> pa.Table:
        """The rows of episode i as they are stored; of `columns` those that there are, default all."""
        return self._rows.read(self._entries[i], lambda name: columns is None or name in columns)

    def views(self, i: int, rows: Sequence[int] | np.ndarray | None = None) -> dict[str, UInt8[np.ndarray, "t h w 3"]]:
        """Pictures of episode i at `rows` (default all), {view: (t h w 3)}, at the size of the embodiment's views.

        Raises ValueError for a row out of range and for a video that cannot be decoded.
        """
        rows = np.arange(self.length(i)) if rows is None else np.asarray(rows, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self.length(i)):
            raise ValueError(f"episode {self.index(i)} of {self.root} has {self.length(i)} rows; rows "
                             f"{rows.min()} to {rows.max()} were asked for")  # fmt: skip
        if self._cached is None:
            return self._decode(i, rows)
        if i not in self._cached:
            self._cached[i] = self._decode(i, np.arange(self.length(i)))
        return {name: frames[rows] for name, frames in self._cached[i].items()}

    def frames(self, i: int, key: str, rows: np.ndarray) -> UInt8[np.ndarray, "t h w 3"]:
        """Pictures of the camera `key` at `rows` of episode i, in the size in which they are stored."""
        if key in pictures(self.info):
            return read_pictures(self.root, self._entries[i], key, rows)
        path, first, _ = self._entries[i].videos[key]
        return self._videos.read(path, rows + first)

    def canvas(self, i: int, rows: Sequence[int] | np.ndarray | None = None) -> UInt8[np.ndarray, "t h w 3"]:
        """Pictures of episode i at `rows` (default all), tiled on the embodiment's canvas."""
        return tile(self.robot, self.views(i, rows))

    def state(self, i: int, row: int) -> np.ndarray:
        """State at a row of episode i, empty unless all of it is known: finite, and by the column `state_known`."""
        state = known_states(self._episodes[i], row)
        return state if np.isfinite(state).all() else state[:0]

    def first_state(self, i: int) -> np.ndarray:
        """State at the first row of episode i, empty where it is unknown."""
        return self.state(i, 0)

    def require_actions(self, reader: str) -> None:
        """Raise ValueError if the dataset was opened as video alone; `reader` names the option that it was given as."""
        if not self.has_actions:
            raise ValueError(f"{reader} reads actions, and {self.root} was opened as video without them (actions=false,"
                             f" or an embodiment without action parts); give it recordings with their actions, such as "
                             f"data=folder")  # fmt: skip

    def actions(self) -> np.ndarray:
        """Actions of all episodes (n a), for statistics. ValueError for video without them."""
        self.require_actions("a statistic of actions")
        return np.concatenate([episode.action for episode in self._episodes])

    def states(self) -> np.ndarray:
        """States of all episodes (n d), for statistics."""
        return np.concatenate([episode.state for episode in self._episodes])

    def _is_read(self, name: str) -> bool:
        """Whether opening reads a column."""
        own = (*BOOKKEEPING, *self._extra, self.robot.state_key, self.robot.action_key)
        return name in own or name.startswith("annotation.")

    def _load(self, entry: Entry, meta: dict) -> Episode:
        """Check one episode and take its columns."""
        table, present = self._rows.read(entry, self._is_read), self._rows.columns(entry.data)
        robot, rows = self.robot, table.num_rows
        if rows == 0:
            raise ValueError("it has zero length")
        check_owner(entry, table)
        self._check_videos(entry, rows)
        if rows != entry.length:
            self._note("the length in the episode list disagrees with rows and frames; used the rows")
        stated = robot.state_key in self.info["features"]
        state = self._numbers(table, robot.state_key, robot.state, stated)
        action = self._numbers(table, robot.action_key, robot.action, self.has_actions)
        if not self.has_actions:
            meta = {**meta, "action_known": False}
        self._check_time(table)
        for key in self._numeric:
            if key not in present:
                self._note(f"feature '{key}' is listed and has no column; left out")
        extra = {key: self._held(table, key) for key in self._extra if key in present}
        told = find_instruction(entry, table, self.tasks, self._note)
        return Episode(instruction=told, state=state, action=action, extra=extra, meta=meta)

    def _held(self, table: pa.Table, key: str) -> np.ndarray:
        """A column of `Episode.extra` (s k); float64 as float32 where stages compute with it."""
        values, ours = read_column(table, key), key in OWN or key.startswith(TRUTH)
        return values.astype(np.float32) if ours and values.dtype == np.float64 else values

    def _numbers(self, table: pa.Table, key: str, parts: Sequence[Part], known: bool) -> np.ndarray:
        """A column (s k), NaN where it is not known."""
        if not (parts and known):
            return np.full((table.num_rows, parts[-1].stop if parts else 0), np.nan, np.float32)
        values = read_column(table, key).astype(np.float32)
        check_numbers(key, values, parts, table.num_rows)
        return values

    def _check_videos(self, entry: Entry, rows: int) -> None:
        for view in self.robot.views:
            if view.key in pictures(self.info):
                if view.key not in self._rows.columns(entry.data):
                    raise ValueError(f"it has no column '{view.key}', whose pictures view '{view.name}' shows")
                continue
            if view.key not in entry.videos:
                raise ValueError(f"it lists no video '{view.key}'")
            path, first, frames = entry.videos[view.key]
            if path not in self._counts:
                self._counts[path] = count_frames(path)
            if frames is None:
                frames = self._counts[path]
            if first + frames > self._counts[path]:
                raise ValueError(f"video {path} has {self._counts[path]} frames, the episode ends at {first + frames}")
            if frames != rows:
                raise ValueError(f"it has {rows} rows and {frames} frames in {path}; they must agree")

    def _check_time(self, table: pa.Table) -> None:
        """Row k is at k / rate whatever the columns say; say so where they say something else."""
        rows = np.arange(table.num_rows)
        if "frame_index" not in table.column_names:
            self._note("there is no frame_index; counted the rows")
        elif not np.array_equal(table["frame_index"].to_numpy(), rows):
            self._note("frame_index does not count from 0; counted the rows")
        if "timestamp" not in table.column_names:
            self._note("there is no timestamp; used row / rate")
            return
        late = table["timestamp"].to_numpy().astype(np.float64) * float(self.rate) - rows
        if np.abs(late).max() <= 0.01:
            return
        if np.abs(late - 1).max() <= 0.01:
            self._note("timestamps start one period late; used row / rate")
        else:
            self._note("timestamps are not row / rate; used row / rate")

    def _note(self, text: str) -> None:
        self._notes[text] = self._notes.get(text, 0) + 1

    def _decode(self, i: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        out = {}
        for view in self.robot.views:
            try:
                frames = self.frames(i, view.key, rows)
            except ValueError as error:
                raise ValueError(f"episode {self.index(i)} of {self.root}: {error}; copy the video again, or leave "
                                 f"the episode out: `episodes` of the dataset lists those to take (skip_bad=true "
                                 f"does not decode, so it cannot know)") from error  # fmt: skip
            out[view.name] = fit(frames, view.height, view.width, view.fit)
        return out
