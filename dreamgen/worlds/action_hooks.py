"""Actions, context and pose maps enter a video transformer from outside, through hooks on its own modules.

Per latent frame an encoder of (actions, are they given, is it context, its noise level, its age) adds to the time
embedding and to its six modulations (AdaLN); pose maps pass a convolution of the patch embedding's shape, which is a
wider patch embedding over concatenated latents and maps. Both end in zeros at first, so the untrained extension equals
the base to the bit. Remembered frames are put before the clip as further latent frames and cut off the output.

The transformer is diffusers' WanTransformer3DModel, in both conditioning families: with a clean prefix (one time per
token: context has the time of its noise level) and with concatenated channels (one time per clip).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from diffusers import WanTransformer3DModel
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dreamgen.data.normaliser import Normaliser

FLAGS = 4  # given, context, level, age


@dataclass(frozen=True, kw_only=True)
class Given:
    """What one call of the transformer is conditioned on, for b rows.

    features (b, lt - 1, f) in units; present (b,): False drops actions and maps; maps (b c lt lh lw); memory (b c m lh
    lw): latents of remembered frames, ages (b m) in s; level (b,) in [0, 1] of the noise (b c m+1 lh lw) on memory and
    first frame: x <- (1 - level) x + level noise.
    """

    features: Float[Tensor, "b lt f"]
    present: Bool[Tensor, " b"]
    level: Float[Tensor, " b"]
    maps: Tensor | None = None
    memory: Tensor | None = None
    ages: Tensor | None = None
    noise: Tensor | None = None

    def repeated(self, times: int) -> "Given":
        """The same for a batch that holds every row `times` times over (guidance)."""
        if times == 1:
            return self
        rows = {k: v.repeat(times, *[1] * (v.ndim - 1)) for k, v in vars(self).items() if v is not None}
        return replace(self, **rows)


def require_extendable(world: nn.Module, action_guidance: float) -> None:
    """Raise ValueError for a world model of several windows, or with a step cache beside action guidance."""
    if world.windows != 1:
        raise ValueError(f"windows is {world.windows}; an action-conditioned world model dreams one window a chunk "
                         "and goes on from it, as long as there are actions: leave windows at 1")  # fmt: skip
    if world.sampler.cache is not None and action_guidance != 1:
        raise ValueError(f"step_cache reuses what was computed last, and action_guidance={action_guidance} makes a "
                         "prediction with the actions and one without in turn, each of which would be given the "
                         "other's; leave out stage.world_model.step_cache or set action_guidance=1")  # fmt: skip


class ActionExtension(nn.Module):
    """features: entries per latent frame; channels: of the pose maps, 0 without; width: of the encoder.

    Raises ValueError for a transformer of another class.
    """

    _no_split_modules = ("Conv3d",)  # `patch_maps` is called by itself, and cut by itself (`dreamgen.engine.processes`)

    def __init__(self, transformer: nn.Module, *, features: int, channels: int = 0, width: int = 128) -> None:
        super().__init__()
        if not isinstance(transformer, WanTransformer3DModel):
            raise ValueError(f"actions can be given to a WanTransformer3DModel (Wan2.1, Wan2.2); this world model has "
                             f"a {type(transformer).__name__}")  # fmt: skip
        self.inner = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        self.normaliser = Normaliser(features)
        self.enter = nn.Linear(features + FLAGS, width)
        self.middle = nn.Linear(width, width)
        self.proj_out = nn.Linear(width, 7 * self.inner)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)
        self.patch_maps = None
        if channels:
            size = tuple(transformer.config.patch_size)
            self.patch_maps = nn.Conv3d(channels, self.inner, size, size, bias=False)
            nn.init.zeros_(self.patch_maps.weight)

    def forward(self, given: Given) -> Float[Tensor, "b mt k"]:
        """Additions (b, m + lt, 7 d) for memory, first frame and the others, in this order."""
        x = self.normaliser.normalise(given.features) * given.present[:, None, None]
        b, later = x.shape[:2]
        m = 0 if given.ages is None else given.ages.shape[1]
        flags = x.new_zeros(b, m + 1 + later, FLAGS)
        flags[:, m + 1 :, 0] = given.present[:, None].to(x.dtype)
        flags[:, : m + 1, 1] = 1
        flags[:, : m + 1, 2] = given.level[:, None]
        if m:
            flags[:, :m, 3] = torch.log1p(given.ages)
        entries = torch.cat([torch.cat([x.new_zeros(b, m + 1, x.shape[2]), x], 1), flags], -1)
        hidden = nn.functional.silu(self.enter(entries))
        return self.proj_out(nn.functional.silu(self.middle(hidden)))


class Hooks:
    """Attach `extension` to `transformer`; `with hooks(given):` conditions every call of it inside the block.

    latents: channels of the latent, of which the transformer's input may hold more (concatenated condition).
    guidance: v <- v_without + guidance * (v_with - v_without) over actions and maps; 1 takes one pass.
    """

    def __init__(self, transformer: WanTransformer3DModel, extension: ActionExtension, *, latents: int) -> None:
        self.extension, self.latents, self.guidance = extension, latents, 1.0
        self.given: Given | None = None
        self.again = False
        self.added: Tensor | None = None  # (b, tokens, 6, d) in the course of a call
        transformer.register_forward_pre_hook(self._before, with_kwargs=True)
        transformer.register_forward_hook(self._after, with_kwargs=True)
        transformer.patch_embedding.register_forward_hook(self._patches)
        transformer.condition_embedder.register_forward_hook(self._times)
        for block in transformer.blocks:
            block.register_forward_pre_hook(self._block)

    @contextmanager
    def __call__(self, given: Given, *, guidance: float = 1.0) -> Iterator[None]:
        before = self.given, self.guidance
        self.given, self.guidance = given, guidance
        try:
            yield
        finally:
            self.given, self.guidance = before
            self.added = None

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        self.added = None
        if self.given is None:
            return args, kwargs
        x, given = kwargs["hidden_states"], self.given
        given = self.now = given.repeated(len(x) // len(given.present))
        if self.again:
            self.now = replace(given, present=torch.zeros_like(given.present))
            self._prepare(module, x.shape)
            return args, kwargs
        kwargs = dict(kwargs)
        time, z = kwargs["timestep"], self.latents
        tokens = self._tokens(module, x.shape)
        level = given.level.view(-1, 1, 1, 1, 1).to(x.dtype)
        noisy = bool((given.level > 0).any())
        if noisy:
            x = x.clone()
            where = x[:, :z, :1] if x.shape[1] == z else x[:, -z:, :1]
            where.copy_((1 - level) * where + level * given.noise[:, :, -1:].to(x.dtype))
        if time.ndim == 2 and noisy:
            time = time.clone()
            time[:, :tokens] = (1000 * given.level).to(time.dtype)[:, None]
        if given.memory is not None:
            past = given.memory.to(x.dtype)
            if noisy:
                past = (1 - level) * past + level * given.noise[:, :, :-1].to(x.dtype)
            rest = x.shape[1] - z
            if rest:  # concatenated channels: the mask says that these frames are known
                past = torch.cat([past, past.new_ones(len(x), rest - z, *past.shape[2:]), past], 1)
            x = torch.cat([past, x], 2)
            if time.ndim == 2:
                old = (1000 * given.level).to(time.dtype)[:, None].expand(-1, tokens * past.shape[2])
                time = torch.cat([old, time], 1)
        if time.ndim == 1 and module.gradient_checkpointing and torch.is_grad_enabled():
            time = time[:, None].expand(-1, tokens * x.shape[2])  # what blocks are given is all that is computed again
        kwargs |= {"hidden_states": x, "timestep": time}
        self._prepare(module, x.shape)
        return args, kwargs

    @staticmethod
    def _tokens(module: nn.Module, shape: tuple) -> int:
        """Tokens of one latent frame."""
        return (shape[3] // module.config.patch_size[1]) * (shape[4] // module.config.patch_size[2])

    def _prepare(self, module: nn.Module, shape: tuple) -> None:
        found = self.extension(self.now).repeat_interleave(self._tokens(module, shape), 1)
        self.to_time = found[..., : self.extension.inner]
        self.added = found[..., self.extension.inner :].unflatten(-1, (6, -1))

    def _patches(self, module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        if self.given is None or self.now.maps is None or self.extension.patch_maps is None:
            return out
        maps = self.now.maps * self.now.present.view(-1, 1, 1, 1, 1)
        drawn = self.extension.patch_maps(maps).to(out.dtype)
        out = out.clone()
        out[:, :, -drawn.shape[2] :] += drawn
        return out

    def _times(self, module: nn.Module, args: tuple, out: tuple) -> tuple:
        if self.given is None:
            return out
        time, modulation, *rest = out
        time = (time if time.ndim == 3 else time[:, None]) + self.to_time.to(time.dtype)
        if modulation.ndim == 3:
            modulation = modulation + self.added.flatten(2).to(modulation.dtype)
            self.added = None  # the blocks have it already
        return (time, modulation, *rest)

    def _block(self, module: nn.Module, args: tuple) -> tuple | None:
        """One time per clip: its modulation (b 6 d) becomes one per token."""
        if self.given is None or self.added is None:
            return None
        hidden, text, modulation, *rest = args
        return (hidden, text, modulation[:, None] + self.added.to(modulation.dtype), *rest)

    def _after(self, module: nn.Module, args: tuple, kwargs: dict, out: object) -> object:
        if self.given is None or self.again:
            return out
        found = out[0] if isinstance(out, tuple) else out.sample
        if self.guidance != 1:
            self.again = True
            try:
                plain = module(*args, **kwargs)
            finally:
                self.again = False
            plain = plain[0] if isinstance(plain, tuple) else plain.sample
            found = plain + self.guidance * (found - plain)
        m = 0 if self.given.memory is None else self.given.memory.shape[2]
        found = found[:, :, m:]
        if isinstance(out, tuple):
            return (found, *out[1:])
        out.sample = found
        return out
