"""What a page shows of a run's data: clips beside the recordings they belong to, one frame under many instructions."""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from dreamgen.core.clip import Episode
from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment
from dreamgen.core.manifest import fingerprint, is_complete
from dreamgen.data.clips import ClipFolder
from dreamgen.data.layout import INFO, locate
from dreamgen.data.lerobot import Dataset
from dreamgen.report.pictures import beside, clip_uri, frame_uri
from dreamgen.report.plots import Line, lines

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One embedded picture or clip and what stands below it."""

    uri: str
    title: str
    note: str = ""
    plots: Sequence[str] = ()


def spread_out(items: Sequence, count: int) -> list:
    """At most `count` items, evenly from first to last."""
    if len(items) <= count:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]


def open_dataset(path: Path | None, robot: Embodiment, revision: str | None = None) -> Dataset | None:
    """The dataset at `path` (a folder, or a hub id at `revision`), without its bad episodes; None if there is none,
    which is said."""
    if path is None:
        return None
    try:
        root = locate(path, revision)
    except ValueError as error:
        log.info("not on the page: %s", error)
        return None
    return Dataset(root, robot, skip_bad=True) if (root / INFO).is_file() else None


class Recordings:
    """Where a dream's first frame came from, found by what its prompt says of its origin."""

    def __init__(self, datasets: Sequence[Dataset | None]) -> None:
        self.datasets = [dataset for dataset in datasets if dataset is not None]
        self.by_seed, self.by_number, self.by_instruction = {}, {}, defaultdict(list)
        for dataset in self.datasets:
            name = fingerprint(dataset.root)
            for i in range(len(dataset)):
                meta, instruction = dataset.episode(i).meta, dataset.instruction(i)
                self.by_seed.setdefault((instruction, str(meta.get("seed"))), (dataset, i))
                self.by_number.setdefault((name, dataset.index(i), instruction), (dataset, i))
                self.by_instruction[instruction].append((dataset, i))

    def find(self, instruction: str, origin: Mapping) -> tuple[Dataset, int, int, bool] | None:
        """(dataset, episode, first row, whether it is the same scene); one of the same instruction if not."""
        if found := self.by_number.get((origin.get("dataset"), origin.get("episode"), instruction)):
            return *found, int(origin.get("row", 0)), True
        if "seed" in origin and (instruction, str(origin["seed"])) in self.by_seed:  # siblings share it
            return *self.by_seed[instruction, str(origin["seed"])], 0, True
        if self.by_instruction[instruction]:
            return *self.by_instruction[instruction][0], 0, False
        return None

    def clip(self, found: tuple[Dataset, int, int, bool], frames: int, video_hz: str) -> np.ndarray:
        """The recording at the rate of the dream, (t h w 3), as long as it lasts."""
        dataset, i, row, _ = found
        rows = row + Clock(robot_hz=dataset.robot.robot_hz, video_hz=video_hz, frames=frames).rows
        return dataset.canvas(i, rows[rows < dataset.length(i)])


def pairs(folder: ClipFolder, recordings: Recordings, count: int) -> list[Shown]:
    """Recordings (left) and dreams (right), one instruction after another."""
    by_instruction = defaultdict(list)
    for id in folder.ids():
        info = folder.info(id)
        found = recordings.find(info["instruction"], info["origin"])
        if found is not None:
            by_instruction[info["instruction"]].append((not found[3], id, found))
    shown = []
    for instruction in spread_out(sorted(by_instruction), count):
        _, id, found = min(by_instruction[instruction], key=lambda row: row[:2])
        dream = folder.read(id)
        real = recordings.clip(found, len(dream.video), dream.video_hz)
        gap = np.full((1, dream.video.shape[1], 2, 3), 128, np.uint8)
        note = "same first frame" if found[3] else "another scene of the same instruction"
        if real.shape[1:] == dream.video.shape[1:]:
            shown.append(
                Shown(uri=clip_uri(beside(real, gap, dream.video), dream.video_hz), title=instruction, note=note)
            )
    return shown


def counterfactuals(folder: ClipFolder, groups: int, most: int = 24) -> list[tuple[Shown, list[Shown]]]:
    """First frames and what was dreamed from each under its instructions, at most `most` of them, which is said."""
    by_pair = defaultdict(list)
    for id in folder.ids():
        info = folder.info(id)
        if info["pair"]:
            by_pair[info["pair"]].append((info["instruction"], id))
    many = sorted((pair for pair, rows in by_pair.items() if len({text for text, _ in rows}) > 1),
                  key=lambda pair: (-len({text for text, _ in by_pair[pair]}), pair))  # fmt: skip
    out = []
    for pair in many[:groups]:
        first = {text: id for text, id in sorted(by_pair[pair], reverse=True)}
        clips = [folder.read(first[text]) for text in spread_out(sorted(first), most)]
        shown = [Shown(uri=clip_uri(clip.video, clip.video_hz), title=clip.instruction) for clip in clips]
        cut = f", {len(clips)} of its {len(first)} instructions" if len(clips) < len(first) else ""
        out.append((Shown(uri=frame_uri(clips[0].video[0]), title=f"first frame{cut}"), shown))
    return out


def action_plots(robot: Embodiment, recorded: np.ndarray, recovered: np.ndarray, width: int = 8) -> list[str]:
    """One plot for each of the first `width` action entries, seconds across; recorded is a, recovered is b."""
    plots = []
    seconds = np.arange(max(len(recorded), len(recovered))) / float(robot.rate)
    entries = [(part, k) for part in robot.action for k in range(part.start, part.stop)]
    moving = [(p, k) for p, k in entries if np.ptp(recorded[:, k]) > 1e-6] or entries
    for part, k in spread_out(moving, width):
        name = part.name if part.width == 1 else f"{part.name} {k - part.start}"
        curves = [Line("recorded", seconds[: len(recorded)], recorded[:, k], "a"),
                  Line("recovered", seconds[: len(recovered)], recovered[:, k], "b")]  # fmt: skip
        plots.append(f"<figure>{lines(curves, title=name, x_name='s')}<figcaption>{escape(name)}</figcaption></figure>")
    return plots


def recovered(labels: Dataset, recordings: Recordings, count: int) -> list[Shown]:
    """Labels of dreams over the actions recorded from the same first frame under the same instruction."""
    rows = []
    for i in range(len(labels)):
        episode: Episode = labels.episode(i)
        found = recordings.find(episode.instruction, episode.meta.get("origin", {}))
        if found is not None and found[3]:
            rows.append((i, episode, found))
    shown = []
    for _, episode, (dataset, j, row, _) in spread_out(rows, count):
        action = dataset.episode(j).action[row : row + len(episode.action)]
        plots = action_plots(labels.robot, action, episode.action)
        shown.append(Shown(uri="", title=episode.instruction, note="label of a dream", plots=plots))
    return shown


def clips_of(path: Path | None) -> ClipFolder | None:
    """The clips of a finished dream step."""
    return ClipFolder(Path(path) / "clips") if path is not None and is_complete(Path(path)) else None
