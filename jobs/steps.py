"""A recipe's steps in order. Each is the command that `steps` spells out, in a process of its own.

A process a step keeps the peak memory of one step out of the next, and a step killed at any point leaves only what it
finished. The processes are forked from one that has the libraries imported, which takes ten seconds a step otherwise;
not so where there is a GPU, since libraries look for it when they are imported, and CUDA then refuses to run in a fork.
A complete step is skipped if its configuration and its inputs are those that the recipe asks for.
"""

import contextlib
import importlib
import json
import logging
import multiprocessing
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from dreamgen.core.manifest import FILE, differences, fingerprint, is_complete, read_json
from dreamgen.data.layout import locate
from jobs.recipe import lines, load
from jobs.running import PLACES, parts, record, run_stage, walk

log = logging.getLogger("jobs")
# a driver's files: NVIDIA's, also on a Jetson and in WSL, and AMD's
GPUS = ("/dev/nvidiactl", "/dev/nvmap", "/dev/dxg", "/dev/kfd")
IMPORTED = ["jobs.running", "dreamgen.worlds.prefix", "dreamgen.policies.policy", "idm.model"]


def run_pipeline(cfg: DictConfig) -> None:
    """The job: run the steps of the recipe that the command line composed."""
    given = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)  # `${...}` is the step's to resolve
    run_steps(cfg, [word for word in given if not word.startswith("step=")])


def run_steps(cfg: DictConfig, overrides: list[str]) -> None:
    """Run every step of `cfg.steps` under `overrides`; ends the process with the status of the first that fails."""
    if not cfg.steps:
        raise ValueError("this recipe has no steps; choose one with experiment=... (see conf/experiment)")
    os.environ["DREAMGEN_COMMAND"] = shlex.join(["python", "-m", "jobs.pipeline", *overrides])
    names = list(cfg.steps)
    for number, name in enumerate(names, 1):
        job = shlex.split(lines(cfg)[name])[0]
        mine = [*overrides, f"step={name}"]
        step = load(job, mine)[0]
        if complete(step.stage):
            log.info("step %d/%d %s: complete", number, len(names), name)
            continue
        log.info("step %d/%d %s: jobs.%s", number, len(names), name, job)
        if not cfg.apart:
            results = run_stage(step)["results"]
            if results.get("errors") and not is_complete(Path(step.stage.out)):  # a judge's: it leaves no manifest
                sys.stdout.write(results["table"])
                raise SystemExit(1)
        elif status := run_job(job, mine):
            again = f"step '{name}' ended with status {status}; mend it, then give the same command again"
            sys.stderr.write(f"error: {again}\n")
            raise SystemExit(status if status > 0 else 128 - status)
    finish(cfg)


def run_job(job: str, overrides: list[str]) -> int:
    """One job in a process that does not outlive this one; its exit status (negative: killed by that signal)."""
    forked = "forkserver" in multiprocessing.get_all_start_methods() and not any(map(os.path.exists, GPUS))
    context = multiprocessing.get_context("forkserver" if forked else "spawn")
    if forked:
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # diffusers looks for a GPU when it is imported
        context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=_command, args=(job, overrides, dict(os.environ)))
    process.start()
    try:
        process.join()
    except KeyboardInterrupt:
        process.join()
        raise
    return process.exitcode or 0


def _command(job: str, overrides: list[str], environment: dict[str, str]) -> None:
    """What `python -m jobs.<job> <overrides>` does, in this process, which ends when the pipeline does."""
    threading.Thread(target=_end_with_pipeline, daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [f"jobs.{job}", *overrides]
    importlib.import_module(f"jobs.{job}").main()


def _end_with_pipeline() -> None:
    """A server that forked this process lives as long as its children do, so the kernel cannot be asked for this."""
    pipeline = multiprocessing.parent_process()
    if pipeline is not None:
        pipeline.join()
        os.kill(os.getpid(), signal.SIGKILL)


def complete(stage: DictConfig) -> bool:
    """Whether a step's folder holds what its configuration asks for, made from the inputs that are there now.

    The stage itself has the last word: False only means that it is started, and finds out.
    """
    if not is_complete(Path(stage.out)):
        return False
    manifest = read_json(Path(stage.out) / FILE)
    asked = json.loads(json.dumps(record(stage), default=str))
    same = not differences({key: manifest["config"].get(key) for key in asked}, asked)  # a stage may add to it
    made, now = set(manifest["parents"].values()), {fingerprint(path) for path in inputs(stage)}
    return same and (made == now if "folder" in stage else made <= now)  # of a whole run, as far as it had come


def inputs(stage: DictConfig) -> Iterator[Path]:
    """What is there of the files and folders that a step's configuration names, but for the one it writes; of a dataset
    of the hub, the folder in which it is kept."""
    plain = OmegaConf.to_container(stage, resolve=True)
    for root, revision in [(str(node.get("root") or ""), node.get("revision")) for _, node in parts(plain)]:
        if root and not Path(root).exists():
            with contextlib.suppress(ValueError):  # what is nowhere is the stage's to tell
                yield locate(root, revision)
    for key, text in walk(plain):
        path = Path(text)
        if key == "folder":  # of a whole run, or of pictures
            made = [child for child in sorted(path.glob("*")) if is_complete(child)]
            yield from [child for child in made or [path] if child.exists() and child != Path(stage.out)]
        elif key in PLACES - {"out"} and path.exists():
            yield path


def finish(cfg: DictConfig) -> None:
    """Print the table of the last report and where it lies."""
    for name, line in reversed(lines(cfg).items()):
        folder = Path(cfg.out) / name
        if shlex.split(line)[0] == "report" and is_complete(folder):
            table = read_json(folder / FILE)["results"]["table"]
            sys.stdout.write(f"\n{table}\n\nreport: {folder / 'report.html'}\n")
            return
