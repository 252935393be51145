"""Flow-matching action chunks in the style of GR00T N1.

Vision-language tokens of an observation are the context of a diffusion transformer over
`[state | future tokens | noisy chunk]`, which predicts the velocity `u = x - noise` of the chunk x, (H, a), at flow
time t. The loss is the mean of w |v - u|^2 over the steps that exist; acting integrates v in K Euler steps. State and
actions enter and leave through weights of each body (a robot, its dreams, another robot). An unknown state is a learned
token.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, UInt8
from torch import Tensor, nn

from dreamgen.core.embodiment import Embodiment
from dreamgen.data.normaliser import Normaliser
from dreamgen.policies import augment, checkpoint
from dreamgen.policies.acting import Acting
from dreamgen.policies.body import ActionEncoder, BodyMLP
from dreamgen.policies.dit import DiT, KeyValue, repeat_context
from dreamgen.policies.encoder import TinyEncoder
from dreamgen.policies.flare import queries_and_flare
from dreamgen.policies.flow import interpolate, mean_error, sample_time, weighed
from dreamgen.policies.sight import tokens_of
from dreamgen.policies.space import Space
from dreamgen.policies.spaces import Robots, Spaces, owner, require_one_size

Batch = dict[str, Tensor]


class FlowPolicy(Acting):
    """A batch, made by `dreamgen.policies.chunks`, holds

    pictures (b v h w 3) uint8, or their features by a frozen encoder (b n c), words (b l) int64, state (b d) float32 in
    units, state_known (b) bool, entries_known (b d) bool, body (b) int64,
    action (b H a) float32 in units, valid (b H) bool: steps that exist, weight (b H) float32;
    with FLARE also future (b v h w 3) uint8, or features, and future_known (b) bool; a part also knows of its `whole`.
    Where some rows have fewer views, or features, than others, seen (b) int64 says how many; the rest is padding.

    robot: its own, to which the bodies belong that `robots` does not name. horizon: H, robot steps in a chunk.
    euler_steps: K. draws: noise draws that share one encoded observation in training. cumulative: a chunk says where
    its delta parts lead, summed from its first step, instead of single displacements: small errors then do not add up
    on the way; frame: see `dreamgen.policies.space`. bodies: names of the embodiments; `act` speaks for the first, or
    for `speaks`, and acts for the robot to which that belongs. robots: of the bodies that belong to another robot, or
    are a latent action space: an embodiment, or the name of another body of the same (see `dreamgen.policies.spaces`).
    Their views, all of one size, are taken in order, however many and whatever their names; a chunk has H steps of each
    robot, at its own rate. prefix: in training up to so many first steps of a chunk are given, clean, for real-time
    chunking. compile: mode of torch.compile for acting. state_dropout: share of training rows whose state is hidden.
    shift, jitter: see `dreamgen.policies.augment`. queries: of a Q-Former, whose outputs the actions attend to beside
    the tokens. future_tokens, align_weight, align_layer, align_horizon, align_to, target, target_decay: FLARE's M,
    lambda, k, how many robot steps ahead it looks (None: H) and targets (see `dreamgen.policies.flare`); target
    "qformer" brings a Q-Former with M queries. With align_weight 0 FLARE is off and leaves no trace in the model.

    Raises ValueError for a layer or a body that is not there, no Euler step, no draw, pictures of several sizes, other
    than M queries where FLARE's targets are theirs.
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
        frame: str = "recorded",
        bodies: Sequence[str] = ("real", "dream"),
        robots: Robots | None = None,
        speaks: str | None = None,
        prefix: int = 0,
        compile: str | None = None,
        state_dropout: float = 0.1,
        shift: int = 0,
        jitter: float = 0.0,
        queries: int = 0,
        future_tokens: int = 32,
        align_weight: float = 0.0,
        align_layer: int = 3,
        align_horizon: int | None = None,
        align_to: str = "change",
        target: str = "ema",
        target_decay: float = 0.995,
    ) -> None:
        super().__init__()
        others = {name: Embodiment.from_contract(other) if isinstance(other, dict) else other
                  for name, other in (robots or {}).items()}  # fmt: skip
        named = {name: other if isinstance(other, str) else other.contract() for name, other in others.items()}
        self.config = dict(horizon=horizon, layers=layers, heads=heads, head_width=head_width, out_width=out_width,
                           euler_steps=euler_steps, draws=draws, cumulative=cumulative, activation=activation,
                           frame=frame, bodies=list(bodies), robots=named, speaks=speaks, prefix=prefix,
                           compile=compile, state_dropout=state_dropout, shift=shift, jitter=jitter, queries=queries,
                           future_tokens=future_tokens, align_weight=align_weight, align_layer=align_layer,
                           align_horizon=align_horizon, align_to=align_to, target=target,
                           target_decay=target_decay)  # fmt: skip
        if euler_steps < 1 or draws < 1:
            raise ValueError(f"euler_steps is {euler_steps}, draws {draws}; expected 1 or more: the policy would act "
                             "by noise alone, or learn from none")  # fmt: skip
        if align_weight and not 1 <= align_layer <= layers:
            raise ValueError(f"align_layer is {align_layer}; expected 1 to {layers}, the layers of the transformer")
        if not 0 <= prefix < horizon or (align_horizon is not None and align_horizon < 1):
            raise ValueError(f"prefix is {prefix}, align_horizon {align_horizon}; expected 0 to {horizon - 1}, for "
                             f"something of a chunk must be left, and null or 1 or more")  # fmt: skip
        self.own, self.horizon, self.euler_steps, self.draws, self.prefix = robot, horizon, euler_steps, draws, prefix
        self.bodies, self.state_dropout, self.shift, self.jitter = list(bodies), state_dropout, shift, jitter
        self.align_weight, self.align_layer, self.compiling = align_weight, align_layer, compile
        self.encoder = encoder if encoder is not None else TinyEncoder()
        told = dict(horizon=horizon, cumulative=cumulative, frame=frame)
        self.normalise_state = Normaliser(robot.state_dim)
        self.normalise_action = Normaliser(horizon * robot.action_dim)
        spaces = {None: Space(robot, **told, state=self.normalise_state, action=self.normalise_action)}
        self.other_normalisers = nn.ModuleDict()
        for name, other in others.items():
            self.body(name)
            if not isinstance(other, str):
                require_one_size(name, other, robot)
                made = {"state": Normaliser(other.state_dim), "action": Normaliser(horizon * other.action_dim)}
                self.other_normalisers[name] = nn.ModuleDict(made)
                spaces[name] = Space(other, **told, **made)
        self.spaces = Spaces([spaces[owner(name, others)] for name in self.bodies])
        self.speaks = 0 if speaks is None else self.body(speaks)
        if hasattr(self.encoder, "look_at"):
            self.encoder.look_at(max(len(space.robot.views) for space in self.spaces.each))
        width, out_width, count = heads * head_width, out_width or heads * head_width, len(bodies)
        self.dit = DiT(layers=layers, heads=heads, head_width=head_width, context_width=self.encoder.width,
                       out_width=out_width, activation=activation)  # fmt: skip
        self.encode_state = BodyMLP(count, max(1, self.spaces.state_dim), width, width)
        self.unknown_state = nn.Parameter(0.02 * torch.randn(width))
        self.encode_action = ActionEncoder(count, self.spaces.action_dim, width)
        self.decode_action = BodyMLP(count, out_width, out_width, self.spaces.action_dim)
        self.position = nn.Parameter(0.02 * torch.randn(horizon, width))
        self.summary, self.direct = getattr(self.encoder, "summary", 0), None
        if self.summary:
            self.direct = nn.Sequential(nn.Linear(self.summary * self.encoder.width + width, 2 * width), nn.SiLU(),
                                        nn.Linear(2 * width, horizon * width))  # fmt: skip
        self.queries, self.flare = queries_and_flare(self.encoder, width, queries, align_weight, tokens=future_tokens,
                                                     target=target, decay=target_decay, align_to=align_to)  # fmt: skip
        self.future_steps = (align_horizon or horizon) if self.flare else None

    def fit(self, state: Float32[np.ndarray, "n d"], action: Float32[np.ndarray, "m h a"], *,
            start: Float32[np.ndarray, "m d"] | None = None, body: int = 0,
            others: tuple[np.ndarray, np.ndarray | None] | None = None) -> None:  # fmt: skip
        """Statistics of a body's robot from recorded rows and whole chunks, in units, with the states at which these
        start (see `Space.fit`)."""
        self.spaces.of(body).fit(state, action, start, others=others)

    def fit_encoder(self, *pictures: UInt8[np.ndarray, "_ _ _ _ 3"]) -> None:
        """An encoder that is fitted to pictures takes what it needs from some (p v y x 3), of each number of views."""
        for encoder in [self.encoder, *([self.flare.target] if self.flare else [])]:
            encoder.fit(*map(torch.from_numpy, pictures))

    def state_token(
        self, state: Float[Tensor, "b d"], known: Bool[Tensor, " b"], body: Int64[Tensor, " b"] | int
    ) -> Float[Tensor, "b 1 w"]:
        """Encoded state, or the learned token where it is not known (what stands in `state` there is never read)."""
        if not self.spaces.state_dim:
            return self.unknown_state.expand(len(known), 1, -1)
        x = torch.where(known[:, None], state, torch.zeros_like(state))
        token = self.encode_state(self.spaces.states(x, body)[:, None], body)
        return torch.where(known[:, None, None], token, self.unknown_state.to(token.dtype))

    def velocity(
        self,
        x_t: Float[Tensor, "b h a"],
        t: Float[Tensor, " b"],
        state: Float[Tensor, "b 1 w"],
        plan: Float[Tensor, "b h w"],
        context: list[KeyValue | None],
        body: Int64[Tensor, " b"] | int,
        valid: Bool[Tensor, "b h"] | None = None,
        clean: Bool[Tensor, "b h"] | None = None,
    ) -> tuple[Float[Tensor, "b h a"], Float[Tensor, "b m w"] | None]:
        """The velocity of a noisy chunk and, with FLARE, the activations of the future tokens. clean: steps that are
        given, at time 1."""
        times = t if clean is None else torch.where(clean, torch.ones_like(t)[:, None], t[:, None])
        chunk = self.encode_action(x_t, times, body) + plan
        sequence = [state, chunk]
        if self.flare:
            sequence.insert(1, self.flare.tokens.expand(len(chunk), -1, -1))
        x = torch.cat(sequence, 1)
        if valid is not None:
            valid = torch.cat([valid.new_ones(len(x), x.shape[1] - self.horizon), valid], 1)
        y, tapped = self.dit(x, t, context, valid=valid, tap=self.align_layer if self.flare else None)
        velocity = self.decode_action(y[:, -self.horizon :], body).float()
        entries = self.spaces.entries(body, x_t.device)
        velocity = velocity if entries is None else velocity * entries
        return velocity, None if tapped is None else tapped[:, 1 : -self.horizon]

    def encode(self, pictures: Tensor, words: Tensor) -> Float[Tensor, "b n c"]:
        """Vision-language tokens of pictures (uint8), or of their features by a frozen encoder, queried."""
        return self.queried(*tokens_of(self.encoder, pictures, words))[0]

    def queried(
        self, tokens: Float[Tensor, "b n c"], there: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b m c"], Bool[Tensor, "b m"] | None]:
        """The tokens of an observation, and behind them what a Q-Former asks of them; which are there, None: all."""
        if self.queries is None:
            return tokens, there
        asked = self.queries(tokens, there)
        there = None if there is None else torch.cat([there, there.new_ones(asked.shape[:2])], 1)
        return torch.cat([tokens, asked], 1), there

    def plan(self, tokens: Float[Tensor, "b n c"], state: Float[Tensor, "b 1 w"]) -> Float[Tensor, "b h w"]:
        """What is known of each step of the chunk before its noise: its place and, where the encoder begins with tokens
        that summarise the observation, what a plain regression from these and the state would say, which is learned
        first."""
        if self.direct is None:
            return self.position.expand(len(tokens), -1, -1)
        known = torch.cat([tokens[:, : self.summary].flatten(1), state.flatten(1)], 1)
        return self.position + self.direct(known).unflatten(1, self.position.shape)

    def given(self, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
        """What a batch gives to learn from: tokens of the observations (b n c), not queried, and which of them are
        there, None: all; of their states (b 1 w), some hidden in training; the chunks as the transformer sees them
        (b H a), 0 where no step is, and which are."""
        pictures, state_known, body, valid = batch["pictures"], batch["state_known"], batch["body"], self.steps(batch)
        known, told = self.spaces.widen(batch["state"], batch["action"])
        if self.training:
            if pictures.dtype == torch.uint8:
                pictures = augment.jitter(augment.shift(pictures, self.shift), self.jitter)
            state_known = state_known & (torch.rand(len(body), device=body.device) >= self.state_dropout)
        tokens, there = tokens_of(self.encoder, pictures, batch["words"], batch.get("seen"))
        state = self.state_token(known, state_known, body)
        action = self.spaces.chunk(told, known, body)
        return tokens, there, state, torch.where(valid[..., None], action, torch.zeros_like(action)), valid

    def steps(self, batch: Batch) -> Bool[Tensor, "b h"]:
        """The steps of chunks that can be learned from: those that exist, of chunks that can be told."""
        return batch["valid"] & self.spaces.tellable(batch["entries_known"], batch["body"])[:, None]

    def whole(self, batch: Batch) -> Batch:
        """The batch of a step with what a row of it weighs on average (see `mean_error`), which its parts keep."""
        return batch if "row_weight" in batch else weighed(batch, self.steps(batch))

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Flow-matching loss, plus align_weight times FLARE's."""
        batch = self.whole(batch)
        tokens, there, state, x, valid = self.given(batch)
        context = repeat_context(self.dit.context(*self.queried(tokens, there)), self.draws)
        state, plan, x, body, valid, weight = (
            y.repeat_interleave(self.draws, 0)
            for y in (state, self.plan(tokens, state), x, batch["body"], valid, batch["weight"])
        )
        entries = self.spaces.entries(body, x.device)
        noise, t = torch.randn_like(x), sample_time(len(x), like=x)
        noise = noise if entries is None else noise * entries
        x_t, clean, weight = interpolate(x, noise, t), None, weight * valid
        if self.training and self.prefix:
            length = torch.randint(0, self.prefix + 1, (len(x), 1), device=x.device)
            clean = (torch.arange(self.horizon, device=x.device) < length) & valid
            x_t, weight = torch.where(clean[..., None], x, x_t), weight * ~clean
        velocity, tapped = self.velocity(x_t, t, state, plan, context, body, valid, clean)
        flow = mean_error((velocity - (x - noise)).square(), weight, entries, batch["row_weight"])
        if not self.flare:
            return flow, {"flow": flow}
        aim, known = (y.repeat_interleave(self.draws, 0) for y in (self.flare.aim(batch), batch["future_known"]))
        align = self.flare.loss(self.flare.project(tapped), aim, known, batch["row_known"])
        return flow + self.align_weight * align, {"flow": flow, "align": align}

    def after_step(self) -> None:
        """After a step of the optimiser: FLARE's targets follow, once, however many processes the step had."""
        if self.flare:
            self.flare.follow(self.encoder, self.queries)

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
    def load(cls, path: Path | str, *, robot: Embodiment | None = None, **changes: object) -> "FlowPolicy":
        """The policy saved at `path`, strictly, to act for `robot`: for the first of its bodies, where the one it was
        saved to speak for is another robot's. ValueError names what differs from `robot`, which robots it knows, and a
        body that it has not. changes: how it acts (speaks, compile, euler_steps)."""
        return checkpoint.load(cls, path, robot=robot, **changes)
