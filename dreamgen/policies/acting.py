"""How a flow policy acts: observations of the robot that it acts for, in; chunks of commands to this robot, out."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn
from torch.nn import functional as F

from dreamgen.core.clip import Observation
from dreamgen.core.embodiment import Embodiment
from dreamgen.policies import realtime
from dreamgen.policies.inference import compiled, see
from dreamgen.policies.sight import Seen, tensors
from dreamgen.policies.space import Space
from dreamgen.policies.spaces import Spaces


class Acting(nn.Module):
    """What `FlowPolicy` does when it acts. speaks: number of the body through which it does so, and whose robot it acts
    for; all bodies of a robot see, and are told, the same."""

    encoder: nn.Module
    position: nn.Parameter
    spaces: Spaces
    speaks: int
    horizon: int
    euler_steps: int
    compiling: str | None

    @property
    def space(self) -> Space:
        """What states and actions of the robot mean for which the policy acts."""
        return self.spaces.of(self.speaks)

    @property
    def robot(self) -> Embodiment:
        """The robot for which the policy acts."""
        return self.space.robot

    def inputs(self, observations: Sequence[Observation]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pictures, words, states, which of these are known (one that holds NaN is not). Errors: see `observe`."""
        device = self.position.device
        pictures, states = (x.to(device) for x in tensors(self.robot, observations))
        known = states.isfinite().all(1)
        if not self.space.tellable(states.isfinite()).all():
            raise ValueError("the state of an observation is unknown (NaN), and this policy's chunks are told relative "
                             "to it; give the state, or train with frame=recorded")  # fmt: skip
        words = self.encoder.words([o.instruction for o in observations]).to(device)
        if hasattr(self.encoder, "lookup"):
            self.encoder.lookup()
        return pictures, words, F.pad(states, (0, self.spaces.state_dim - states.shape[1])), known

    @torch.no_grad()
    def observe(self, observations: Sequence[Observation]) -> Seen:
        """Encode observations once.

        Raises ValueError for an observation that lacks a view, whose view or state has another shape, or whose state
        is unknown where chunks are told relative to it.
        """
        inputs = self.inputs(observations)
        context, plan, state = see(self, *inputs, self.speaks)
        return Seen(context=context, plan=plan, state=state, states=inputs[2], body=self.speaks)

    def noise(self, seeds: Sequence[int]) -> Float[Tensor, "b h a"]:
        """What a chunk begins as; each row depends on its own seed alone."""
        shape = (self.horizon, self.robot.action_dim)
        rows = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        return F.pad(rows, (0, self.spaces.action_dim - shape[1])).to(self.position.device)

    def finish(self, x: Float[Tensor, "b h w"], states: Float[Tensor, "b d"]) -> Float32[np.ndarray, "b h a"]:
        """Chunks as commands in units; states: of the observations."""
        x = x[..., : self.robot.action_dim].float()
        return self.space.command(self.space.unchunk(x, states[:, : self.robot.state_dim]).cpu().numpy())

    @torch.no_grad()
    def act(self, observations: Sequence[Observation], seeds: Sequence[int]) -> Float32[np.ndarray, "b h a"]:
        """Action chunks in units, inside the limits, binary parts at one of their two values. Seed i draws row i's
        noise. Compiled where that was asked for, which `proceed` is not. Errors: see `observe`."""
        inputs = self.inputs(observations)
        chunk = compiled(self.compiling, self.position.device.type)
        x = chunk(self, self.noise(seeds), inputs, self.euler_steps, self.speaks)
        return self.finish(x, inputs[2])

    def proceed(self, observations: Sequence[Observation], seeds: Sequence[int], rests: Sequence[np.ndarray], *,
                delay: int, mode: str = "guided", beta: float = 5.0) -> Float32[np.ndarray, "b h a"]:  # fmt: skip
        """Chunks that go on from what is left of the last ones; see `dreamgen.policies.realtime`."""
        return realtime.proceed(self, observations, seeds, rests, delay=delay, mode=mode, beta=beta)
