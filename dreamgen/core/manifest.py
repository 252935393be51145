"""What a stage read, wrote and ran with. A directory without a complete manifest is unfinished.

A stage writes `run.json` first (what it is about to do), its items under temporary names that it renames, and
`manifest.json` last. So it can be killed at any point and called again; a call with another configuration on the same
directory is an error, never a mixture.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import platform
import resource
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dreamgen.core.lock import LOCK, hold

FILE = "manifest.json"
RUN = "run.json"
STORED = 2**26  # bytes of a folder from which on its digests are kept for other processes
SETTLED = 2  # seconds after which a file that is written to again has another time
ALONE = ".alone"  # in a folder of which shards end together, while one of them does, and where that failed
WRITING = ".writing"  # beside a dataset while it is written, and until its stage's manifest is there
MARKS = (LOCK, ALONE)  # what processes at work leave in a stage's folder: no part of what it made


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to `path` when the block ends well and removed when it does not. What has
    its name is whole after a power cut too: the file is on the disk before it is renamed.

    Drawn at random: containers on several machines have equal process ids, and may write to one folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.partial{path.suffix}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        if temporary.is_file():
            temporary.unlink()


def settle(folder: Path) -> None:
    """Have a folder and all that is in it on the disk before what is written next. Its lock is left alone: a process
    that closes a file which it has locked, however it was opened, has it locked no longer."""
    for path in (*folder.rglob("*"), folder, folder.parent):
        if path.name != LOCK and (path.is_file() or path.is_dir()):
            _sync(path)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk, as far as its file system can tell; others may have
    removed it meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of a folder, on some network file systems
                raise
        finally:
            os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one piece: the file is whole or absent."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; ValueError names the file if it is missing or broken."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def digest(value: Any) -> str:
    """16 hex digits that name a JSON value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def file_digest(path: Path) -> str:
    """16 hex digits that name a file's bytes; read once in a process, as long as it is not written to."""
    stat = path.stat()
    return _digest_of(path.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ino)


@functools.lru_cache(maxsize=100_000)
def _digest_of(path: Path, size: int, written: int, inode: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


def tree_digest(path: Path) -> str:
    """16 hex digits that name a file, or a directory's file names and bytes.

    The digests of a large folder's files are kept in the user's cache folder, so that the next process reads only the
    files whose place, size, time of writing or inode is another.
    """
    if path.is_file():
        return file_digest(path)
    stats = {p: p.stat() for p in sorted(path.rglob("*"))
             if p.is_file() and p.suffix != ".log" and p.name not in MARKS and not written(p)}  # fmt: skip
    if sum(stat.st_size for stat in stats.values()) < STORED:
        return digest([[str(p.relative_to(path)), file_digest(p)] for p in stats])
    keys = {p: f"{p.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}" for p, stat in stats.items()}
    store = _cache() / "digests" / f"{digest(str(path.resolve()))}.json"
    found = _recall(store)
    try:
        for p in stats:
            found[keys[p]] = found.get(keys[p]) or file_digest(p)
        return digest([[str(p.relative_to(path)), found[keys[p]]] for p in stats])
    finally:  # what an interrupted call has read counts too
        settled = [keys[p] for p in stats if time.time() - stats[p].st_mtime > SETTLED]
        _remember(store, {key: found[key] for key in settled if key in found})


def _cache() -> Path:
    """The user's folder for what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "dreamgen"


def _recall(store: Path) -> dict[str, str]:
    """What a store holds; nothing if it is absent or unreadable."""
    try:
        known = json.loads(store.read_text())
    except (OSError, ValueError):
        return {}
    good = isinstance(known, dict) and all(isinstance(value, str) and len(value) == 16 for value in known.values())
    return known if good else {}


def _remember(store: Path, known: dict[str, str]) -> None:
    """Replace a store in one piece; of processes that do so together one wins, and the others read files again."""
    with contextlib.suppress(OSError):
        if known != _recall(store):
            write_json(store, known)


def fingerprint(path: Path | str) -> str:
    """Names a stage's input: its manifest's hash where it has one (cheap), else its bytes.

    Raises ValueError where there is none, and for an empty path: it would mean the folder that one works in.
    """
    if not str(path):
        raise ValueError("the path of an input is empty; name a folder (the one that you work in is '.')")
    if made := written(Path(path) / FILE):
        return made["id"]
    if not Path(path).exists():
        raise ValueError(f"{path} does not exist; run the stage that makes it first, or mend the path")
    return tree_digest(Path(path))


def written(file: Path) -> dict | None:
    """What a stage says in a `manifest.json` or `run.json`; None for other files, also of that name."""
    try:
        found = read_json(file) if file.name in (FILE, RUN) and file.is_file() else None
    except ValueError:
        return None
    return found if isinstance(found, dict) and {"id", "stage", "config"} <= found.keys() else None


def is_complete(path: Path) -> bool:
    return written(Path(path) / FILE) is not None


def require_complete(path: Path, what: str) -> dict:
    """The manifest of a finished stage; ValueError says that `what` at `path` is missing or unfinished."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{what} {path} does not exist; run the stage that makes it, or mend the path")
    if not is_complete(path):
        raise ValueError(f"{what} {path} is unfinished (no {FILE}); run its stage again, it continues where it stopped")
    return read_json(path / FILE)


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {k: v for key, item in value.items() for k, v in _flatten(item, f"{prefix}{key}.").items()}
    return {prefix[:-1]: value}


def differences(old: Any, new: Any) -> str:
    """The keys in which two configurations differ, in words, "" if in none: one that is null may also be absent."""
    a, b = _flatten(old), _flatten(new)
    changed = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
    rows = [f"{key}: {a.get(key)!r} -> {b.get(key)!r}" for key in changed]
    return "; ".join(rows[:8]) + (f"; and {len(rows) - 8} more" if len(rows) > 8 else "")


def versions() -> dict[str, str]:
    """Versions of what can change a result; only packages that are already imported are named."""
    names = ("torch", "diffusers", "transformers", "accelerate", "peft", "numpy", "mujoco", "metaworld", "decord", "av")
    found = {name: str(getattr(sys.modules.get(name), "__version__", "")) for name in names}
    return {"python": platform.python_version()} | {k: v for k, v in found.items() if v}


@dataclass
class Stage:
    """One run of one stage on one directory. Use as `with Stage(...) as run: if run.complete: return ...`.

    The manifest's `seconds` are of all runs that it took, but for those that were killed (SIGKILL), which cannot tell;
    its `peak_mb` is the largest resident memory of this process plus that of its largest child, not of all children.

    config: the resolved configuration, plain JSON, free of paths; parents: name to input path. Together they name
    the result: `run.id`. writes: False for all but one of several processes that run a stage together. shared: its
    items may be made by several processes at once, each its share. anew: what an earlier run of this stage says of its
    input is forgotten.

    Raises ValueError if `out` holds the output of another configuration or of another stage, and where another process
    is at work in it, but for a shared one.
    """

    out: Path
    name: str
    config: Mapping[str, Any]
    parents: Mapping[str, Path | str] = field(default_factory=dict)
    seed: int = 0
    writes: bool = True
    shared: bool = False
    anew: bool = False

    def __post_init__(self) -> None:
        self.out = Path(self.out)
        self.started, self.held = time.time(), contextlib.ExitStack()
        spec = {
            "stage": self.name,
            "config": json.loads(json.dumps(self.config, default=str)),
            "parents": {name: self._read(name, path) for name, path in self.parents.items()},
            "seed": self.seed,
        }
        self.spec, self.id = spec, digest(spec)
        for file in (FILE, RUN):
            path = self.out / file
            if not path.is_file():
                continue
            if (old := written(path)) is None:
                raise ValueError(f"{path} is no stage's; choose another `step` or `stage.out`, or move it away")
            if self.anew and old.get("stage") == self.name:
                path.unlink()
                continue
            if old.get("id") != self.id and not (file == RUN and self._nothing_made()):
                if old.get("stage") != self.name:
                    raise ValueError(f"{self.out} holds the output of '{old.get('stage')}', not of '{self.name}'; "
                                     f"choose another `step` or `stage.out`")  # fmt: skip
                if changed := differences({key: old.get(key) for key in spec}, spec):
                    raise ValueError(f"{self.out} holds the output of another configuration ({changed}). Choose "
                                     f"another `out`, or delete {self.out} to make it again.")  # fmt: skip
        self.complete = (self.out / FILE).is_file()
        self.before = 0.0
        if not self.complete and self.writes:
            self.out.mkdir(parents=True, exist_ok=True)
            if not self.shared:
                self.held.enter_context(hold(self.out))
            if not (self.out / RUN).is_file() or read_json(self.out / RUN).get("id") != self.id:
                write_json(self.out / RUN, {"id": self.id, "seconds": 0.0, **spec})
            self.before = float(read_json(self.out / RUN).get("seconds", 0.0))

    def _nothing_made(self) -> bool:
        """True where a run only said what it was about to do, as one that was refused its settings. What lies in
        `cache` is named by what it was made of."""
        return all(p.name in (RUN, LOCK, ALONE, "cache") or p.suffix == ".log" for p in self.out.iterdir())

    def _read(self, name: str, path: Path | str) -> str:
        try:
            return fingerprint(path)
        except ValueError as error:
            raise ValueError(f"the input '{name}' of {self.name}: {error}") from None

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.held.close()
        # time spent by a run that was interrupted in an orderly way counts; that of a killed one is lost
        if not self.complete and self.writes and (self.out / RUN).is_file():
            seconds = self.before + time.time() - self.started
            write_json(self.out / RUN, {"id": self.id, "seconds": seconds, **self.spec})

    def manifest(self) -> dict:
        """The finished stage's manifest."""
        return read_json(self.out / FILE)

    def finish(self, **results: Any) -> dict:
        """Write the manifest, last of all, once the folder is on the disk: counts and scores as plain JSON."""
        peak = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        manifest = {
            "id": self.id,
            **self.spec,
            "results": results,
            "seconds": round(self.before + time.time() - self.started, 2),
            "peak_mb": round(peak / 1024, 1),
            "versions": versions(),
        }
        if not self.writes:
            return manifest
        settle(self.out)
        write_json(self.out / FILE, manifest)
        for file in (RUN, WRITING, LOCK):
            (self.out / file).unlink(missing_ok=True)
        self.complete = True
        return manifest
