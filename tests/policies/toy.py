"""A toy robot with two views and a small policy for it; sizes small and all different."""

import dataclasses
from collections.abc import Callable

import jaxtyping
import numpy as np
import torch

from dreamgen.core.clip import Observation
from dreamgen.core.embodiment import Embodiment, Part, View
from dreamgen.policies.encoder import TinyEncoder
from dreamgen.policies.inference import chunk
from dreamgen.policies.policy import FlowPolicy

B, V, H, W, D, A, STEPS = 5, 2, 24, 16, 3, 7, 6


def robot(**changes) -> Embodiment:
    views = tuple(View(name=n, key=f"observation.images.{n}", height=H, width=W) for n in ("front", "wrist"))
    state = (Part(name="pose", start=0, stop=D, unit="m"),)
    action = (
        Part(name="arm", start=0, stop=6, kind="delta", limits=(-1.0, 1.0)),
        Part(name="hand", start=6, stop=A, kind="binary", limits=(-1.0, 1.0)),
    )
    made = Embodiment(name="toy", robot_hz="20", views=views, state=state, action=action)
    return dataclasses.replace(made, **changes)


def encoder(width: int = 20) -> TinyEncoder:
    return TinyEncoder(width=width, channels=(6, 10), halvings=1, keypoints=4, patches=2, text_width=11, buckets=31)


def policy(seed: int = 0, **changes) -> FlowPolicy:
    torch.manual_seed(seed)
    sizes = dict(encoder=encoder(), horizon=STEPS, layers=3, heads=2, head_width=8, draws=2)
    made = FlowPolicy(robot=robot(), **{**sizes, **changes})
    rng = np.random.default_rng(3)
    state, action = rng.normal(2, 3, (50, D)), rng.normal(0.1, 0.5, (50, made.horizon, A))
    made.fit(state.astype(np.float32), action.astype(np.float32))
    return made


def counted(monkeypatch) -> list:  # noqa: ANN001
    """Have policies act through torch.compile, without a compiler; the graphs that were made so far."""
    graphs: list = []

    def backend(graph: torch.fx.GraphModule, _: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # checks of shapes cannot be traced
    traced = torch.compile(chunk, backend=backend, dynamic=False)
    monkeypatch.setattr("dreamgen.policies.acting.compiled", lambda mode, device: traced)
    return graphs


def batch(seed: int = 1) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    valid = torch.ones(B, STEPS, dtype=torch.bool)
    valid[1, 4:] = False
    words = encoder().words(["lift the red block", "open it", "lift the blue block", "a", "push the red block now"])
    pictures = torch.randint(0, 256, (2, B, V, H, W, 3), generator=g, dtype=torch.uint8)
    known = torch.tensor([1, 1, 1, 0, 1]).bool()
    return dict(pictures=pictures[0], future=pictures[1], future_known=torch.tensor([1, 1, 0, 1, 1]).bool(),
                words=words, state=torch.randn(B, D, generator=g), state_known=known,
                entries_known=known[:, None].repeat(1, D), body=torch.tensor([0, 0, 1, 1, 0]),
                action=torch.rand(B, STEPS, A, generator=g) * 2 - 1, valid=valid,
                weight=torch.ones(B, STEPS))  # fmt: skip


def observations(n: int = B) -> list[Observation]:
    rng = np.random.default_rng(7)
    found = []
    for i in range(n):
        views = {k: rng.integers(0, 256, (H, W, 3), dtype=np.uint8) for k in ("front", "wrist")}
        state = rng.normal(size=D).astype(np.float32)
        found.append(Observation(views=views, state=state, instruction=f"push block {i}"))
    return found


def loss(model: FlowPolicy, data: dict, seed: int = 5) -> torch.Tensor:
    torch.manual_seed(seed)
    return model.loss(data)[0]


CRANE_D, CRANE_A = 5, 4


def crane(views: int = 1) -> Embodiment:
    """Another robot: wider state, narrower actions, another rate, cameras of other names and in another number."""
    made = tuple(View(name=f"mast_{k}", key=f"observation.images.mast_{k}", height=H, width=W) for k in range(views))
    state = (Part(name="joints", start=0, stop=CRANE_D, unit="rad"),)
    action = (Part(name="hook", start=0, stop=1, kind="binary", limits=(0.0, 1.0)),
              Part(name="joints", start=1, stop=CRANE_A, unit="rad"))  # fmt: skip
    return Embodiment(name="crane", robot_hz="50/3", views=made, state=state, action=action)


BODIES = ["real", "dream", "crane", "crane_dream"]


def both(views: int = 1, **changes) -> FlowPolicy:
    """A policy of the toy robot and of a crane with so many views, both with dreams; statistics of each its own."""
    made = policy(**{"bodies": BODIES, "robots": {"crane": crane(views), "crane_dream": "crane"}, **changes})
    rng = np.random.default_rng(4)
    state, action = rng.normal(-40, 7, (50, CRANE_D)), rng.normal(5, 2, (50, made.horizon, CRANE_A))
    made.fit(state.astype(np.float32), action.astype(np.float32), body=2)
    return made


def crane_rows(n: int, views: int = 1, **fields) -> dict[str, np.ndarray | list[str]]:
    """Rows of a batch of the crane's, as `Chunks` gives them."""
    rng = np.random.default_rng(11)
    pictures = rng.integers(0, 256, (2, n, views, H, W, 3), dtype=np.uint8)
    known = np.ones((n, CRANE_D), bool)
    valid = np.ones((n, STEPS), bool)
    valid[0, 3:] = False
    return {"pictures": pictures[0], "instruction": [f"lift {k}" for k in range(n)], "entries_known": known,
            "state": rng.normal(-40, 7, (n, CRANE_D)).astype(np.float32), "state_known": known.all(1),
            "body": np.full(n, 2, np.int64), "action": rng.normal(5, 2, (n, STEPS, CRANE_A)).astype(np.float32),
            "valid": valid, "weight": np.ones((n, STEPS), np.float32), "future": pictures[1],
            "future_known": np.arange(n) != 1, **fields}  # fmt: skip


def toy_rows(n: int) -> dict[str, np.ndarray | list[str]]:
    """Rows of a batch of the toy robot's, real and dreamt."""
    found = {key: value[:n].numpy() for key, value in batch().items() if key != "words"}
    return {**found, "instruction": [f"open {k}" for k in range(n)]}


def crane_observations(n: int, views: int = 1) -> list[Observation]:
    rng = np.random.default_rng(8)
    return [Observation(views={f"mast_{k}": rng.integers(0, 256, (H, W, 3), dtype=np.uint8) for k in range(views)},
                        state=rng.normal(-40, 7, CRANE_D).astype(np.float32), instruction=f"lift block {i}")
            for i in range(n)]  # fmt: skip
