"""A world model that actions move: any of the image-conditioned families, extended from outside.

Where no actions are given, a world model whose own weights the training left alone dreams as before. With them, each
latent frame knows the robot steps that it shows (`action_frames`), and the frames of an episode's past: its first one
(anchor) and a sparse history, with noise whose level is an input (arXiv:2408.14837, arXiv:2407.01392). `imagine` goes
on from any past, so episodes of any length are rolled out in chunks, batched over episodes.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dreamgen.core.clip import Clip, Past, Prompt
from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment
from dreamgen.core.kinematics import within
from dreamgen.core.manifest import read_json, write_json
from dreamgen.core.seeding import seed_for, torch_rng_for
from dreamgen.worlds.action_frames import latent_actions, pose_maps
from dreamgen.worlds.action_hooks import ActionExtension, Given, Hooks, require_extendable
from dreamgen.worlds.rollout import follow_prompts, frame_rows, rollout
from dreamgen.worlds.stored import name_of, named

FILE, WEIGHTS = "action_world.json", "actions.safetensors"


class ActionWorld(nn.Module):
    """world: the world model that is extended. width: of the action encoder. maps: draw pose maps as well.

    history: ages (s) of remembered frames, oldest first, beside the first frame of the episode (`anchor`).
    level: of the noise on remembered and first frames when dreaming, in [0, 1]; context_noise: the highest in training.
    action_guidance: 1 takes one pass. action_dropout: share of training rows without actions. instructions: whether the
    instruction conditions what actions move; a model that reads it tends to fulfil it, whatever the robot does.
    tool_weight: in training an error where the maps draw a tool counts 1 + tool_weight times, so that what it touches
    is not lost in the background. Actions alone say where that is, so the model's mean stays what it was.

    Raises ValueError: a transformer that cannot be hooked; maps for an embodiment without cameras or tools; tool_weight
    without maps; a step cache under action guidance; a world model of several windows, since a chunk is one; a level,
    context_noise or action_dropout beyond 0 to 1; ages of the history that are not above 0.
    """

    def __init__(
        self,
        *,
        world: nn.Module,
        width: int = 128,
        maps: bool = False,
        anchor: bool = True,
        history: Sequence[float | int] = (0.4,),
        level: float = 0.0,
        context_noise: float = 0.2,
        action_guidance: float = 1.0,
        action_dropout: float = 0.1,
        instructions: bool = True,
        tool_weight: float = 0.0,
    ) -> None:
        super().__init__()
        require_extendable(world, action_guidance)
        world.chunked = True
        self.world, self.width, self.maps, self.anchor = world, width, maps, anchor
        self.history = tuple(sorted((float(age) for age in history), reverse=True))
        self.level, self.context_noise = level, context_noise
        self.action_guidance, self.action_dropout = action_guidance, action_dropout
        self.instructions, self.tool_weight = instructions, tool_weight
        for name in ("level", "context_noise", "action_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a number from 0 to 1")
        if any(age <= 0 for age in self.history):
            raise ValueError(f"history is {list(history)}; expected ages in s, above 0")
        if tool_weight < 0 or (tool_weight and not maps):
            raise ValueError(f"tool_weight is {tool_weight}, maps is {maps}; expected 0 or more, and maps=true, which "
                             "draw where the tools are")  # fmt: skip
        self.gaps = (self.clock.frames - 1) // (world.latent_shape[1] - 1)
        tools = len(self.robot.tools)
        if maps:  # says what is missing
            still = np.zeros((self.gaps, self.robot.action_dim), np.float32)
            pose_maps(self.robot, np.arange(self.gaps + 1), still, np.zeros(self.robot.state_dim, np.float32),
                      size=self.latent_size, gaps=self.gaps)  # fmt: skip
        self.extension = ActionExtension(
            world.transformer, features=self.gaps * self.robot.action_dim, width=width,
            channels=2 * tools * self.gaps if maps else 0,
        )  # fmt: skip
        experts = [m for m in world.modules() if type(m) is type(world.transformer)]  # A14B has two
        self.hooks = [Hooks(expert, self.extension, latents=world.latent_shape[0]) for expert in experts]
        self.moved = False  # whether the world model's own weights were trained under actions
        self.requires_grad_(False).eval()

    @property
    def robot(self) -> Embodiment:
        return self.world.robot

    @property
    def clock(self) -> Clock:
        """Rates and frames of one chunk."""
        return self.world.clock

    @property
    def latent_size(self) -> tuple[int, int]:
        return self.world.latent_shape[2], self.world.latent_shape[3]

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def precision(self) -> str:
        return self.world.precision

    @property
    def remembered(self) -> int:
        """Frames of the past that a chunk sees beside the last one."""
        return int(self.anchor) + len(self.history)

    def place(self, device: torch.device | None = None, *, experts: bool = True) -> "ActionWorld":
        """Move everything, or all but the transformers (without `experts`), to `device`, by default the best."""
        self.world.place(device, experts=experts)
        self.extension.to(self.world.device)
        return self

    def memory_rows(self, now: int) -> list[int]:
        """Frames (video frames since the first) that are remembered at frame `now`; before the first, the first."""
        per_second = float(self.robot.rate / self.clock.stride)
        return [0] * self.anchor + [max(0, now - round(age * per_second)) for age in self.history]

    def cut(self, latents: Tensor, frames: int) -> Tensor:
        return self.world.cut(latents, frames)

    def features(self, rows: np.ndarray, action: np.ndarray, state: np.ndarray | None = None) -> np.ndarray:
        """(lt - 1, f) in units, of the actions of frames at `rows`."""
        return latent_actions(self.robot, rows, action, gaps=self.gaps, state=state)

    def drawn(self, rows: np.ndarray, action: np.ndarray, state: np.ndarray) -> np.ndarray:
        """Pose maps (c lt lh lw)."""
        return pose_maps(self.robot, rows, action, state, size=self.latent_size, gaps=self.gaps)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The world's own loss under actions. batch: what it needs, and features (b lt-1 f), and where they are used
        maps (b c lt lh lw), memory (b c m lh lw) and ages (b m). Actions are dropped, and context is noised, at random
        while training; optional present (b,) says which rows have actions. Rows of two experts are taken apart."""
        x = batch["latents"]
        b, live = len(x), self.training
        high = batch["sigma"] >= self.world.boundary if "sigma" in batch else torch.ones(b)
        if 0 < high.sum() < b:  # what a transformer is called with are all rows that `Given` has
            parts = [{key: value[rows] for key, value in batch.items()} for rows in (high, ~high)]
            return torch.stack([len(part["sigma"]) / b * self.loss(part)[0] for part in parts]).sum(), {}
        present = batch.get("present")
        if present is None:
            present = torch.rand(b, device=x.device) >= (self.action_dropout if live else 0.0)
        level = torch.rand(b, device=x.device) * (self.context_noise if live else 0.0)
        m, c = self.remembered, self.world.latent_shape[0]  # further channels are what a family is conditioned on
        noise = torch.randn(b, c, m + 1, *x.shape[3:], device=x.device) if live else None
        given = Given(features=batch["features"], present=present, level=level, maps=batch.get("maps"),
                      memory=batch.get("memory"), ages=batch.get("ages"), noise=noise)  # fmt: skip
        own = {k: v for k, v in batch.items() if k not in ("features", "maps", "memory", "ages", "present")}
        if live and self.tool_weight:
            shown = batch["maps"][:, ::2] * present.view(-1, 1, 1, 1, 1)  # spots alone, of rows that are told
            weight = 1 + self.tool_weight * shown.amax(1, keepdim=True)
            own["weight"] = weight / weight.mean()
        with self._given(given):
            return self.world.loss(own)

    @contextmanager
    def _given(self, given: Given, guidance: float = 1.0) -> Iterator[None]:
        with ExitStack() as stack:
            for hooks in self.hooks:
                stack.enter_context(hooks(given, guidance=guidance))
            yield

    def _context(self, pasts: Sequence[Past]) -> tuple[Tensor | None, Tensor | None]:
        """Latents (b c m lh lw) and ages (b m) of what is remembered."""
        if not self.remembered:
            return None, None
        now = len(pasts[0].video) - 1
        rows = self.memory_rows(now)
        frames = torch.from_numpy(np.stack([past.video[rows] for past in pasts]))
        latents = self.world.encode(frames.flatten(0, 1)[:, None])
        per_second = float(self.robot.rate / self.clock.stride)
        ages = torch.tensor([[(now - row) / per_second for row in rows]] * len(pasts), device=self.device)
        return latents[:, :, 0].unflatten(0, (len(pasts), -1)).transpose(1, 2), ages

    @torch.no_grad()
    def imagine(self, pasts: Sequence[Past], actions: Sequence[Float[np.ndarray, "s a"]]) -> list[np.ndarray]:
        """See `ActionWorldModel.imagine`; longer actions than a chunk's are taken chunk by chunk."""
        return rollout(self._chunk, self.robot, self.clock, pasts, actions, multiple=self.gaps)

    def _chunk(self, pasts: Sequence[Past], actions: Sequence[np.ndarray]) -> list[np.ndarray]:
        """At most one chunk of frames (n h w 3) per past."""
        now = len(pasts[0].video) - 1
        rows = frame_rows(self.clock, now, len(actions[0]), self.gaps)
        for past, action in zip(pasts, actions, strict=True):
            within(self.robot, action, f"actions of '{past.prompt.id}'")
        features = np.stack([self.features(rows, a, p.state) for a, p in zip(actions, pasts, strict=True)])
        maps = None
        if self.maps:
            maps = np.stack([self.drawn(rows, a, p.state) for a, p in zip(actions, pasts, strict=True)])
        return self._window(pasts, rows, features, maps, present=True)

    def _window(self, pasts: Sequence[Past], rows: np.ndarray, features: np.ndarray, maps: np.ndarray | None, *,
                present: bool) -> list[np.ndarray]:  # fmt: skip
        """The frames (n h w 3) of each past at `rows` but the first, under what `Given` says."""
        now = len(pasts[0].video) - 1
        memory, ages = self._context(pasts)
        prompts = [Prompt(id=p.prompt.id, image=np.ascontiguousarray(p.video[-1]),
                          instruction=p.prompt.instruction if self.instructions else "",
                          seed=p.prompt.seed if now == 0 else seed_for(p.prompt.seed, "chunk", now))
                   for p in pasts]  # fmt: skip
        shape = (self.world.latent_shape[0], self.remembered + 1, *self.latent_size)
        noise = [torch.randn(shape, generator=torch_rng_for(p.seed, "context")) for p in prompts]
        given = Given(
            features=torch.from_numpy(features).to(self.device), memory=memory, ages=ages,
            maps=None if maps is None else torch.from_numpy(maps).to(self.device),
            present=torch.full((len(pasts),), present, device=self.device),
            level=torch.full((len(pasts),), self.level, device=self.device),
            noise=torch.stack(noise).to(self.device),
        )  # fmt: skip
        chunk = self.world.clock
        self.world.clock = chunk.with_frames(len(rows))
        try:
            with self._given(given, self.action_guidance if present else 1.0):
                clips = self.world.dream(prompts)
        finally:
            self.world.clock = chunk
        return [clip.video[1:] for clip in clips]

    def dream(self, prompts: Sequence[Prompt]) -> list[Clip]:
        """One clip per prompt, in order: under its actions where it has some, as long as they last. Else one window, as
        the world model would without this extension or, once its own weights were trained with it, with actions
        dropped as in that training."""
        found: dict[int, Clip] = {}
        plain = [i for i, prompt in enumerate(prompts) if not prompt.action.size]
        if plain:
            dream = self._undirected if self.moved else self.world.dream
            found |= dict(zip(plain, dream([prompts[i] for i in plain]), strict=True))
        acting = [i for i, prompt in enumerate(prompts) if prompt.action.size]
        for i, past in zip(acting, follow_prompts(self, [prompts[i] for i in acting]), strict=True):
            found[i] = self._clip(past.prompt, past.video)
        return [found[i] for i in range(len(prompts))]

    def _undirected(self, prompts: Sequence[Prompt]) -> list[Clip]:
        """One window of each prompt with actions dropped."""
        pasts = [Past.begin(prompt, self.robot.action_dim) for prompt in prompts]
        features = np.zeros((len(pasts), self.world.latent_shape[1] - 1, self.gaps * self.robot.action_dim), np.float32)
        with torch.no_grad():
            videos = self._window(pasts, self.clock.rows, features, None, present=False)
        return [self._clip(past.prompt, np.concatenate([past.video, video]))
                for past, video in zip(pasts, videos, strict=True)]  # fmt: skip

    def _clip(self, p: Prompt, video: np.ndarray) -> Clip:
        return Clip(id=p.id, video=video, video_hz=self.clock.video_hz, instruction=p.instruction, seed=p.seed,
                    pair=p.pair, state=p.state, origin=p.origin)  # fmt: skip

    def train_full(self) -> None:
        """Make the transformer and the extension trainable."""
        self.moved = True
        self.world.train_full()
        self.extension.requires_grad_(True)

    def train_lora(self, *, rank: int | None, alpha: int | None) -> None:
        """Train an adapter of the transformer, and the extension."""
        self.moved = True
        self.world.train_lora(rank=rank, alpha=alpha)
        self.extension.requires_grad_(True)

    def train_actions(self) -> None:
        """Train the extension alone. Raises as `VideoWorld.train_full`."""
        self.world.require_plain()
        self.extension.requires_grad_(True)

    def spec(self) -> dict[str, Any]:
        """Constructor arguments as plain JSON, without the world model's."""
        return {"width": self.width, "maps": self.maps, "anchor": self.anchor, "history": list(self.history),
                "level": self.level, "context_noise": self.context_noise, "action_guidance": self.action_guidance,
                "action_dropout": self.action_dropout, "instructions": self.instructions,
                "tool_weight": self.tool_weight}  # fmt: skip

    def save(self, out: Path) -> None:
        """What the world model saves, the extension's weights, and `action_world.json` last."""
        self.world.save(out)
        save_file({k: v.contiguous() for k, v in self.extension.state_dict().items()}, Path(out) / WEIGHTS)
        write_json(Path(out) / FILE, {"spec": self.spec(), "world": name_of(self.world), "moved": self.moved,
                                      "contract": self.robot.contract()})  # fmt: skip

    @classmethod
    def load(cls, path: Path | str, **changed: Any) -> "ActionWorld":
        """What `save` wrote; `changed` overrides its own settings and the world model's, None as it was saved."""
        path, changed = Path(path), {key: value for key, value in changed.items() if value is not None}
        saved = read_json(path / FILE)
        kind = named(saved["world"], path / FILE)
        robot = changed.pop("robot", None) or Embodiment.from_contract(saved["contract"])
        robot.require(saved["contract"], str(path), learned=True)
        mine = {key: changed.pop(key) for key in list(changed) if key in signature(cls).parameters}
        world = kind.load(path, robot=robot, **changed)
        self = cls(world=world, **{**saved["spec"], **mine})
        self.moved, self.folder = saved.get("moved", False), path
        self.extension.load_state_dict(load_file(path / WEIGHTS))
        return self

    def fingerprint(self) -> str:
        """Names the weights that the world model was opened with."""
        return self.world.fingerprint()

    def cache_key(self) -> dict:
        return self.world.cache_key()

    def encode(self, frames: Tensor) -> Tensor:
        return self.world.encode(frames)

    def read(self, instructions: Sequence[str]) -> None:
        self.world.read([*instructions, ""])

    def embed(self, instructions: Sequence[str]) -> Tensor:
        return self.world.embed(instructions)
