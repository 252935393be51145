"""Flow-matching action chunks in the style of GR00T N1.

Vision-language tokens of an observation are the context of a diffusion transformer over
`[state | future tokens | noisy chunk]`, which predicts the velocity `u = x - noise` of the chunk x, (H, a), at flow
time t. The loss is the mean of w |v - u|^2 over the steps that exist; acting integrates v in K Euler steps. State and
actions enter and leave through weights of each body (the real robot, its dreams). An unknown state is a learned token.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor, nn

from dreamgen.core.clip import Observation
from dreamgen.core.embodiment import Embodiment
from dreamgen.data.normaliser import Normaliser
from dreamgen.policies import augment, checkpoint
from dreamgen.policies.body import ActionEncoder, BodyMLP
from dreamgen.policies.dit import DiT, KeyValue, repeat_context
from dreamgen.policies.encoder import TinyEncoder
from dreamgen.policies.flare import Flare
from dreamgen.policies.flow import euler, interpolate, sample_time

Batch = dict[str, Tensor]


class FlowPolicy(nn.Module):
    """A batch, made by `dreamgen.policies.chunks`, holds

    pictures (b v h w 3) uint8, words (b l) int64, state (b d) float32 in units, state_known (b) bool, body (b) int64,
    action (b H a) float32 in units, valid (b H) bool: steps that exist, weight (b H) float32;
    with FLARE also future (b v h w 3) uint8 and future_known (b) bool.

    horizon: H, robot steps in a chunk. euler_steps: K. draws: noise draws that share one encoded observation in
    training. cumulative: a chunk says where its delta parts lead, summed from its first step, instead of single
    displacements: small errors then do not add up on the way. bodies: names of the embodiments; `act` speaks for the
    first. state_dropout: share of training rows whose state is hidden. shift, jitter: see `dreamgen.policies.augment`.
    future_tokens, align_weight, align_layer, target, target_decay: FLARE's M, lambda, k and targets. With
    align_weight 0 FLARE is off and leaves no trace in the model.

    Raises ValueError for a binary action part without limits (open and close would have no value).
    """

    def __init__(
        self,
        *,
        robot: Embodiment,
        encoder: nn.Module | None = None,
        horizon: int = 16,
        layers: int = 4,
        heads: int = 4,
        head_width: int = 32,
        out_width: int | None = None,
        euler_steps: int = 4,
        draws: int = 2,
        cumulative: bool = True,
        activation: str = "gelu-approximate",
        bodies: Sequence[str] = ("real", "dream"),
        state_dropout: float = 0.1,
        shift: int = 0,
        jitter: float = 0.0,
        future_tokens: int = 32,
        align_weight: float = 0.0,
        align_layer: int = 3,
        target: str = "ema",
        target_decay: float = 0.995,
    ) -> None:
        super().__init__()
        self.config = dict(horizon=horizon, layers=layers, heads=heads, head_width=head_width, out_width=out_width,
                           euler_steps=euler_steps, draws=draws, cumulative=cumulative, activation=activation,
                           bodies=list(bodies), state_dropout=state_dropout, shift=shift, jitter=jitter,
                           future_tokens=future_tokens, align_weight=align_weight,
                           align_layer=align_layer, target=target, target_decay=target_decay)  # fmt: skip
        for part in robot.action:
            if part.kind == "binary" and part.limits is None:
                raise ValueError(f"binary action part '{part.name}' of embodiment '{robot.name}' has no limits; give "
                                 f"it the two values of its command, e.g. limits: [-1, 1]")  # fmt: skip
        if align_weight and not 1 <= align_layer <= layers:
            raise ValueError(f"align_layer is {align_layer}; expected 1 to {layers}, the layers of the transformer")
        self.robot, self.horizon, self.euler_steps, self.draws = robot, horizon, euler_steps, draws
        self.cumulative = cumulative
        self.bodies, self.state_dropout, self.shift, self.jitter = list(bodies), state_dropout, shift, jitter
        self.align_weight, self.align_layer = align_weight, align_layer
        self.encoder = encoder if encoder is not None else TinyEncoder()
        self.normalise_state = Normaliser(robot.state_dim)
        self.normalise_action = Normaliser(horizon * robot.action_dim)
        width, out_width, count = heads * head_width, out_width or heads * head_width, len(bodies)
        self.dit = DiT(layers=layers, heads=heads, head_width=head_width, context_width=self.encoder.width,
                       out_width=out_width, activation=activation)  # fmt: skip
        self.encode_state = BodyMLP(count, max(1, robot.state_dim), width, width)
        self.unknown_state = nn.Parameter(0.02 * torch.randn(width))
        self.encode_action = ActionEncoder(count, robot.action_dim, width)
        self.decode_action = BodyMLP(count, out_width, out_width, robot.action_dim)
        self.position = nn.Parameter(0.02 * torch.randn(horizon, width))
        self.flare, self.future_steps = None, None
        if align_weight:
            self.future_steps = horizon
            self.flare = Flare(encoder=self.encoder, tokens=future_tokens, width=width, target=target,
                               decay=target_decay)  # fmt: skip

    def fit(self, state: Float32[np.ndarray, "n d"], action: Float32[np.ndarray, "m h a"]) -> None:
        """Take the normalisers' statistics from recorded rows and whole chunks, in units. Each step of a chunk has its
        own. Rows that hold NaN are left out."""
        if self.robot.state_dim:
            self.normalise_state = Normaliser.fit(state[np.isfinite(state).all(1)], self.robot.state)
        chunks = self._sum(torch.from_numpy(action)).flatten(1).numpy()
        parts = [replace(part, start=part.start + k * self.robot.action_dim, stop=part.stop + k * self.robot.action_dim)
                 for k in range(self.horizon) for part in self.robot.action]  # fmt: skip
        self.normalise_action = Normaliser.fit(chunks, parts)

    def _sum(self, action: Float[Tensor, "b h a"]) -> Float[Tensor, "b h a"]:
        """Steps to where they lead, for delta parts of a cumulative policy."""
        parts = [part for part in self.robot.action if self.cumulative and part.kind == "delta"]
        action = action.clone() if parts else action
        for part in parts:
            action[..., part.slice] = action[..., part.slice].cumsum(1)
        return action

    def chunk(self, action: Float[Tensor, "b h a"]) -> Float[Tensor, "b h a"]:
        """Actions in units to what the transformer works on."""
        return self.normalise_action.normalise(self._sum(action).flatten(1)).view_as(action)

    def unchunk(self, x: Float[Tensor, "b h a"]) -> Float[Tensor, "b h a"]:
        """The inverse of `chunk`."""
        action = self.normalise_action.denormalise(x.flatten(1)).view_as(x)
        for part in self.robot.action:
            if self.cumulative and part.kind == "delta":
                action[:, 1:, part.slice] = action[:, :, part.slice].diff(dim=1)
        return action

    def state_token(
        self, state: Float[Tensor, "b d"], known: Bool[Tensor, " b"], body: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b 1 w"]:
        """Encoded state, or the learned token where it is not known (what stands in `state` there is never read)."""
        if not self.robot.state_dim:
            return self.unknown_state.expand(len(body), 1, -1)
        x = torch.where(known[:, None], state, torch.zeros_like(state))
        token = self.encode_state(self.normalise_state.normalise(x)[:, None], body)
        return torch.where(known[:, None, None], token, self.unknown_state.to(token.dtype))

    def velocity(
        self,
        x_t: Float[Tensor, "b h a"],
        t: Float[Tensor, " b"],
        state: Float[Tensor, "b 1 w"],
        context: list[KeyValue | None],
        body: Int64[Tensor, " b"],
        valid: Bool[Tensor, "b h"] | None = None,
    ) -> tuple[Float[Tensor, "b h a"], Float[Tensor, "b m w"] | None]:
        """The velocity of a noisy chunk and, with FLARE, the activations of the future tokens."""
        chunk = self.encode_action(x_t, t, body) + self.position
        sequence = [state, chunk]
        if self.flare:
            sequence.insert(1, self.flare.tokens.expand(len(chunk), -1, -1))
        x = torch.cat(sequence, 1)
        if valid is not None:
            valid = torch.cat([valid.new_ones(len(x), x.shape[1] - self.horizon), valid], 1)
        y, tapped = self.dit(x, t, context, valid=valid, tap=self.align_layer if self.flare else None)
        velocity = self.decode_action(y[:, -self.horizon :], body).float()
        return velocity, None if tapped is None else tapped[:, 1 : -self.horizon]

    def encode(self, pictures: Tensor, words: Tensor) -> Float[Tensor, "b n c"]:
        """Vision-language tokens."""
        return torch.cat(self.encoder(pictures, words), 1)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Flow-matching loss, plus align_weight times FLARE's."""
        pictures, state_known, body = batch["pictures"], batch["state_known"], batch["body"]
        if self.training:
            pictures = augment.jitter(augment.shift(pictures, self.shift), self.jitter)
            state_known = state_known & (torch.rand(len(body), device=body.device) >= self.state_dropout)
        context = repeat_context(self.dit.context(self.encode(pictures, batch["words"])), self.draws)
        state = self.state_token(batch["state"], state_known, body)
        state, body, valid, weight = (x.repeat_interleave(self.draws, 0)
                                      for x in (state, body, batch["valid"], batch["weight"]))  # fmt: skip
        action = self.chunk(batch["action"]).repeat_interleave(self.draws, 0)
        x = torch.where(valid[..., None], action, torch.zeros_like(action))
        noise, t = torch.randn_like(x), sample_time(len(x), like=x)
        velocity, tapped = self.velocity(interpolate(x, noise, t), t, state, context, body, valid)
        weight = weight * valid
        flow = ((velocity - (x - noise)).square().mean(-1) * weight).sum() / weight.sum().clamp(min=1e-6)
        if not self.flare:
            return flow, {"flow": flow}
        if self.training:
            self.flare.follow(self.encoder)
        future = self.flare.embed(batch["future"], batch["words"]).repeat_interleave(self.draws, 0)
        align = self.flare.loss(tapped, future, batch["future_known"].repeat_interleave(self.draws, 0))
        return flow + self.align_weight * align, {"flow": flow, "align": align}

    @torch.no_grad()
    def act(self, observations: Sequence[Observation], seeds: Sequence[int]) -> Float32[np.ndarray, "b h a"]:
        """Action chunks in units, inside the limits, binary parts at one of their two values. Seed i draws row i's
        noise. A state that holds NaN is unknown.

        Raises ValueError for an observation that lacks a view or whose view or state has another shape.
        """
        device = self.position.device
        pictures = torch.from_numpy(np.stack([self._pictures(o) for o in observations])).to(device)
        states = torch.from_numpy(np.stack([self._state(o) for o in observations])).to(device)
        body = torch.zeros(len(states), dtype=torch.int64, device=device)
        noise = torch.stack([torch.randn(self.horizon, self.robot.action_dim,
                                         generator=torch.Generator().manual_seed(seed)) for seed in seeds])  # fmt: skip
        words = self.encoder.words([o.instruction for o in observations]).to(device)
        context = self.dit.context(self.encode(pictures, words))
        state = self.state_token(states, states.isfinite().all(1), body)
        x = euler(lambda x_t, t: self.velocity(x_t, t, state, context, body)[0], noise.to(device), self.euler_steps)
        return self.command(self.unchunk(x.float()).cpu().numpy())

    def command(self, action: Float32[np.ndarray, "b h a"]) -> Float32[np.ndarray, "b h a"]:
        """Inside the limits; binary entries become the nearer of their two values."""
        action = action.copy()
        for part in self.robot.action:
            if part.limits is not None:
                low, high = part.limits
                entry = action[..., part.slice]
                binary = np.where(entry > (low + high) / 2, high, low)
                action[..., part.slice] = binary if part.kind == "binary" else entry.clip(low, high)
        return action

    def _pictures(self, observation: Observation) -> np.ndarray:
        """(v h w 3) uint8, views in the embodiment's order."""
        found = []
        for view in self.robot.views:
            if view.name not in observation.views:
                raise ValueError(f"the observation lacks view '{view.name}'; it has {sorted(observation.views)}, the "
                                 f"policy was made for {[v.name for v in self.robot.views]}")  # fmt: skip
            picture = np.asarray(observation.views[view.name])
            if picture.shape != (view.height, view.width, 3) or picture.dtype != np.uint8:
                raise ValueError(f"view '{view.name}' of the observation is {picture.shape} {picture.dtype}; expected "
                                 f"({view.height}, {view.width}, 3) uint8: resize it first")  # fmt: skip
            found.append(picture)
        return np.stack(found)

    def _state(self, observation: Observation) -> np.ndarray:
        state = np.asarray(observation.state, np.float32)
        if state.shape != (self.robot.state_dim,):
            raise ValueError(f"the state of the observation has shape {state.shape}; embodiment '{self.robot.name}' "
                             f"has ({self.robot.state_dim},); fill unknown states with NaN")  # fmt: skip
        return state

    def body(self, name: str) -> int:
        """Number of a body; ValueError if the policy has none of this name."""
        if name not in self.bodies:
            raise ValueError(f"the policy has no embodiment '{name}'; it has {self.bodies}: train with "
                             f"bodies that include it, or choose one of these")  # fmt: skip
        return self.bodies.index(name)

    def save(self, path: Path) -> None:
        """config.json, contract.json, model.safetensors (normalisers included)."""
        checkpoint.save(self, path)

    @classmethod
    def load(cls, path: Path | str, *, robot: Embodiment | None = None) -> "FlowPolicy":
        """The policy saved at `path`, strictly; ValueError names what differs from `robot` where one is given."""
        return checkpoint.load(cls, path, robot=robot)
