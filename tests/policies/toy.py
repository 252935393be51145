"""A toy robot with two views and a small policy for it; sizes small and all different."""

import dataclasses

import numpy as np
import torch

from dreamgen.core.clip import Observation
from dreamgen.core.embodiment import Embodiment, Part, View
from dreamgen.policies.encoder import TinyEncoder
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
