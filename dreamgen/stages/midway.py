"""Closed-loop evaluation of a policy while it is trained, in a process of its own: training does not wait.

A snapshot with the averaged weights, `midway/<step>`, is evaluated on the same first states every time. What has been
measured lies in `midway/<step>.json`; a run that is continued measures only what is missing. A process that is killed
is replaced and begins once more; an evaluation that fails is told of and costs itself alone.
"""

import ctypes
import logging
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from dreamgen.core.intervals import success_interval
from dreamgen.core.manifest import read_json, settle, write_json
from dreamgen.core.protocols import Sim
from dreamgen.core.seeding import seed_for
from dreamgen.engine.precision import place
from dreamgen.sims.rollout import rollout

log = logging.getLogger(__name__)


def _prepare() -> None:
    """A process that gives way to training and ends with it."""
    os.nice(10)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 9)


def measure(kind: type, path: Path, sim: Callable[[], Sim], instructions: Sequence[str] | None, episodes: int,
            steps: int, execute: int, seed: int, target: Path) -> None:  # fmt: skip
    """Write the success of the policy saved at `path` to `target`, and remove the snapshot."""
    world = sim()
    texts = list(instructions or world.instructions)
    world.close()
    plan = [(texts[i % len(texts)], seed_for(seed, "midway", i)) for i in range(episodes)]
    policy = kind.load(path)
    done = list(rollout(sim, policy, plan, steps=steps, execute=min(execute, policy.horizon), place=place))
    write_json(target, success_interval(sum(e.success for e in done), len(done)))
    shutil.rmtree(path, ignore_errors=True)


class Midway:
    """instructions, episodes, steps, execute: as in the stage `evaluate`. sim must be picklable. kind: of the policy.

    A snapshot that has no result, left by a run that was killed, is evaluated before the next one.
    """

    def __init__(
        self,
        out: Path,
        sim: Callable[[], Sim],
        kind: type,
        *,
        instructions: Sequence[str] | None = None,
        episodes: int,
        steps: int,
        execute: int,
        seed: int,
    ) -> None:
        self.folder, self.sim, self.kind = Path(out) / "midway", sim, kind
        self.options = (instructions, episodes, steps, execute, seed)
        self.pool: ProcessPoolExecutor | None = None
        self.begun: dict[Path, Future] = {}
        self.again: set[Path] = set()  # what a killed process took along

    def begin(self, model: nn.Module, step: int) -> None:
        """Evaluate the model as it is now; returns at once."""
        snapshot = self.folder / f"{step:08d}"
        if not snapshot.is_dir() and not snapshot.with_suffix(".json").is_file():
            partial = snapshot.with_suffix(".partial")  # a kill leaves no snapshot that is half there
            model.save(partial)
            settle(partial)
            partial.rename(snapshot)
        self._catch_up()

    def _catch_up(self) -> None:
        """Begin what lies there and was not begun by this process, and once more what ended with a process."""
        for snapshot, future in list(self.begun.items()):
            if snapshot not in self.again and future.done() and isinstance(future.exception(), BrokenExecutor):
                log.warning("the evaluation of %s ended with its process, which was killed; it begins again", snapshot)
                self.again.add(snapshot)
                del self.begun[snapshot]
        for snapshot in sorted(set(self.folder.glob("[0-9]" * 8)) - self.begun.keys()):
            target = snapshot.with_suffix(".json")
            if target.is_file():  # killed between the result and the removal
                shutil.rmtree(snapshot)
                continue
            self.begun[snapshot] = self._submit(snapshot, target)

    def _submit(self, snapshot: Path, target: Path) -> Future:
        """Measure a snapshot in the process beside training, or in a new one where that was killed."""
        piece = partial(measure, self.kind, snapshot, self.sim, *self.options, target)
        try:
            if self.pool is not None:
                return self.pool.submit(piece)
        except BrokenExecutor:
            pass
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, mp_context=context, initializer=_prepare)
        return self.pool.submit(piece)

    def gather(self) -> list[dict[str, Any]]:
        """Wait for what is under way; all that was measured, by step. An evaluation that failed gives its `error` in
        words, and its snapshot stays."""
        self._catch_up()
        wait(self.begun.values())
        self._catch_up()
        if self.pool:
            self.pool.shutdown()
        rows = [{"step": int(path.stem), **read_json(path)} for path in self.folder.glob("*.json")]
        for snapshot, future in self.begun.items():
            if error := future.exception():
                log.warning("the evaluation of %s has failed: %s: %s", snapshot, type(error).__name__, error)
                rows.append({"step": int(snapshot.name), "error": f"{type(error).__name__}: {error}"})
        return sorted(rows, key=lambda row: row["step"])
