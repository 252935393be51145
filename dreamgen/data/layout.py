"""Where the parts of each episode lie on disk, for LeRobot v2.0, v2.1 and v3.0.

Nothing is judged here but the dataset's own index; what is dirty but harmless is noted in `mended`.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dreamgen.core.manifest import read_json

INFO = "meta/info.json"
CONTRACT = "meta/dreamgen.json"
PROVENANCE = "meta/provenance.jsonl"
ROWS = 1000  # of the episode list that are held at a time
AGAIN = "copy or export the dataset again"
PLACED = ("episode_index", "data/chunk_index", "data/file_index", "dataset_from_index", "dataset_to_index")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One episode: `first` is its first row in the parquet file `data`; videos: key to (file, first frame, frames).

    frames of a video is None where the whole file is the episode. meta: provenance that the index itself tells.
    """

    index: int
    length: int
    tasks: list
    data: Path
    first: int | None
    videos: dict[str, tuple[Path, int, int | None]]
    meta: dict = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A dataset's index. tasks: task index to text (as found); fps: as found, may be a float."""

    root: Path
    version: str
    info: dict
    tasks: dict[int, object]
    entries: list[Entry]
    mended: list[str] = field(default_factory=list)


def locate(root: str | Path, revision: str | None = None) -> Path:
    """A local folder, or a dataset of the Hugging Face hub ("org/name", "hf://org/name"), downloaded.

    Raises ValueError if it is neither, and where "org/name" may be either: `org` holds datasets, but not this one.
    """
    hub = re.fullmatch(r"(hf:/{1,2})?([\w-][\w.-]*/[\w.-]+)", str(root))
    path = Path(root).expanduser()
    if path.exists() and not (hub and hub[1]):
        return path
    if hub is None:
        raise ValueError(f"dataset {root} does not exist; mend the path, or run the job that makes it")
    name = hub[2]
    if not hub[1] and path.parent.is_dir() and any((child / INFO).is_file() for child in path.parent.iterdir()):
        raise ValueError(f"dataset {root} does not exist, and the folder {path.parent} holds others; write hf://{name} "
                         f"if it is one of the Hugging Face hub, else mend the path (./{name}) or run the job that "
                         f"makes it")  # fmt: skip
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type="dataset", revision=revision))
    except Exception as error:  # the hub's and the network's errors have no common class; all are named and re-raised
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"dataset {name} is no local folder, and the Hugging Face hub does not give a dataset of that name "
            f"({reason}). Mend the path, or download it where there is a network."
        ) from error


def read_layout(root: Path) -> Layout:
    """The index of the dataset at `root`. ValueError if it is unfinished, broken or of an unknown version."""
    if not (root / INFO).is_file():
        raise ValueError(f"{root} is no finished LeRobot dataset ({INFO} is missing); mend the path, run the job that "
                         f"makes it again, or open it with data=video_folder if it holds video files")  # fmt: skip
    info = read_json(root / INFO)
    version = str(info.get("codebase_version"))
    missing = [key for key in ("fps", "features", "data_path") if key not in info]
    if missing:
        raise ValueError(f"{root / INFO} lacks {', '.join(missing)}; {AGAIN}")
    if cameras(info) and "video_path" not in info:
        raise ValueError(f"{root / INFO} lists the videos {', '.join(cameras(info))} and lacks video_path; {AGAIN}")
    if version.startswith("v2."):
        return _read_v2(root, version, info)
    if version.startswith("v3."):
        return _read_v3(root, version, info)
    raise ValueError(f"{root / INFO} has codebase_version '{version}'; expected v2.0, v2.1 or v3.0")


def cameras(info: dict) -> list[str]:
    """Keys of all video features."""
    return [key for key, feature in info["features"].items() if feature.get("dtype") == "video"]


def is_depth(feature: dict) -> bool:
    """Whether a camera's pictures are depths: packets that no reader of colours understands."""
    said = {**(feature.get("video_info") or {}), **(feature.get("info") or {})}
    return bool(said.get("video.is_depth_map") or said.get("is_depth_map"))


def pictures(info: dict) -> list[str]:
    """Keys of all cameras whose pictures lie in the tables, one a row."""
    return [key for key, feature in info["features"].items() if feature.get("dtype") == "image"]


def read_jsonl(path: Path, *keys: str) -> list[dict]:
    """One JSON object per line, each with `keys`. ValueError names the file and the line."""
    return list(each_line(path, *keys))


def each_line(path: Path, *keys: str) -> Iterator[dict]:
    """As `read_jsonl`, one after another."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path} line {number} is not valid JSON: {error}") from None
                missing = [key for key in keys if key not in row]
                if missing:
                    raise ValueError(f"{path} line {number} lacks {', '.join(missing)}")
                yield row


def check_owner(entry: Entry, table: pa.Table) -> None:
    """Rows of a file of many episodes are cut out by counting. ValueError if they are those of another episode."""
    if entry.first is None or "episode_index" not in table.column_names:
        return
    owners = table["episode_index"].unique().to_pylist()
    if owners != [entry.index]:
        raise ValueError(f"rows {entry.first} to {entry.first + table.num_rows - 1} of {entry.data} are those of "
                         f"episode {', '.join(map(str, owners[:3]))}: the episode list and the file disagree; copy "
                         f"both again")  # fmt: skip


def episode_tables(root: Path) -> list[Path]:
    """The files of the episode list of a v3.0 dataset."""
    return sorted((root / "meta/episodes").glob("*/*.parquet"))


def _read_v2(root: Path, version: str, info: dict) -> Layout:
    rows = read_jsonl(root / "meta/tasks.jsonl", "task_index", "task")
    tasks = {int(row["task_index"]): row["task"] for row in rows}
    entries, size = [], int(info.get("chunks_size", 1000))
    for row in read_jsonl(root / "meta/episodes.jsonl", "episode_index", "length"):
        index = int(row["episode_index"])
        place = {"episode_chunk": index // size, "episode_index": index}
        videos = {key: (root / info["video_path"].format(video_key=key, **place), 0, None) for key in cameras(info)}
        data = root / info["data_path"].format(**place)
        entries.append(Entry(index=index, length=int(row["length"]), tasks=_texts(row), data=data, first=None,
                             videos=videos, meta=_provenance(row)))  # fmt: skip
    mended = _check_totals(info, entries, tasks)
    return Layout(root=root, version=version, info=info, tasks=tasks, entries=entries, mended=mended)


def _read_v3(root: Path, version: str, info: dict) -> Layout:
    tasks = _read_tasks(root / "meta/tasks.parquet")
    keys, fps, starts = cameras(info), float(info["fps"]), dict[tuple[int, int], int]()
    files = episode_tables(root)
    if not files:
        raise ValueError(f"{root}/meta/episodes holds no parquet file; the dataset is incomplete; make or copy it")
    for file in files:
        _require_columns(file, pq.read_schema(file).names, keys)
        columns = pq.read_table(file, columns=["data/chunk_index", "data/file_index", "dataset_from_index"])
        for chunk, number, first in zip(*(column.to_pylist() for column in columns.columns), strict=True):
            starts[chunk, number] = min(starts.get((chunk, number), first), first)

    @cache
    def placed(pattern: str, **place: Any) -> Path:
        """One path for all episodes of a file."""
        return root / pattern.format(**place)

    def entry(row: dict) -> Entry:
        chunk, number, first = row["data/chunk_index"], row["data/file_index"], row["dataset_from_index"]
        videos = {}
        for key in keys:
            head = f"videos/{key}/"
            if row.get(head + "file_index") is None:
                continue
            path = placed(info["video_path"], video_key=key, chunk_index=row[head + "chunk_index"],
                          file_index=row[head + "file_index"])  # fmt: skip
            begin, stop = (round(row[head + edge] * fps) for edge in ("from_timestamp", "to_timestamp"))
            videos[key] = (path, begin, stop - begin)
        return Entry(index=int(row["episode_index"]), length=int(row.get("length", row["dataset_to_index"] - first)),
                     tasks=_texts(row), data=placed(info["data_path"], chunk_index=chunk, file_index=number),
                     first=first - starts[chunk, number], videos=videos, meta=_provenance(row))  # fmt: skip

    entries = sorted(map(entry, _rows(files)), key=lambda entry: entry.index)
    mended = _check_totals(info, entries, tasks)
    return Layout(root=root, version=version, info=info, tasks=tasks, entries=entries, mended=mended)


def _rows(files: Sequence[Path]) -> Iterator[dict]:
    """The rows of the episode list without their statistics, some at a time."""
    for path in files:
        with pq.ParquetFile(path) as file:
            names = [name for name in file.schema_arrow.names if not name.startswith("stats/")]
            for batch in file.iter_batches(batch_size=ROWS, columns=names):
                yield from batch.to_pylist()


def _require_columns(file: Path, names: list[str], keys: list[str]) -> None:
    """ValueError for an episode table that does not say where rows and frames lie; `keys`: the cameras."""
    wanted = [*PLACED]
    for head in (f"videos/{key}/" for key in keys if f"videos/{key}/file_index" in names):
        wanted += [head + name for name in ("chunk_index", "from_timestamp", "to_timestamp")]
    if missing := [name for name in wanted if name not in names]:
        raise ValueError(f"{file} lacks the columns {', '.join(missing)}; {AGAIN}")


def _texts(row: dict) -> list:
    """The tasks that a row of the episode list names; some lists hold one plain text."""
    found = row.get("tasks") or []
    return [found] if isinstance(found, str) else list(found)


def _provenance(row: dict) -> dict:
    """What a row of the episode list says of an episode's making: our own column, JSON."""
    try:
        found = json.loads(row.get("provenance") or "{}")
    except (TypeError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_tasks(path: Path) -> dict[int, object]:
    """Task texts are the pandas index; it is the only other column of the file."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; the dataset is incomplete, make or copy it again")
    table = pq.read_table(path)
    texts = [name for name in table.column_names if name != "task_index"]
    if "task_index" not in table.column_names or len(texts) != 1:
        raise ValueError(f"{path} has columns {table.column_names}; expected task_index and the texts as index")
    return dict(zip(table["task_index"].to_pylist(), table[texts[0]].to_pylist(), strict=True))


def _check_totals(info: dict, entries: list[Entry], tasks: dict) -> list[str]:
    found = {
        "total_episodes": len(entries),
        "total_frames": sum(entry.length for entry in entries),
        "total_tasks": len(tasks),
    }
    mended = [
        f"info.json says {key} {info[key]}, found {value}; used what was found"
        for key, value in found.items()
        if key in info and info[key] != value
    ]
    for name, text in (info.get("splits") or {}).items():
        last = str(text).partition(":")[2]
        if last.isdigit() and int(last) > len(entries):
            mended.append(f"split '{name}' is {text}, found {len(entries)} episodes; used what was found")
    return mended
