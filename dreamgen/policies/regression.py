"""What a policy learns first: the mean of its chunks, by plain regression and without the transformer.

At flow time 0 the noisy chunk x_t is the noise alone, so the best velocity there is E[x | observation] - noise: a
regression. A policy whose encoder summarises the observation predicts this mean in its plan (see `FlowPolicy.plan`),
for a third of the cost of a step of flow matching and without its noise. What an instruction means is found so in a
few hundred steps; flow matching from random weights does not find it in as many.

With FLARE the plan says what follows as well, from the first step on: there is no transformer yet whose future tokens
could, and what an encoder has learned from actions alone, video without actions no longer changes.
"""

import math
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dreamgen.engine.state import begin_with, holds
from dreamgen.policies.body import BodyMLP
from dreamgen.policies.flow import mean_error

FOLDER = "regression"  # of these steps, in that of the run


class Regression(nn.Module):
    """Shares all that leads to the plan of `policy`, and its normalisers; a readout of each body, thrown away
    afterwards, says the chunk, and with FLARE another one, `foresee`, what its tokens are to be.

    Raises ValueError for a policy whose encoder does not summarise the observation.
    """

    def __init__(self, policy: Any) -> None:
        super().__init__()
        if policy.direct is None:
            raise ValueError("regression_steps needs an encoder that summarises the observation, such as "
                             "dreamgen.policies.palette.PaletteEncoder; set stage.regression_steps=0")  # fmt: skip
        self.encoder, self.encode_state, self.direct = policy.encoder, policy.encode_state, policy.direct
        self.unknown_state, self.position = policy.unknown_state, policy.position
        self.normalise_state, self.normalise_action = policy.normalise_state, policy.normalise_action
        self.other_normalisers = policy.other_normalisers
        width = policy.position.shape[1]
        self.readout = BodyMLP(len(policy.bodies), width, width, policy.spaces.action_dim)
        self.flare, self.foresee = policy.flare, None
        if self.flare:
            size = len(self.flare.tokens), policy.encoder.width
            self.foresee = nn.Sequential(nn.Flatten(), nn.Linear(policy.position.numel(), 2 * width), nn.SiLU(),
                                         nn.Linear(2 * width, math.prod(size)), nn.Unflatten(1, size))  # fmt: skip
        object.__setattr__(self, "policy", policy)  # its other weights are not this module's

    def train(self, mode: bool = True) -> "Regression":
        """As of any module; the policy learns, and hides states, when this does."""
        self.policy.training = mode
        return super().train(mode)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean of w |readout(plan) - x|^2 over the steps that exist, plus align_weight times FLARE's; batch: see
        `FlowPolicy`."""
        policy, body, batch = self.policy, batch["body"], self.policy.whole(batch)
        tokens, _, state, x, valid = policy.given(batch)
        entries = policy.spaces.entries(body, x.device)
        plan = policy.plan(tokens, state)
        error = (self.readout(plan, body).float() - x).square()
        loss = mean_error(error, batch["weight"] * valid, entries, batch["row_weight"])
        if self.flare is None or self.foresee is None:
            return loss, {"regression": loss}
        align = self.flare.loss(self.foresee(plan), self.flare.aim(batch), batch["future_known"], batch["row_known"])
        return loss + policy.align_weight * align, {"regression": loss, "align": align}

    def after_step(self) -> None:
        """As of the policy: FLARE's targets follow."""
        self.policy.after_step()


def begin(policy: nn.Module, out: Path) -> None:
    """Give `policy` the weights and normalisers of a policy, or of the run in `out` (see `begin_with`): of one that was
    still at its regression, those that lead to the plan. ValueError where they are another policy's."""
    first = Path(out) / FOLDER
    if holds(out) or not holds(first):
        begin_with(policy, out)
        return
    begin_with(policy if policy.direct is None else Regression(policy), first)
