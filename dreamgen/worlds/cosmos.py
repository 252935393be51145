"""Cosmos-Predict pipelines: a mask channel names the given frames, whose time is 1e-4; sigma is the model's time.

Predict2.5 (arXiv:2511.00062) reads a Qwen2.5-VL; Predict2 a T5, and is written with EDM's noise levels s: with
sigma = s / (1 + s) and x = (1 - sigma) * x_EDM its denoiser predicts the velocity and its Euler steps are flow
matching's, so one sampler does.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from importlib import import_module
from typing import Any

import torch
from diffusers import Cosmos2_5_PredictBasePipeline, Cosmos2VideoToWorldPipeline
from jaxtyping import Float
from torch import Tensor, nn

from dreamgen.engine.precision import best_device
from dreamgen.worlds.flow import Flow
from dreamgen.worlds.layout import Layout
from dreamgen.worlds.prefix import PrefixWorld
from dreamgen.worlds.sampler import enough

SYSTEM = "You are a helpful assistant who will provide prompts to an image generator."  # the stock pipeline's


class Unguarded:
    """Takes the guardrail's place in a pipeline and lets everything pass."""

    def to(self, *_: Any) -> "Unguarded":
        return self

    def check_text_safety(self, text: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def guard() -> Any:
    """NVIDIA's. Raises ValueError that names its package where it is missing."""
    try:
        module = import_module("cosmos_guardrail")
    except ImportError as error:
        raise ValueError(
            "the licence of Cosmos asks for its guardrail, which is not installed: `pip install "
            "cosmos_guardrail`, or set world_model.guardrail=false if you use another"
        ) from error
    return module.CosmosSafetyChecker()


class CosmosLayout(Layout):
    pipeline = Cosmos2_5_PredictBasePipeline
    opens = ("Cosmos2_5_PredictBasePipeline",)
    clean = 1e-4

    def __init__(self, pipe: Any, **settings: Any) -> None:
        super().__init__(pipe, **settings)
        # the transformer would resize an empty padding mask with torchvision; its channel of zeros is added here
        config, inputs = pipe.transformer.config, pipe.transformer.patch_embed.proj.in_features
        self.padded = inputs > config.in_channels * math.prod(config.patch_size)
        pipe.transformer.register_to_config(concat_padding_mask=False)

    @contextlib.contextmanager
    def published(self) -> Iterator[None]:
        config = self.pipe.transformer.register_to_config
        config(concat_padding_mask=self.padded)
        try:
            yield
        finally:
            config(concat_padding_mask=False)

    def count(self, text: str) -> int:
        """With the words of the chat that the stock pipeline puts around it."""
        said = [{"role": role, "content": [{"type": "text", "text": words}]}
                for role, words in (("system", SYSTEM), ("user", text))]  # fmt: skip
        return len(self.pipe.tokenizer.apply_chat_template(said, tokenize=True, return_dict=False))

    def forward(self, transformer: nn.Module, x: Float[Tensor, "b c t h w"], times: Tensor, text: Tensor,
                image: Tensor | None = None) -> Float[Tensor, "b k t h w"]:  # fmt: skip
        text = text.to(transformer.dtype)
        given = torch.zeros_like(x[:, : 2 if self.padded else 1])
        given[:, 0, 0] = 1
        return transformer(
            hidden_states=x.to(text.dtype), timestep=times.view(len(x), 1, -1, 1, 1),
            encoder_hidden_states=text, condition_mask=given.to(text.dtype), return_dict=False, **self.rate,
        )[0]  # fmt: skip

    @property
    def rate(self) -> dict[str, Any]:
        """What the transformer is told of the frame rate: nothing."""
        return {}

    def process(self, shape: Sequence[int]) -> Flow:
        config = self.pipe.scheduler.config
        return Flow(self.train_shift or config.get("flow_shift") or config.get("shift") or 1.0, unit=1.0)

    def schedule(self, steps: int, shape: Sequence[int], device: torch.device) -> tuple[Any, Iterable[Tensor]]:
        scheduler = deepcopy(self.scheduler)
        scheduler.set_timesteps(steps, device=device)
        return scheduler, scheduler.sigmas[: len(scheduler.timesteps)].to(device)

    def guide(self, found: Tensor, plain: Tensor, guidance: float) -> Tensor:
        """Counted from the prediction with the prompt: one more than others mean by the same number."""
        return found + guidance * (found - plain)

    def allow(self, texts: Sequence[str]) -> None:
        asked = [text for text in texts if text]  # it refuses an empty one, which is no prompt
        if asked:
            with enough("with the guardrail of Cosmos", "a larger device, or world_model.guardrail=false"):
                self.pipe.safety_checker.to(best_device())
        for text in asked:
            if not self.pipe.safety_checker.check_text_safety(text):
                raise ValueError(f"the guardrail of Cosmos refuses the prompt '{text}'")

    def censor(self, video: Tensor, names: Sequence[str] = ()) -> Tensor:
        if isinstance(self.pipe.safety_checker, Unguarded):
            return video
        frames = []
        for k, clip in enumerate(video.numpy(force=True)):
            seen = self.pipe.safety_checker.check_video_safety(clip)
            if seen is None:
                which = f"clip '{names[k]}'" if names else f"clip {k + 1} of {len(video)}"
                raise ValueError(f"the guardrail of Cosmos refuses the video of {which}; take another seed or "
                                 "instruction, or set world_model.guardrail=false if you use another")  # fmt: skip
            frames.append(torch.from_numpy(seen))
        return torch.stack(frames)


class Cosmos2Layout(CosmosLayout):
    pipeline = Cosmos2VideoToWorldPipeline
    opens = ("Cosmos2VideoToWorldPipeline",)
    count = Layout.count

    @property
    def rate(self) -> dict[str, Any]:
        return {"fps": self.video_hz}

    def schedule(self, steps: int, shape: Sequence[int], device: torch.device) -> tuple[Any, Iterable[Tensor]]:
        """The noise levels of the stock pipeline, which end at sigma_min, as flow's sigmas."""
        scheduler = deepcopy(self.scheduler)
        scheduler.set_timesteps(sigmas=torch.linspace(0, 1, steps, dtype=torch.float64), device=device)
        levels = scheduler.sigmas
        if scheduler.config.final_sigmas_type == "sigma_min":
            levels[-1] = levels[-2]
        scheduler.sigmas = levels / (1 + levels)
        return scheduler, scheduler.sigmas[:-1].to(device)

    def begin(self, noise: Tensor) -> Tensor:
        highest = self.pipe.scheduler.config.sigma_max
        return noise * highest / (1 + highest)

    def end(self, x: Tensor) -> Tensor:
        config = self.pipe.scheduler.config
        return x * (1 + config.sigma_min) if config.final_sigmas_type == "sigma_min" else x


class CosmosWorld(PrefixWorld):
    """Cosmos-Predict2.5 as a world model. guardrail: prompts and pictures pass NVIDIA's; others as in `PrefixWorld`."""

    kind = CosmosLayout

    def __init__(self, *, guardrail: bool = True, **settings: Any) -> None:
        checker = None if settings.get("pipeline") is not None else guard() if guardrail else Unguarded()
        super().__init__(parts={"safety_checker": checker}, **settings)
        self.guardrail = guardrail

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "guardrail": self.guardrail}


class Cosmos2World(CosmosWorld):
    """Cosmos-Predict2 Video2World, as `CosmosWorld`."""

    kind = Cosmos2Layout
