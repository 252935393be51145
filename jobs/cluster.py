"""A stage's shards on a Ray cluster whose workers may come and go.

A worker is an actor that builds the stage once, models and all, and then works on one shard after another. The shard of
a worker that died is given to another one, and a new worker is asked for; those that the cluster has no room for wait
until a node joins. Results lie in `out`, on a file system that all nodes share, so nothing is lost with a worker, nor
with the cluster: the same command continues.
"""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dreamgen.engine.progress import bar

log = logging.getLogger("jobs")
Build = Callable[[], Callable[..., dict]]
SHARDS = 4  # for each worker, where the command line names no number: a lost one costs little, a late one finds work
PATIENCE = 60  # seconds without news, after which it is said what is waited for


@dataclass(frozen=True, kw_only=True)
class Ray:
    """workers: at most so many, each of `cpus` and `gpus`. address: of the cluster; "local" starts one and ends it.

    Calling it with a configuration runs its stage and returns the manifest. Raises ValueError if Ray is not installed,
    if there is no cluster at `address`, and what a stage raises.
    """

    workers: int
    address: str = "auto"
    cpus: float = 1
    gpus: float = 0

    def __call__(self, cfg: DictConfig) -> dict:
        shards = cfg.num_shards if cfg.num_shards > 1 else SHARDS * self.workers
        plain = OmegaConf.to_yaml(cfg)
        return self.run(partial(built, plain, os.getcwd()), shards, name=str(cfg.step))

    def run(self, build: Build, shards: int, *, name: str = "shards") -> dict:
        """Call `build()(shard=k, num_shards=shards)` for every k, each until it returns; the finished manifest."""
        ray = self._connect()
        try:
            return Crew(ray, self, build, shards).run(name)
        finally:
            ray.shutdown()

    def _connect(self) -> Any:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise ValueError("launcher=ray needs Ray: pip install -e '.[ray]' in dreamgen's folder") from None
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
        if "OMP_NUM_THREADS" in os.environ:  # sums depend on it
            options["runtime_env"] = {"env_vars": {"OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"]}}
        if self.address == "local":
            options |= {"num_cpus": max(1, round(self.workers * self.cpus)), "include_dashboard": False}
        try:
            ray.init(self.address, **options)
        except ConnectionError as error:
            raise ValueError(f"no Ray cluster at '{self.address}' ({str(error).splitlines()[0]}). Start one with `ray "
                             "start --head`, or set launcher.address=local.") from error  # fmt: skip
        return ray


class Worker:
    """The actor: a stage that is built once."""

    def __init__(self, build: Build) -> None:
        self.build, self.stage = build, None

    def ready(self) -> None:
        """Load everything."""
        self.stage = self.build()

    def work(self, shard: int, num_shards: int) -> dict:
        """One shard, to its end."""
        return self.stage(shard=shard, num_shards=num_shards)


class Crew:
    """The workers of one run, and who works on what."""

    def __init__(self, ray: Any, size: Ray, build: Build, shards: int) -> None:
        self.ray, self.size, self.shards, self.lost = ray, size, shards, 0
        self.build = ray.put(build)
        self.actor = ray.remote(num_cpus=size.cpus, num_gpus=size.gpus, max_restarts=0)(Worker)
        self.waiting, self.idle = deque(range(shards)), []
        self.tasks: dict[Any, tuple[Any, int | None]] = {}  # by whom; the shard is None while it loads
        for _ in range(min(size.workers, shards)):
            self.hire()

    def hire(self) -> None:
        """Ask for one more worker."""
        actor = self.actor.remote(self.build)
        self.tasks[actor.ready.remote()] = (actor, None)

    def run(self, name: str) -> dict:
        """Work through every shard; the manifest."""
        with bar(self.shards, name, unit="shard") as drawn:
            manifest: dict = {}
            for result in self.results():
                drawn.update()
                manifest = result if result.get("complete", True) else manifest
        if not manifest:  # what other nodes wrote may be seen late
            self.waiting.append(0)
            manifest = next(result for result in self.results())
        if not manifest.get("complete", True):
            raise ValueError(f"all {self.shards} shards have been worked through, but {manifest.get('left')} items are "
                             "missing in `out`; it must lie on a file system that all nodes share")  # fmt: skip
        return manifest

    def results(self) -> Iterator[dict]:
        """What the shards return, as they come."""
        while self.waiting or any(shard is not None for _, shard in self.tasks.values()):
            while self.waiting and self.idle:
                actor, shard = self.idle.pop(), self.waiting.popleft()
                self.tasks[actor.work.remote(shard, self.shards)] = (actor, shard)
            yield from self._next()

    def _next(self) -> Iterator[dict]:
        """Wait for a worker; its result, if it had a shard. One that died is replaced, and its shard waits again."""
        while not (found := self.ray.wait(list(self.tasks), num_returns=1, timeout=PATIENCE)[0]):
            log.info("%d workers of %g CPUs and %g GPUs are at work or asked for; the cluster has %s", len(self.tasks),
                     self.size.cpus, self.size.gpus, self.ray.cluster_resources())  # fmt: skip
        actor, shard = self.tasks.pop(found[0])
        errors = self.ray.exceptions
        gone = (errors.RayActorError, errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError)
        try:
            result = self.ray.get(found[0])
        except errors.RayTaskError as error:
            raise error.cause from None
        except gone as error:
            self.lost += 1
            if self.lost > 3 * self.size.workers:
                raise ValueError(f"{self.lost} workers died one after another, the last of: {error}") from None
            log.info("a worker went away%s", "" if shard is None else f"; shard {shard} is given to another one")
            self.waiting.extendleft([] if shard is None else [shard])
            self.hire()
            return
        self.idle.append(actor)
        if shard is not None:
            self.lost = 0
            yield result


def built(plain: str, folder: str) -> Callable[..., dict]:
    """The stage of a configuration, as it is run in `folder`."""
    from jobs.running import build

    os.chdir(folder)
    return build(OmegaConf.create(plain))
