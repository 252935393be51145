"""LeRobot v3.0 in bulk: each episode is encoded once, in parallel; files are joined by stream copy.

`meta/info.json` is written last: a folder without it is unfinished. What is being written is marked, and only what is
marked is ever cleared and written anew. The bytes do not depend on the number of workers.
"""

import contextlib
import errno
import itertools
import logging
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dreamgen.core.clip import Episode
from dreamgen.core.embodiment import Embodiment
from dreamgen.core.manifest import RUN, WRITING, is_complete
from dreamgen.data import statistics
from dreamgen.data.columns import REMEDY, Column, check_episode, extra_columns, robot_columns
from dreamgen.data.files_v3 import Files
from dreamgen.data.layout import INFO
from dreamgen.data.ledger import Item, Ledger
from dreamgen.video.mp4 import encode

ROOMS = ("meta", "data", "videos")
log = logging.getLogger(__name__)


def write_dataset(
    out: Path,
    episodes: Iterable[Episode],
    robot: Embodiment,
    *,
    workers: int = 1,
    codec: str = "h264",
    crf: int | None = None,
    gop: int = 10,
    pix_fmt: str | None = None,
    skip_bad: bool = False,
    data_mb: float = 100,
    video_mb: float = 200,
    chunks_size: int = 1000,
) -> dict:
    """Write `episodes`, each with all views of the robot, to a new dataset at `out`; they are taken one by one.

    Returns {"episodes": n, "frames": rows, "skipped": {position among the given: reason}}.

    Raises ValueError if `out` holds anything of a dataset that no unfinished call wrote, if there is no good episode,
    and, without `skip_bad`, for the first bad one: frames and rows that disagree, no rows, wrong widths or sizes, NaN,
    an empty instruction.
    Raises OSError if the disk is full. After any error the dataset is unfinished, and is written anew by the next call.
    """
    start(out, workers)
    ledger, settled = Ledger(rate=robot.rate), []
    files = Files(out, ledger, robot_type=robot.name, contract=robot.contract(), limits=(data_mb, video_mb),
                  chunks_size=chunks_size)  # fmt: skip
    skipped: dict[int, str] = {}

    def good() -> Iterator[Episode]:
        for position, episode in enumerate(episodes):
            try:
                check_episode(episode, robot)
                extra = extra_columns(episode, robot)
                if settled and extra != settled[0]:
                    raise ValueError(f"its extra columns are {_words(extra)}; the first episode has "
                                     f"{_words(settled[0])}")  # fmt: skip
            except ValueError as error:
                if not skip_bad:
                    raise ValueError(f"episode {position} for {out}: {error}; {REMEDY}") from error
                log.warning("episode %d for %s is left out: %s", position, out, error)
                skipped[position] = str(error)
                continue
            if not settled:
                settled.append(extra)
                ledger.columns = robot_columns(robot) | extra
            yield episode

    def encoded(episode: Episode) -> Item:
        views, rows = {view.key: episode.video[view.name] for view in robot.views}, len(episode.action)
        videos = {
            key: encode(frames, robot.rate, codec=codec, crf=crf, gop=gop, pix_fmt=pix_fmt)
            for key, frames in views.items()
        }
        return Item(
            rows=rows,
            columns={robot.state_key: episode.state, robot.action_key: episode.action, **episode.extra},
            texts={"task_index": [episode.instruction.strip()] * rows},
            videos=videos,
            histograms={key: statistics.histogram(frames) for key, frames in views.items()},
            meta=episode.meta,
        )

    store(out, files, in_order(encoded, good(), workers), skipped)
    return {"episodes": ledger.episodes, "frames": ledger.rows, "skipped": skipped}


def require_free(out: Path) -> None:
    """ValueError if `out` holds anything of a dataset that neither a finished nor an unfinished run wrote.

    Stages that write a dataset ask before they begin: nothing of others is touched, and no work is done in vain.
    """
    out = Path(out)
    found = [room for room in ROOMS if (out / room).exists()]  # first: another shard may be ending just now
    if not found or (out / WRITING).is_file() or is_complete(out):
        return
    if (out / INFO).exists():
        raise ValueError(f"{out} already holds a dataset; choose another `out`, or delete it")
    raise ValueError(f"{out} holds {', '.join(found)}, which no unfinished run wrote; choose another `out`, or move "
                     "them away")  # fmt: skip


def start(out: Path, workers: int) -> None:
    """Mark `out` as being written, and clear what a call that was interrupted left there, a whole dataset too where it
    came no further than to the stage's manifest. ValueError if it holds anything else of a dataset."""
    out = Path(out)
    if is_complete(out):
        raise ValueError(f"{out} already holds what a stage finished; choose another `out`, or delete it")
    require_free(out)
    if workers < 1:
        raise ValueError(f"workers is {workers}; expected 1 or more")
    out.mkdir(parents=True, exist_ok=True)
    (out / WRITING).touch()
    for room in ROOMS:
        shutil.rmtree(out / room, ignore_errors=True)


def store(out: Path, files: Any, items: Iterable[Item], skipped: dict[int, str],
          last: Callable[[], None] = lambda: None) -> None:  # fmt: skip
    """Add all items to `files`, then `last`, then finish them. OSError if the disk is full; ValueError for no item."""
    try:
        with contextlib.closing(files):
            for item in items:
                files.add(item)
        if not files.ledger.episodes:
            reasons = "; ".join(f"episode {i}: {why}" for i, why in list(skipped.items())[:3])
            raise ValueError(f"no episode to write to {out} ({reasons or 'none was given'})")
        last()
        files.finish()
        if not (Path(out) / RUN).is_file():  # within a stage the mark stays until its manifest is there
            (Path(out) / WRITING).unlink()
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        words = "the disk is full and the dataset unfinished; make room and run it again"
        raise OSError(errno.ENOSPC, words, str(out)) from error


def in_order(work: Callable[[Any], Any], items: Iterator, workers: int) -> Iterator:
    """`map` over threads (encoders leave the interpreter's lock), with a bounded number of items under way."""
    if workers == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque(pool.submit(work, item) for item in itertools.islice(items, 2 * workers))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(work, item) for item in itertools.islice(items, 1))


def _words(columns: dict[str, Column]) -> str:
    return ", ".join(f"{name} {column.dtype} ({column.width},)" for name, column in sorted(columns.items())) or "none"
