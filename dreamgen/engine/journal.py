"""What a training run writes about itself: loss rows, log, trackers; how long it waited, how near the peak it came."""

import json
import logging
import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from dreamgen.core.manifest import replacing
from dreamgen.engine.devices import device
from dreamgen.engine.precision import best_device
from dreamgen.engine.processes import Processes
from dreamgen.engine.progress import bar, file_logger
from dreamgen.engine.state import read_losses

TRACKERS = ("tensorboard", "wandb", "trackio")


def require_tracker(tracker: str | None) -> None:
    """Raise ValueError for a tracker that is unknown or not installed."""
    if tracker is not None and tracker not in TRACKERS:
        raise ValueError(f"tracker is '{tracker}'; expected one of {', '.join(TRACKERS)}, or null for none")
    if tracker is not None and find_spec(tracker) is None:
        package = tracker if tracker == "tensorboard" else f"-e '.[{tracker}]' in dreamgen's folder"
        raise ValueError(f"tracker '{tracker}' is not installed; pip install {package}, or choose null")


class Journal:
    """Rows of `out/losses.jsonl`: means of the metrics since the last row, with the share of time spent on data.

    tracker: where accelerate sends the rows as well, or None. flops: of one step on all processes; rows then have
    `tflops`, a device's FLOP/s / 1e12, and `of_peak`, its share of what the device can do, where that is known.
    Only the first process writes. Use as a context.
    """

    def __init__(self, out: Path, name: str, team: Processes, *, start: int, steps: int, tracker: str | None = None,
                 flops: float | None = None, replicas: int = 1) -> None:  # fmt: skip
        require_tracker(tracker)
        self.out, self.name, self.team, self.tracker, self.flops = out, name, team, tracker, flops
        self.replicas = replicas
        self.path = out / "losses.jsonl"
        self.rows = [row for row in read_losses(out) if row["step"] < start]
        self.log = file_logger(name, out / f"{name}.log") if team.main else logging.getLogger("dreamgen.silent")
        self.log.disabled = not team.main
        self.start, self.steps, self.begun = start, steps, time.time()
        self.sums: dict[str, float] = {}
        self.times: dict[str, int] = {}  # a metric of some steps alone is the mean of these
        self.count, self.busy, self.waited = 0, 0.0, 0.0
        self.file: TextIO | None = None
        self.accelerator: Any = None

    def __enter__(self) -> "Journal":
        self.peak = device("here").bf16 * self.replicas if self.flops and self.team.main else 0.0
        self.drawn = bar(self.steps, self.name, initial=self.start, unit="step", hidden=not self.team.main)
        if self.team.main:
            with replacing(self.path) as temporary:  # whole for the other processes, and after a kill
                temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
            self.file = self.path.open("a")
            if self.tracker:
                from accelerate import Accelerator

                cpu = best_device().type == "cpu"
                self.accelerator = Accelerator(cpu=cpu, log_with=self.tracker, project_dir=str(self.out))
                self.accelerator.init_trackers(self.name)
        return self

    def __exit__(self, *error: object) -> None:
        self.drawn.close()
        if self.file:
            self.file.close()
        if self.accelerator:
            for tracker in self.accelerator.trackers:  # `end_training` would also end the process group
                tracker.finish()

    def add(self, metrics: dict[str, float], seconds: float, waited: float) -> None:
        """One step: its metrics, how long it took, and how much of that it waited for data."""
        for key, value in metrics.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
            self.times[key] = self.times.get(key, 0) + 1
        self.count += 1
        self.busy, self.waited = self.busy + seconds, self.waited + waited
        self.drawn.update()

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Close a row after `step`; `figures` are those of a validation, if there was one."""
        means = {key: value / self.times[key] for key, value in self.sums.items()}
        row = {"step": step, "seconds": round(time.time() - self.begun, 2), **means,
               "data_wait": round(self.waited / max(self.busy, 1e-9), 4)}  # fmt: skip
        if self.flops:
            speed = float(self.flops) * self.count / self.busy / self.team.count
            row["tflops"] = round(speed / 1e12, 4)
            row |= {"of_peak": round(speed / self.peak, 4)} if self.peak else {}
        row |= {f"val_{k}": v for k, v in figures.items()}
        self.rows.append(row)
        self.sums, self.times, self.count, self.busy, self.waited = {}, {}, 0, 0.0, 0.0
        if self.file:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
            self.drawn.set_postfix({k: f"{v:.4f}" for k, v in list(means.items())[:2]}, refresh=False)
            self.log.info("step %d %s", step + 1, {k: v for k, v in row.items() if k not in ("step", "seconds")})
        if self.accelerator:
            self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=step)

    def keep(self) -> None:
        """The rows are on the disk before the state that follows them."""
        if self.file:
            os.fsync(self.file.fileno())

    def since_best(self, key: str) -> int | None:
        """Validations since the lowest `key`, 0 at the lowest; None before the first. A function of the rows alone."""
        values = [row[key] for row in self.rows if key in row]
        return len(values) - 1 - values.index(min(values)) if values else None

    def summary(self) -> dict[str, Any]:
        """What a manifest tells of the rows: the last loss, the median share of waiting and of the peak."""
        found: dict[str, Any] = {"loss": self.rows[-1].get("loss") if self.rows else None}
        for key in ("data_wait", "tflops", "of_peak"):
            values = sorted(row[key] for row in self.rows if key in row)
            found |= {key: values[len(values) // 2]} if values else {}
        return found
