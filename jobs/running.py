"""How a job runs: compose, check, build the parts, call the stage.

`instantiate(node, _partial_=True, _convert_="all")(**runtime)` is the one way from a configuration to an object.
"""

import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any, get_type_hints

import hydra
from hydra.utils import get_method, get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from dreamgen.core.manifest import FILE, RUN, WRITING, fingerprint, is_complete, require_complete, written
from dreamgen.core.seeding import seed_for
from jobs.errors import speaking
from jobs.help import usage
from jobs.kinds import expected, hints
from jobs.recipe import load, register

# a `_target_` is code: only these may be named by a configuration, also by one that came with a download
ALLOWED = ("dreamgen.", "idm.", "torch.", "diffusers.", "transformers.")
# where and how a stage runs, which never changes its result: not part of what a manifest remembers. The inputs of a
# stage are remembered by what they hold (their fingerprints), not by where they lie. Bad episodes that `skip_bad` left
# out stand in the manifest's results.
PLACES = frozenset("out root path start folder against clips dreams dream_clips counterfactuals demos heldout "
                   "labels scored truth alternatives alternatives_truth question world".split())  # fmt: skip
NAMED = frozenset(["path", "start", "question"])  # also an id of a hub, an address or a name of ours
MANNER = frozenset("workers shard num_shards overlap command cache_mb memory_gb checkpoint_every description skip_bad "
                   "cache accumulate checkpointing compile sharding tracker url key_variable timeout retries pause "
                   "parallel needs_actions".split())  # fmt: skip
# artefacts lie where `out` says, never in Hydra's dated folders, and logging is ours
HYDRA = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=disabled", "hydra/hydra_logging=disabled"]
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of parts that are not used here
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
DROPPED = object()
FIGURES = 12  # of a stage's results that are told when it ends
log = logging.getLogger("jobs")


def job(name: str) -> Callable[[], None]:
    """The entry point of `python -m jobs.<name>`: run the stage of `conf/<name>.yaml`."""

    def run(cfg: DictConfig) -> None:
        told(cfg, run_stage(cfg))

    return entry(name, run)


def entry(name: str, run: Callable[[DictConfig], Any]) -> Callable[[], None]:
    """A command: `run` is called with the composed configuration; errors end it with one line and status 2."""

    def main() -> None:
        if {"-h", "--help"} & set(sys.argv[1:]):
            sys.stdout.write(usage(name, sys.argv[1:]))
            return
        overrides = [word for word in sys.argv[1:] if "=" in word.lstrip("-") or word.startswith("~")]
        with speaking(debug="debug=true" in overrides):
            cfg, every = load(name, overrides)
            shareable(cfg)
            idle(cfg)
        sys.argv = [sys.argv[0], *(word for word in sys.argv[1:] if word not in overrides), *HYDRA, *every]
        register()
        given = os.environ.get("CUDA_VISIBLE_DEVICES")

        def task(cfg: DictConfig) -> None:
            keep_to(given)
            logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
            logging.getLogger("OpenGL").setLevel(logging.WARNING)
            log.disabled = False  # Hydra has disabled what was there before it
            with speaking(debug=cfg.debug):
                run(cfg)

        os.environ["HYDRA_FULL_ERROR"] = "1"  # what goes wrong in a launcher is ours to tell, too
        with speaking(debug="debug=true" in overrides):
            hydra.main(config_path="pkg://conf", config_name=name, version_base="1.3")(task)()

    return main


def keep_to(given: str | None) -> None:
    """Of the GPUs that the command was given, if it was, take the first: as many as submitit's process on this machine
    was told to take, which counts from the machine's first one, whosever that is."""
    if given is not None and os.environ.get("SUBMITIT_EXECUTOR") == "local":
        asked = [device for device in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if device]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(given.split(",")[: len(asked)])


def told(cfg: DictConfig, manifest: dict) -> None:
    """Log the first figures of a finished stage, and where all of them are."""

    def figures(node: Any, name: str = "") -> Iterator[str]:
        if isinstance(node, dict):
            for key, value in node.items():
                yield from figures(value, f"{name}.{key}" if name else str(key))
        elif isinstance(node, int | float) and not isinstance(node, bool):
            yield f"{name} {node:.4g}" if isinstance(node, float) else f"{name} {node}"

    if "results" in manifest:
        found = list(figures(manifest["results"]))
        more = f", {len(found) - FIGURES} more" if len(found) > FIGURES else ""
        log.info("done: %s%s (%s)", ", ".join(found[:FIGURES]), more, Path(cfg.stage.out) / FILE)


def run_stage(cfg: DictConfig) -> dict:
    """Build the parts that `cfg.stage` names and call its stage function, here or where the launcher says."""
    if "_target_" not in (cfg.launcher or {}):
        return build(cfg)()
    prepare(cfg)
    return instantiate(cfg.launcher)(cfg)


def prepare(cfg: DictConfig) -> Callable[..., dict]:
    """The stage function; ValueError for settings and inputs with which it cannot run."""
    if not str(cfg.out).strip():
        raise ValueError("out is empty; name a folder to write to (the one that you work in is '.')")
    function = check(cfg.stage)
    shareable(cfg)
    require_apart(cfg)
    for key, text in walk(OmegaConf.to_container(cfg.stage, resolve=True)):
        if key in ("root", "path", "world") and (path := Path(text)).is_relative_to(cfg.out):
            inside = [path, *path.parents][: len(path.relative_to(cfg.out).parts) or 1]
            begun = [each for each in inside if written(each / RUN) or (each / WRITING).exists()]
            empty = not path.exists() or path.is_dir() and not any(path.iterdir())
            if (begun or empty and below(text, cfg.out)) and not any(map(is_complete, inside)):
                require_complete((begun or [path])[-1], "the input")  # of an earlier step, which must have ended
    log.info("%s -> %s%s", cfg.step, cfg.stage.out, f", seed {cfg.stage.seed}" if "seed" in cfg.stage else "")
    return function


def require_apart(cfg: DictConfig) -> None:
    """ValueError for a stage that reads `data` where episodes of it are held out: a recipe leaves them out by
    `data.leave_out`, which the command line may replace."""
    if not cfg.data or not cfg.heldout:
        return
    data = OmegaConf.to_container(cfg.data, resolve=True)
    if data not in [node for _, node in parts(OmegaConf.to_container(cfg.stage, resolve=True))]:
        return
    if not cfg.heldout.get("root") or Path(data["root"]).resolve() != Path(cfg.heldout.root).resolve():
        return
    held, taken, away = cfg.heldout.get("episodes"), data.get("episodes"), data.get("leave_out") or []
    if held is None:
        raise ValueError(f"heldout.episodes is null, so that all of {data['root']} is held out, which is trained on; "
                         f"name those to hold out (heldout.episodes=[...]), or another heldout.root")  # fmt: skip
    shared = sorted({*held} & ({*held} if taken is None else {*taken}) - {*away})
    if shared:
        raise ValueError(f"episodes {', '.join(map(str, shared))} are held out and trained on; give "
                         f"data.leave_out=[{','.join(map(str, (*shared, *away)))}]")  # fmt: skip


def build(cfg: DictConfig) -> Callable[..., dict]:
    """The stage with its parts, ready to be called; it may be called for several shards."""
    import torch

    function = prepare(cfg)
    if cfg.num_shards > 1 and torch.cuda.is_available():  # processes of one machine take turns on its GPUs
        torch.cuda.set_device(cfg.shard % torch.cuda.device_count())
    torch.manual_seed(seed_for(cfg.seed, "parts"))  # parts with random first weights belong to the run
    stage = instantiate(cfg.stage, _partial_=True, _convert_="all")
    hints = get_type_hints(function)
    paths = {key: Path(value) for key, value in stage.keywords.items() if is_path(hints.get(key)) and value}
    return partial(stage, **paths, record=record(cfg.stage))


def shareable(cfg: DictConfig) -> None:
    """ValueError if a launcher would spread what is not made of items."""
    elsewhere = "_target_" in (cfg.launcher or {})
    if cfg.stage is None and cfg.launcher:
        raise ValueError("a pipeline runs on this machine; give the launcher to a step: dreamgen dream experiment=... "
                         "step=... launcher=...")  # fmt: skip
    if cfg.stage is not None and "shard" not in cfg.stage and (cfg.num_shards > 1 or elsewhere):
        raise ValueError(f"stage '{cfg.stage._target_.rpartition('.')[2]}' cannot be shared out (num_shards is "
                         f"{cfg.num_shards}); dream, label and curate can")  # fmt: skip


def idle(cfg: DictConfig) -> None:
    """Say so where a launcher gives its processes no GPU although this machine has one."""
    if (cfg.launcher or {}).get("gpus") != 0:
        return
    import torch

    if torch.cuda.is_available():
        log.warning("launcher.gpus is 0: the shards run on CPUs, while this machine has a GPU. Give launcher.gpus: for "
                    "procs how many GPUs they take turns on, for ray how many each worker takes")  # fmt: skip


def run_check(cfg: DictConfig) -> None:
    """Run a stage that judges its input: print its table, and end with status 1 if it found errors."""
    results = run_stage(cfg)["results"]
    sys.stdout.write(results["table"])
    sys.stdout.flush()
    if results["errors"]:
        raise SystemExit(1)


def check(stage: DictConfig) -> Callable[..., dict]:
    """The stage function; ValueError if a configuration names code that is not ours, or settings that it has not."""
    for where, part in parts(OmegaConf.to_container(stage, resolve=True, throw_on_missing=True)):
        if not part["_target_"].startswith(ALLOWED):
            raise ValueError(f"the configuration names '{part['_target_']}'; only {'*, '.join(ALLOWED)}* may be run")
        code = _code(part["_target_"], where)
        arguments = inspect.signature(code).parameters
        unknown = sorted(key for key in part if not key.startswith("_") and key not in arguments)
        if unknown and not any(a.kind is a.VAR_KEYWORD for a in arguments.values()):
            name, known = part["_target_"].rpartition(".")[2], ", ".join(sorted(set(arguments) - {"record", "self"}))
            raise ValueError(f"{where} '{name}' has no setting {', '.join(unknown)}; it has {known}")
        for key, hint in hints(code).items():
            if key in part and (wanted := expected(part[key], hint)):
                raise ValueError(f"{where}.{key} is {shorten(repr(part[key]), 100)}; expected {wanted}")
    return get_method(stage._target_)


def _code(target: str, where: str) -> Callable[..., Any]:
    logging.getLogger("hydra.utils").disabled = True  # it says the same, in red
    try:
        return get_object(target)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{where} names '{target}', which cannot be imported ({error})") from None


def record(stage: DictConfig) -> dict:
    """What a manifest remembers of a stage's configuration, as plain JSON: all that can change its result. Of inputs,
    what they hold (`fingerprint`), wherever they lie."""

    def clean(node: Any) -> Any:
        if isinstance(node, dict):
            kept = {key: held(key, value) for key, value in node.items() if key not in MANNER}
            if "address" in kept or "://" in str(kept.get("path")):
                kept.pop("key", None)  # what a server is shown is no part of a result, and nobody else's to read
            return {key: clean(value) for key, value in kept.items() if value is not DROPPED}
        return [clean(item) for item in node] if isinstance(node, list) else node

    def held(key: str, value: Any) -> Any:
        if key not in PLACES or not isinstance(value, str) or not value:
            return value
        if key not in ("out", "folder") and Path(value).exists():  # a folder's stage says itself what it read of it
            return fingerprint(Path(value))
        return value if key in NAMED and not below(value, stage.out.rpartition("/")[0] or ".") else DROPPED

    return clean(OmegaConf.to_container(stage, resolve=True))


def below(text: str, out: str) -> bool:
    """Whether a path is written as one in the folder `out`: where that is '.', an id of a hub is none."""
    return text.startswith(f"{out}/")


def parts(node: Any, where: str = "stage") -> Iterator[tuple[str, dict]]:
    """Every (key, node) of a plain configuration that names code."""
    if isinstance(node, dict) and isinstance(node.get("_target_"), str):
        yield where, node
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from parts(value, f"{where}.{key}")


def walk(node: Any) -> Iterator[tuple[str, str]]:
    """Every (key, text) below a plain configuration node, but for empty ones."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if isinstance(value, str) and value:
            yield str(key), value
        yield from walk(value)


def is_path(hint: Any) -> bool:
    """True for the annotations `Path` and `Path | None`."""
    return hint is Path or hint == (Path | None)
