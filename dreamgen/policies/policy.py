"""Flow-matching action chunks in the style of GR00T N1.

Vision-language tokens of an observation are the context of a diffusion transformer over
`[state | future tokens | noisy chunk]`, which predicts the velocity `u = x - noise` of the chunk x, (H, a), at flow
time t. The loss is the mean of w |v - u|^2 over the steps that exist; acting integrates v in K Euler steps. State and
actions enter and leave through weights of each body (the real robot, its dreams). An unknown state is a learned token.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from dreamgen.core.clip import Observation
from dreamgen.core.embodiment import Embodiment
from dreamgen.data.normaliser import Normaliser
from dreamgen.policies import augment, checkpoint, realtime
from dreamgen.policies.body import ActionEncoder, BodyMLP
from dreamgen.policies.dit import DiT, KeyValue, repeat_context
from dreamgen.policies.encoder import TinyEncoder
from dreamgen.policies.flare import queries_and_flare
from dreamgen.policies.flow import interpolate, mean_error, sample_time, weighed
from dreamgen.policies.inference import compiled, see
from dreamgen.policies.sight import Seen, look, require_same_views, tensors
from dreamgen.policies.space import Space, Spaces

Batch = dict[str, Tensor]


class FlowPolicy(nn.Module):
    """A batch, made by `dreamgen.policies.chunks`, holds

    pictures (b v h w 3) uint8, or their features by a frozen encoder (b n c), words (b l) int64, state (b d) float32 in
    units, state_known (b) bool, entries_known (b d) bool, body (b) int64,
    action (b H a) float32 in units, valid (b H) bool: steps that exist, weight (b H) float32;
    with FLARE also future (b v h w 3) uint8, or features, and future_known (b) bool; a part also knows of its `whole`.

    horizon: H, robot steps in a chunk. euler_steps: K. draws: noise draws that share one encoded observation in
    training. cumulative: a chunk says where its delta parts lead, summed from its first step, instead of single
    displacements: small errors then do not add up on the way; frame: see `dreamgen.policies.space`. bodies: names of
    the embodiments; `act` speaks for the first, or for `speaks`. robots: of the bodies that are another embodiment than
    `robot`, such as a latent action space; they share its cameras, and narrower actions are padded. prefix: in training
    up to so many first steps of a chunk are given, clean, for real-time chunking. compile: mode of torch.compile for
    acting. state_dropout: share of training rows whose state is hidden. shift, jitter: see `dreamgen.policies.augment`.
    queries: of a Q-Former, whose outputs the actions attend to beside the tokens. future_tokens, align_weight,
    align_layer, align_horizon, target, target_decay: FLARE's M, lambda, k, how many robot steps ahead it looks (None:
    H) and targets; target "qformer" brings a Q-Former with M queries. With align_weight 0 FLARE is off and leaves no
    trace in the model.

    Raises ValueError for a layer or a body that is not there, cameras that differ between bodies, other than M queries
    where FLARE's targets are theirs.
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
        robots: Mapping[str, Embodiment | dict] | None = None,
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
        target: str = "ema",
        target_decay: float = 0.995,
    ) -> None:
        super().__init__()
        others = {name: other if isinstance(other, Embodiment) else Embodiment.from_contract(other)
                  for name, other in (robots or {}).items()}  # fmt: skip
        self.config = dict(horizon=horizon, layers=layers, heads=heads, head_width=head_width, out_width=out_width,
                           euler_steps=euler_steps, draws=draws, cumulative=cumulative, activation=activation,
                           frame=frame, bodies=list(bodies), robots={n: r.contract() for n, r in others.items()},
                           speaks=speaks, prefix=prefix, compile=compile, state_dropout=state_dropout, shift=shift,
                           jitter=jitter, queries=queries, future_tokens=future_tokens, align_weight=align_weight,
                           align_layer=align_layer, align_horizon=align_horizon, target=target,
                           target_decay=target_decay)  # fmt: skip
        if align_weight and not 1 <= align_layer <= layers:
            raise ValueError(f"align_layer is {align_layer}; expected 1 to {layers}, the layers of the transformer")
        if not 0 <= prefix < horizon or (align_horizon is not None and align_horizon < 1):
            raise ValueError(f"prefix is {prefix}, align_horizon {align_horizon}; expected 0 to {horizon - 1}, for "
                             f"something of a chunk must be left, and null or 1 or more")  # fmt: skip
        self.robot, self.horizon, self.euler_steps, self.draws, self.prefix = robot, horizon, euler_steps, draws, prefix
        self.bodies, self.state_dropout, self.shift, self.jitter = list(bodies), state_dropout, shift, jitter
        self.align_weight, self.align_layer, self.compiling = align_weight, align_layer, compile
        self.encoder = encoder if encoder is not None else TinyEncoder()
        if hasattr(self.encoder, "look_at"):
            self.encoder.look_at(len(robot.views))
        told = dict(horizon=horizon, cumulative=cumulative, frame=frame)
        self.normalise_state = Normaliser(robot.state_dim)
        self.normalise_action = Normaliser(horizon * robot.action_dim)
        self.space = Space(robot, **told, state=self.normalise_state, action=self.normalise_action)
        spaces, self.other_normalisers = {}, nn.ModuleDict()
        for name, other in others.items():
            require_same_views(name, other, robot)
            made = {"state": Normaliser(other.state_dim), "action": Normaliser(horizon * other.action_dim)}
            self.other_normalisers[name] = nn.ModuleDict(made)
            spaces[self.body(name)] = Space(other, **told, **made)
        self.spaces = Spaces(self.space, spaces)
        self.speaks = 0 if speaks is None else self.body(speaks)
        if self.speaks in spaces:
            raise ValueError(f"speaks is '{speaks}', which is another embodiment than '{robot.name}'; a policy acts "
                             f"for bodies of its own robot")  # fmt: skip
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
                                                     target=target, decay=target_decay)  # fmt: skip
        self.future_steps = (align_horizon or horizon) if self.flare else None

    def fit(self, state: Float32[np.ndarray, "n d"], action: Float32[np.ndarray, "m h a"],
            pictures: UInt8[np.ndarray, "p v y x 3"] | None = None, *, start: Float32[np.ndarray, "m d"] | None = None,
            body: int = 0) -> None:  # fmt: skip
        """Statistics of a body from recorded rows and whole chunks, in units, with the states at which these start
        (see `Space.fit`). An encoder that is fitted to pictures takes what it needs from some."""
        if pictures is not None and hasattr(self.encoder, "fit"):
            for encoder in [self.encoder, *([self.flare.target] if self.flare else [])]:
                encoder.fit(torch.from_numpy(pictures))
        self.spaces.of(body).fit(state, action, start)

    def state_token(
        self, state: Float[Tensor, "b d"], known: Bool[Tensor, " b"], body: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b 1 w"]:
        """Encoded state, or the learned token where it is not known (what stands in `state` there is never read)."""
        if not self.spaces.state_dim:
            return self.unknown_state.expand(len(body), 1, -1)
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
        body: Int64[Tensor, " b"],
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
        entries = self.spaces.entries(body, len(self.bodies))
        velocity = velocity if entries is None else velocity * entries
        return velocity, None if tapped is None else tapped[:, 1 : -self.horizon]

    def encode(self, pictures: Tensor, words: Tensor) -> Float[Tensor, "b n c"]:
        """Vision-language tokens of pictures (uint8), or of their features by a frozen encoder, queried."""
        return self.queried(torch.cat(look(self.encoder, pictures, words), 1))

    def queried(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b m c"]:
        """The tokens of an observation, and behind them what a Q-Former asks of them."""
        return tokens if self.queries is None else torch.cat([tokens, self.queries(tokens)], 1)

    def plan(self, tokens: Float[Tensor, "b n c"], state: Float[Tensor, "b 1 w"]) -> Float[Tensor, "b h w"]:
        """What is known of each step of the chunk before its noise: its place and, where the encoder begins with tokens
        that summarise the observation, what a plain regression from these and the state would say, which is learned
        first."""
        if self.direct is None:
            return self.position.expand(len(tokens), -1, -1)
        known = torch.cat([tokens[:, : self.summary].flatten(1), state.flatten(1)], 1)
        return self.position + self.direct(known).unflatten(1, self.position.shape)

    def given(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a batch gives to learn from: tokens of the observations (b n c), not queried, of their states (b 1 w),
        some hidden in training, the chunks as the transformer sees them (b H a), 0 where no step is, and which are."""
        pictures, state_known, body, valid = batch["pictures"], batch["state_known"], batch["body"], self.steps(batch)
        known, told = self.spaces.widen(batch["state"], batch["action"])
        if self.training:
            if pictures.dtype == torch.uint8:
                pictures = augment.jitter(augment.shift(pictures, self.shift), self.jitter)
            state_known = state_known & (torch.rand(len(body), device=body.device) >= self.state_dropout)
        tokens = torch.cat(look(self.encoder, pictures, batch["words"]), 1)
        state = self.state_token(known, state_known, body)
        action = self.spaces.chunk(told, known, body)
        return tokens, state, torch.where(valid[..., None], action, torch.zeros_like(action)), valid

    def steps(self, batch: Batch) -> Bool[Tensor, "b h"]:
        """The steps of chunks that can be learned from: those that exist, of chunks that can be told."""
        return batch["valid"] & self.spaces.tellable(batch["entries_known"], batch["body"])[:, None]

    def whole(self, batch: Batch) -> Batch:
        """The batch of a step with what a row of it weighs on average (see `mean_error`), which its parts keep."""
        return batch if "row_weight" in batch else weighed(batch, self.steps(batch))

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Flow-matching loss, plus align_weight times FLARE's."""
        batch = self.whole(batch)
        tokens, state, x, valid = self.given(batch)
        context = repeat_context(self.dit.context(self.queried(tokens)), self.draws)
        state, plan, x, body, valid, weight = (
            y.repeat_interleave(self.draws, 0)
            for y in (state, self.plan(tokens, state), x, batch["body"], valid, batch["weight"])
        )
        entries = self.spaces.entries(body, len(self.bodies))
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
        future = self.flare.embed(batch["future"], batch["words"]).repeat_interleave(self.draws, 0)
        known = batch["future_known"].repeat_interleave(self.draws, 0)
        align = self.flare.loss(tapped, future, known, batch["row_known"])
        return flow + self.align_weight * align, {"flow": flow, "align": align}

    def after_step(self) -> None:
        """After a step of the optimiser: FLARE's targets follow, once, however many processes the step had."""
        if self.flare:
            self.flare.follow(self.encoder, self.queries)

    def inputs(self, observations: Sequence[Observation]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Pictures, words, states, which of these are known (one that holds NaN is not), bodies. Errors: `observe`."""
        device = self.position.device
        pictures, states = (x.to(device) for x in tensors(self.robot, observations))
        known, body = states.isfinite().all(1), torch.full((len(states),), self.speaks, device=device)
        if not self.space.tellable(states.isfinite()).all():
            raise ValueError("the state of an observation is unknown (NaN), and this policy's chunks are told relative "
                             "to it; give the state, or train with frame=recorded")  # fmt: skip
        words = self.encoder.words([o.instruction for o in observations]).to(device)
        return pictures, words, F.pad(states, (0, self.spaces.state_dim - states.shape[1])), known, body

    @torch.no_grad()
    def observe(self, observations: Sequence[Observation]) -> Seen:
        """Encode observations once.

        Raises ValueError for an observation that lacks a view, whose view or state has another shape, or whose state
        is unknown where chunks are told relative to it.
        """
        inputs = self.inputs(observations)
        context, plan, state = see(self, *inputs)
        return Seen(context=context, plan=plan, state=state, states=inputs[2], body=inputs[4])

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
        """The policy saved at `path`, strictly; ValueError names what differs from `robot` where one is given, and a
        body that it has not. changes: how it acts (speaks, compile, euler_steps)."""
        return checkpoint.load(cls, path, robot=robot, **changes)
