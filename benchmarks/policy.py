"""Latency of one action chunk: the plain Euler loop against ours, which computes once what does not change.

    python benchmarks/policy.py [--sizes tiny base] [--rounds 30] [--compile]

again     the whole policy at every Euler step, observation included
plain     the observation is encoded once, its keys and values are computed at every step: the published loop
cached    what `FlowPolicy.act` does: keys, values, AdaLN and the action encoder's time half once
compiled  the same through torch.compile, the observation too
Actions are compared first. Variants take turns; all see the same observation and noise. Bytes are those of the weights
that each variant has to read at least; a multiply-add counts as two operations. On a GPU where there is one, else on a
CPU.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import hydra  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from dreamgen.core.clip import Observation  # noqa: E402
from dreamgen.core.embodiment import Embodiment, Part, View  # noqa: E402
from dreamgen.engine.precision import best_device  # noqa: E402
from dreamgen.policies.encoder import TinyEncoder  # noqa: E402
from dreamgen.policies.flow import euler  # noqa: E402
from dreamgen.policies.inference import compiled  # noqa: E402
from dreamgen.policies.policy import FlowPolicy  # noqa: E402
from jobs.recipe import load  # noqa: E402

ROBOT = Embodiment(
    name="arm", robot_hz="20", views=(View(name="front", key="observation.images.front", height=64, width=64),),
    state=(Part(name="hand", start=0, stop=3, unit="m"), Part(name="opening", start=3, stop=4)),
    action=(Part(name="move", start=0, stop=3, kind="delta", moves="hand", limits=(-1, 1)),
            Part(name="grip", start=3, stop=4, kind="binary", limits=(-1, 1))),
)  # fmt: skip
TOY = dict(layers=2, heads=2, head_width=8)  # for tests
TOY_ENCODER = dict(width=16, channels=(4, 6), keypoints=2, patches=2)


def policy_of(size: str) -> FlowPolicy:
    """The untrained policy of conf/policy/<size>.yaml, for ROBOT, where it acts best."""
    if size == "toy":
        return FlowPolicy(robot=ROBOT, encoder=TinyEncoder(**TOY_ENCODER), **TOY).eval().to(best_device())
    config = load("train_policy", [f"policy={size}"])[0].policy
    config.robot = None
    return hydra.utils.instantiate(config)(robot=ROBOT).eval().to(best_device())


def clock() -> float:
    """Seconds, when the device has done all that it was told to do."""
    if best_device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def variants(policy: FlowPolicy, compile: bool) -> dict[str, Callable[[list[Observation], list[int]], torch.Tensor]]:
    """Ways from an observation to a chunk, still in the transformer's numbers."""
    steps = policy.euler_steps

    def again(seen: list[Observation], seeds: list[int]) -> torch.Tensor:
        def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            known = policy.observe(seen)
            return policy.velocity(x, t, known.state, known.plan, known.context, known.body)[0]

        return euler(velocity, policy.noise(seeds), steps)

    def plain(seen: list[Observation], seeds: list[int]) -> torch.Tensor:
        found = {}
        keep, policy.dit.context = policy.dit.context, lambda tokens: found.setdefault("tokens", tokens)
        known = policy.observe(seen)
        policy.dit.context = keep

        def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return policy.velocity(x, t, known.state, known.plan, policy.dit.context(found["tokens"]), known.body)[0]

        return euler(velocity, policy.noise(seeds), steps)

    def fast(mode: str | None) -> Callable[[list[Observation], list[int]], torch.Tensor]:
        act = compiled(mode, best_device().type)
        return lambda seen, seeds: act(policy, policy.noise(seeds), policy.inputs(seen), steps, 0)

    return {"again": again, "plain": plain, "cached": fast(None)} | ({"compiled": fast("default")} if compile else {})


@torch.no_grad()
def measure(size: str, rounds: int, compile: bool) -> dict:
    """Median and 99th percentile in ms of each variant, of the whole chunk and of the action head alone."""
    torch.manual_seed(0)
    policy = policy_of(size)
    rng = np.random.default_rng(0)
    seen = [Observation(views={"front": rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)},
                        state=np.zeros(4, np.float32), instruction="open the drawer")]  # fmt: skip
    ways = variants(policy, compile)
    want = ways["again"](seen, [1])
    times: dict[str, list[float]] = {name: [] for name in [*ways, "observe"]}
    flops = {}
    for name, way in ways.items():
        found = way(seen, [1])  # warm, and compiled
        torch.testing.assert_close(found, want, atol=2e-4, rtol=2e-4)
        if name != "compiled":
            with FlopCounterMode(display=False) as counter:
                way(seen, [1])
            flops[name] = counter.get_total_flops()
    calls = {name: lambda way=way: way(seen, [1]) for name, way in ways.items()}
    calls["observe"] = lambda: policy.observe(seen)
    for _ in range(rounds):
        for name, call in calls.items():
            begun = clock()
            call()
            times[name].append(1000 * (clock() - begun))
    rows = {name: {"p50": float(np.median(t)), "p99": float(np.quantile(t, 0.99)), "least": min(t),
                   "flops": flops.get(name)} for name, t in times.items()}  # fmt: skip
    weights = sum(p.numel() for p in policy.dit.parameters())
    return {"rows": rows, "head_bytes": 4 * weights * policy.euler_steps, "parameters": weights}


def name_of_device() -> str:
    return torch.cuda.get_device_name() if best_device().type == "cuda" else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["tiny", "base"], choices=["toy", "tiny", "base", "n1"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    found = {size: measure(size, options.rounds, options.compile) for size in options.sizes}
    best = "compiled" if options.compile else "cached"
    for size, made in found.items():
        print(f"{size}: {made['parameters'] / 1e6:.2f}M parameters in the action head, "
              f"{made['head_bytes'] / 1e6:.1f} MB of its weights read a chunk")  # fmt: skip
        print(f"{'':10}{'p50 ms':>10}{'p99 ms':>10}{'least ms':>10}{'MFLOP':>10}{'times plain':>13}")
        for name, row in made["rows"].items():
            work = "" if row["flops"] is None else f"{row['flops'] / 1e6:.1f}"
            ratio = made["rows"]["plain"]["p50"] / row["p50"]
            print(f"{name:10}{row['p50']:10.2f}{row['p99']:10.2f}{row['least']:10.2f}{work:>10}{ratio:13.2f}")
    print(f"load average {os.getloadavg()[0]:.1f}, peak memory "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")  # fmt: skip
    first = found[options.sizes[0]]["rows"]
    print(json.dumps({"name": "policy", "ratio": first["plain"]["p50"] / first[best]["p50"], "ours": first[best]["p50"],
                      "peer": first["plain"]["p50"], "unit": "ms", "device": name_of_device(),
                      "settings": {"sizes": options.sizes, "rounds": options.rounds, "threads": torch.get_num_threads(),
                                   "load": os.getloadavg()[0], "ours": best, "all": found}}))  # fmt: skip


if __name__ == "__main__":
    main()
