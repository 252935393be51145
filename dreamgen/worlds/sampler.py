"""How fast and within which memory a world model dreams: guidance in one pass or two, step caches, attention, compile.

Batched guidance doubles the batch, two passes do not: the same predictions, half the memory. A step cache leaves out
blocks whose input hardly changed since the last step (first-block cache, pyramid attention broadcast, FasterCache and
others, as diffusers hooks); what it leaves out may depend on the whole batch, so clips may then depend on their batch.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from diffusers import FasterCacheConfig, PyramidAttentionBroadcastConfig
from torch import Tensor, nn

from dreamgen.engine.compiling import compile_blocks, wanted
from dreamgen.engine.devices import exhausted
from dreamgen.engine.precision import best_device, resolve
from dreamgen.worlds.layout import Layout

MODES = ("auto", "batched", "two_pass")
UNNAMED = (FasterCacheConfig, PyramidAttentionBroadcastConfig)  # keep one state for all predictions of a step
TORCHS = ("native", "_native")  # what backends of torch's own attention begin with
NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")  # of queries and keys
Predict = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Sampler:
    """mode: "batched", "two_pass" or "auto" (batched where the machine's memory holds it). guidance: none up to 1.
    interval: lowest and highest noise level, 0 to 1, at which there is guidance; beyond it the prediction with the
    prompt is made alone (Kynkaanniemi et al. 2024, arXiv:2404.07724). None: everywhere. backend: a name of diffusers'
    attention backends (native, flash, sage, ...). cache: a diffusers cache configuration. compile: the repeated blocks,
    at the first step (see `dreamgen.engine.compiling`). shape: of a window's latents, (c t h w); steps: of denoising.

    Raises ValueError for an unknown mode, for a backend that is unknown or not for this model, for an interval that is
    none, holds no step, stands beside a cache, or bounds guidance that there is not, for a cache on a model that takes
    none, and as `require_cache` does.
    """

    def __init__(self, layout: Layout, *, shape: Sequence[int], steps: int, mode: str, guidance: float,
                 interval: Sequence[float] | None, backend: str | None, cache: Any,
                 compile: bool | str) -> None:  # fmt: skip
        if mode not in MODES:
            raise ValueError(f"guidance_mode is '{mode}'; expected one of {', '.join(MODES)}")
        if interval is not None and (len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1):
            raise ValueError(f"guidance_interval is {list(interval)}; expected the lowest and the highest noise level "
                             f"at which there is guidance, such as [0.3, 1.0], or null")  # fmt: skip
        if interval is not None and guidance <= 1:
            raise ValueError(f"guidance_interval is {list(interval)}, but guidance is {guidance}, which is none; set "
                             "guidance above 1, or leave the interval out")  # fmt: skip
        if interval is not None and cache is not None:
            raise ValueError("guidance_interval leaves out predictions from which step_cache would go on; set one of "
                             "the two")  # fmt: skip
        require_cache(cache, mode=mode, steps=steps, guidance=guidance, experts=len(layout.experts))
        self.layout, self.mode, self.cache, self.frames, self.now = layout, mode, cache, shape[1], torch.zeros(())
        self.interval, self.backend, self.compile = interval, backend, compile
        if interval is not None:
            levels = [self._level(time, shape) for time in layout.schedule(steps, shape, torch.device("cpu"))[1]]
            if not any(interval[0] <= level <= interval[1] for level in levels):
                told = ", ".join(f"{level:.3g}" for level in levels)
                raise ValueError(f"guidance_interval is {list(interval)}, and none of the {steps} steps lies there: "
                                 f"their noise levels are {told}; widen it, or set guidance to 1")  # fmt: skip
        if isinstance(cache, FasterCacheConfig):  # Wan2.1's view of the picture is a row each as well
            named = FasterCacheConfig._unconditional_conditional_input_kwargs_identifiers
            cache._unconditional_conditional_input_kwargs_identifiers = (*named, "encoder_hidden_states_image")
        if backend is not None:
            layout.require_backend(backend)
        if backend is None and best_device().type == "cpu":
            backend = "_native_math"  # the fused backward pass is three times slower there at these lengths
        for module in layout.experts.values():
            if backend is not None:
                try:
                    module.set_attention_backend(backend)
                except (ValueError, RuntimeError, ImportError) as error:
                    raise ValueError(f"attention_backend is '{backend}', as is kept with a fine-tuned world model: "
                                     f"{error}; attention_backend=native is torch's own") from error  # fmt: skip
                if not backend.lower().startswith(TORCHS):
                    _keep_dtype(module)
            if cache is not None:
                self._cache(module)
            if wanted(compile):
                compile_blocks(module)

    def spec(self) -> dict[str, Any]:
        """Settings of a world model as plain JSON, as they were given."""
        interval = None if self.interval is None else list(self.interval)
        return {"guidance_mode": self.mode, "guidance_interval": interval, "attention_backend": self.backend,
                "compile": self.compile}  # fmt: skip

    def _cache(self, module: nn.Module) -> None:
        if not hasattr(module, "enable_cache"):
            raise ValueError(f"step_cache is set, but {type(module).__name__} takes none; leave it out")
        if hasattr(self.cache, "current_timestep_callback"):
            self.cache.current_timestep_callback = lambda: int(self.now)
        module.enable_cache(self.cache)

    def _context(self, name: str) -> contextlib.AbstractContextManager:
        """All transformers' caches told which of the predictions comes next."""
        stack = contextlib.ExitStack()
        if self.cache is not None:
            for module in self.layout.experts.values():
                stack.enter_context(module.cache_context(name))
        return stack

    def guided(self, predict: Predict, given: Tensor, text: Tensor, plain: Tensor | None,
               guidance: float) -> Callable[[Tensor, Tensor], Tensor]:  # fmt: skip
        """`predict(x, given, time, text)` with classifier-free guidance, as a function of x and the model's time.

        plain: the negative prompt's text, None to leave guidance out.
        """
        if self.cache is not None:
            for module in self.layout.experts.values():
                module._reset_stateful_cache()
        together = self.mode == "batched" or isinstance(self.cache, UNNAMED)
        batched = together or (self.mode == "auto" and self._holds(text, given))
        both = None if plain is None else (torch.cat([given, given]), torch.cat([plain, text]))  # as caches expect them

        def model(x: Tensor, time: Tensor) -> Tensor:
            self.now, times = time, time.to(x.device).expand(len(x))
            if plain is None or both is None or not self._guides(time, x):
                with self._context("cond"):
                    return predict(x, given, times, text)
            if batched:
                with self._context("cond_uncond"):
                    rest, found = predict(torch.cat([x, x]), both[0], times.repeat(2), both[1]).chunk(2)
            else:
                with self._context("cond"):
                    found = predict(x, given, times, text)
                with self._context("uncond"):
                    rest = predict(x, given, times, plain)
            return self.layout.guide(found, rest, guidance)

        return model

    def _guides(self, time: Tensor, x: Tensor) -> bool:
        """Whether there is guidance at the model's time."""
        if self.interval is None:
            return True
        return self.interval[0] <= self._level(time, x.shape[1:]) <= self.interval[1]

    def _level(self, time: Tensor, shape: Sequence[int]) -> float:
        """The noise level, 0 to 1, of the model's time."""
        return float(time.max()) / self.layout.process(shape).unit

    def _holds(self, text: Tensor, given: Tensor) -> bool:
        """Whether the machine holds the doubled batch; its size, not what is free now, so that shards agree."""
        need = 2 * len(text) * row_bytes(self.layout, given.shape[-2:], self.frames, text.shape[1])
        return need <= capacity(self.layout)


def require_cache(cache: Any, *, mode: str, steps: int, guidance: float, experts: int) -> None:
    """Raise ValueError for a step cache that would reuse or foretell what it is not meant for: one that counts other
    steps than are taken, one that foretells the prediction without a prompt where there is no guidance, and one that
    cannot tell the two predictions apart where they are not made together."""
    name = type(cache).__name__
    if isinstance(cache, FasterCacheConfig) and not cache.is_guidance_distilled and guidance <= 1:
        raise ValueError("step_cache foretells the prediction without a prompt (FasterCache), but guidance is off; set "
                         "guidance above 1, or step_cache.is_guidance_distilled=true")  # fmt: skip
    if isinstance(cache, UNNAMED) and mode == "two_pass":
        raise ValueError(f"step_cache is a {name}, which holds what it reuses for one prediction a step, but "
                         "guidance_mode=two_pass makes two, with a prompt and without, and each would be given the "
                         "other's; take guidance_mode=batched, or another cache, such as "
                         "diffusers.FirstBlockCacheConfig")  # fmt: skip
    if (counted := getattr(cache, "num_inference_steps", None)) is None:
        return
    if experts > 1:
        raise ValueError(f"step_cache is a {name}, which counts a transformer's steps, but two experts share them; "
                         "take another, such as diffusers.FirstBlockCacheConfig")  # fmt: skip
    if counted != steps:
        raise ValueError(f"step_cache.num_inference_steps is {counted}, steps is {steps}; a {name} goes by the number "
                         "of each step: set them alike")  # fmt: skip


def _keep_dtype(transformer: nn.Module) -> None:
    """Let queries and keys leave their norms in the dtype of the values.

    Autocast on CUDA makes them fp32, which torch's own attention casts back and the kernels of others refuse.
    """
    for name, module in transformer.named_modules():
        if name.rpartition(".")[2] in NORMS:
            module.register_forward_hook(_as_given)


def _as_given(module: nn.Module, given: tuple[Tensor], found: Tensor) -> Tensor:
    return found.to(given[0].dtype)


def row_bytes(layout: Layout, cells: Any, frames: int, text: int) -> int:
    """About what one clip's forward pass holds at its peak: a block's inputs, queries, keys, values and hidden layer.

    cells: height and width in latent cells; frames: latent frames; text: tokens of the prompt.
    """
    config = layout.pipe.transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    hidden = config.get("ffn_dim") or int(width * (config.get("mlp_ratio") or 4))
    tokens = frames * cells[0] * cells[1] // layout.patch**2 + text
    return tokens * (10 * width + 2 * hidden) * 4


def capacity(layout: Layout) -> int:
    """Bytes that the device leaves to activations, whatever else runs on it now; the text encoder is in main memory."""
    device = best_device()
    elsewhere = ("text_encoder",) if device.type == "cuda" else ()
    parts = [part for name, part in layout.pipe.components.items() if name not in elsewhere]
    held = sum(p.numel() * p.element_size() for part in parts if isinstance(part, nn.Module) for p in part.parameters())
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory * 0.9) - held
    import psutil

    return psutil.virtual_memory().total // 2 - held


@contextlib.contextmanager
def fitting(world: Any, rows: int) -> Iterator[None]:
    """Turn an allocation that fails into a ValueError that says what would fit, by the keys of stage `dream`.

    world: a `VideoWorld` (which is built on this module).
    """
    try:
        yield
    except RuntimeError as error:
        if not exhausted(error):
            raise
        _, t, h, w = world.latent_shape
        one = row_bytes(world.layout, (h, w), t, world.text_length)
        room, guided = capacity(world.layout), world.guidance > 1
        each = one * (2 if guided and world.sampler.mode != "two_pass" else 1)
        fits, fewer = max(0, min(rows - 1, room // each)), world.clock.frames // 2 // world.layout.grain
        advice, key = [f"stage.batch_size={max(1, fits)}"] if rows > 1 else [], "stage.world_model"
        advice += [f"{key}.guidance_mode=two_pass"] if guided and world.sampler.mode != "two_pass" else []
        if rows == 1 and fewer:
            more = "" if world.chunked else f" with {key}.windows={2 * world.windows}"
            advice += [f"{key}.frames={fewer * world.layout.grain + 1}{more}"]
        advice += [f"{key}.weights=bf16"] if world.weights == "fp32" else []
        raise ValueError(
            f"out of memory with {rows} clips of {world.clock.frames} frames at {h * world.layout.scale[1]}x"
            f"{w * world.layout.scale[1]} ({resolve(world.precision, world.device)}): a clip needs about "
            f"{each / 2**30:.1f} GiB, {max(0, room) / 2**30:.1f} GiB are left beside the weights. Try "
            + (", or ".join(advice) or "a smaller canvas or a larger device") + "."
        ) from error  # fmt: skip


@contextlib.contextmanager
def enough(doing: str, advice: str) -> Iterator[None]:
    """Turn an allocation that fails while `doing` something into a ValueError with `advice`."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = error.__cause__ or error  # what `fitting` advises is for another stage
        if not exhausted(reason):
            raise
        raise ValueError(f"out of memory {doing}. Try {advice}. ({str(reason).splitlines()[0]})") from reason
