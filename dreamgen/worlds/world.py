"""A diffusers image-to-video pipeline as a world model: what both conditioning families share.

A family says how the first picture enters (`condition`, `predict`, `finish`); a `Layout` says what its pipeline class
wants. Distinct first frames and instructions are encoded once and dreamed in one batch.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from dreamgen.core.clip import Clip, Prompt
from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment
from dreamgen.core.seeding import seed_for
from dreamgen.engine.precision import autocast, best_device, resolve
from dreamgen.video.tiling import describe
from dreamgen.worlds.adapters import add_lora, load_adapters
from dreamgen.worlds.autoencoder import clips_at_once, to_frames, to_video, weights_digest
from dreamgen.worlds.flow import integrate
from dreamgen.worlds.layout import TINY, Layout, twin
from dreamgen.worlds.sampler import Sampler, enough, fitting
from dreamgen.worlds.stored import Stored
from dreamgen.worlds.texts import Texts

WEIGHTS, LORA = {"fp32": None, "bf16": torch.bfloat16}, {"rank": 16, "alpha": 16}


class VideoWorld(Stored):
    """A pipeline as a world model of `robot`.

    path: a diffusers folder or a hub id (of `revision`), or "tiny". adapter: a folder with LoRA weights on top of it;
    adapters: further ones, {path, weight, expert, weight_name} each, for instance for few steps. weights: "bf16", of
    transformers and encoders, or "fp32", of transformers: encoders then stay as their files are. video_hz, frames: the
    clip of one window; windows: how many are dreamed on end, each from the last frame of the one before. text_length:
    tokens of a prompt (the stock pipeline's `max_sequence_length`). template: the prompt around an {instruction};
    {views} says where the views lie. steps, guidance, negative_prompt: of the sampler; guidance 1 leaves out the second
    prediction. shift, train_shift: of the noise levels that are sampled through and trained at (see `Flow`); None: the
    scheduler's own. guidance_mode, guidance_interval, attention_backend, step_cache, compile: see `Sampler`. lora:
    rank, alpha and targets where a training names none. precision: "auto", "fp32", "bf16". parts: given, not loaded.

    Raises ValueError: no such pipeline, another layout, sizes that its VAE cannot take, an adapter that fits nowhere.
    """

    kind: ClassVar[type[Layout]]
    start: ClassVar[int] = 0  # the first latent frame that is predicted
    chunked: bool = False  # whether an `ActionWorld` goes on from window to window

    def __init__(
        self,
        *,
        robot: Embodiment,
        path: str = TINY,
        revision: str | None = None,
        weights: str = "fp32",
        adapter: str | None = None,
        adapters: Sequence[Mapping[str, Any]] = (),
        lora: Mapping[str, Any] | None = None,
        video_hz: str | int = "10",
        frames: int = 17,
        windows: int = 1,
        text_length: int = 32,
        steps: int = 20,
        guidance: float = 2.0,
        guidance_mode: str = "auto",
        guidance_interval: Sequence[float] | None = None,
        negative_prompt: str = "",
        shift: float | None = None,
        train_shift: float | None = None,
        template: str = "{instruction}",
        precision: str = "auto",
        attention_backend: str | None = None,
        step_cache: Any = None,
        compile: bool | str = False,
        pipeline: Any = None,
        parts: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.robot, self.path, self.revision, self.precision, self.weights = robot, path, revision, precision, weights
        self.clock = Clock(robot_hz=robot.robot_hz, video_hz=video_hz, frames=frames)
        self.windows, self.text_length, self.steps, self.guidance = windows, text_length, steps, guidance
        self.negative_prompt, self.template, self.lora = negative_prompt, template, {**LORA, **(lora or {})}
        if weights not in WEIGHTS or windows < 1:
            raise ValueError(f"weights is '{weights}', windows is {windows}; expected 'fp32' or 'bf16', and at least 1")
        self.pipe = pipeline or self.kind.open(path, revision=revision, weights=WEIGHTS[weights], **(parts or {}))
        self.shift, self.train_shift, hz = shift, train_shift, float(robot.rate / self.clock.stride)
        self.layout = self.kind(self.pipe, video_hz=hz, text_length=text_length, shift=shift, train_shift=train_shift)
        self._check()
        for name, module in self.layout.experts.items():
            self.add_module(name, module)
        for name, value in zip(("mean", "std"), self.layout.moments(), strict=True):
            self.register_buffer(name, value.float().view(-1, 1, 1, 1), persistent=False)
        self.adapters = [*([{"path": adapter}] if adapter else []), *map(dict, adapters)]
        load_adapters(self.pipe, self.layout.experts, self.adapters)
        self.sampler = Sampler(self.layout, mode=guidance_mode, interval=guidance_interval, backend=attention_backend,
                               cache=step_cache, compile=compile, shape=self.latent_shape,
                               steps=steps, guidance=guidance)  # fmt: skip
        self.texts = Texts(self.layout)
        self.requires_grad_(False).eval()

    def _check(self) -> None:
        """Raise ValueError for a pipeline of another family and for sizes that it cannot take."""
        self.layout.require(self.robot, self.clock.frames, self.path)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Channels, latent frames, height, width of one window."""
        (h, w), (time, side) = self.robot.canvas, self.layout.scale
        return self.layout.channels, (self.clock.frames - 1) // time + 1, h // side, w // side

    @property
    def clip_tokens(self) -> int:
        """Video tokens of one window."""
        return int(np.prod(self.latent_shape[1:])) // self.layout.patch**2

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def place(self, device: torch.device | None = None, *, experts: bool = True) -> "VideoWorld":
        """Move all but the text encoder to `device`, by default the best; without `experts`, no transformer."""
        stay, device = {"text_encoder", *(() if experts else self.layout.experts)}, device or best_device()
        with enough(f"with the weights of {self.path}", "`weights: bf16` of the world model, or a larger device"):
            for name, part in self.pipe.components.items():
                if isinstance(part, nn.Module) and name not in stay:
                    part.to(device)
            self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    def cache_key(self) -> dict:
        """Names what `encode` depends on."""
        return {"vae": weights_digest(self.pipe.vae), "mean": self.mean.flatten().tolist(),
                "std": self.std.flatten().tolist(), "precision": resolve(self.precision, self.device),
                "clock": self.clock.spec(), "canvas": self.robot.canvas}  # fmt: skip

    @torch.no_grad()
    def encode(self, frames: UInt8[Tensor, "b t h w 3"]) -> Float[Tensor, "b c lt lh lw"]:
        """Normalised latents (the posterior's mean) of clips or, with t = 1, of first frames."""
        found = []
        for part in frames.split(clips_at_once(*frames.shape[1:4])):
            with autocast(self.precision, self.device):
                z = self.layout.encode(twin(to_video(part.to(self.device))))[: len(part)]
            found.append((z.float() - self.mean) / self.std)
        return torch.cat(found)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b c lt lh lw"], *, windows: int = 1,
               names: Sequence[str] = ()) -> UInt8[Tensor, "b t h w 3"]:  # fmt: skip
        """The inverse of `encode`; of `windows` on end each begins with the last frame before it. names: of clips."""
        length, (time, side), clips = latents.shape[2] // windows, self.layout.scale, []
        size = clips_at_once((length - 1) * time + 1, side * latents.shape[3], side * latents.shape[4])
        with fitting(self, len(latents)), autocast(self.precision, self.device):
            for some in latents[:, : len(self.mean)].split(size):
                parts = [to_frames(self.layout.decode(twin(z * self.std + self.mean)))[: len(z)]
                         for z in some.split(length, 2)]  # fmt: skip
                clips.append(torch.cat([parts[0], *(part[:, 1:] for part in parts[1:])], 1))
        return self.layout.censor(torch.cat(clips), names)

    def prompt(self, instruction: str, robot: Embodiment | None = None) -> str:
        """The text that the model reads for an instruction on the canvas of `robot` (None: its own), none for none."""
        words = {"instruction": instruction, "views": describe(robot or self.robot)}
        return self.template.format(**words).strip() if instruction else ""

    def prompts(self, instructions: Sequence[str]) -> list[str]:
        """The texts of `instructions`. Raises ValueError for one that the model's licence asks to be refused."""
        texts = [self.prompt(instruction) for instruction in instructions]
        self.layout.allow([text for text in dict.fromkeys(texts) if text not in self.texts])
        return texts

    def read(self, instructions: Sequence[str]) -> None:
        """Embed texts before they are asked for, so that their encoder leaves the accelerator before others come."""
        negative = [self.negative_prompt] if self.guidance > 1 else []
        self.texts.ahead([*negative, *self.prompts(instructions)], best_device())

    def embed(self, instructions: Sequence[str]) -> Float[Tensor, "b l d"]:
        """Text embeddings of `instructions`; each distinct text is encoded once. "" is no text."""
        return self.texts.take(self.prompts(instructions), self.device)

    def negative(self, count: int) -> Float[Tensor, "b l d"] | None:
        """`count` embeddings of the negative prompt, which guidance leads away from; None without guidance."""
        return self.texts.take([self.negative_prompt] * count, self.device) if self.guidance > 1 else None

    def condition(self, images: UInt8[Tensor, "b 1 h w 3"]) -> Float[Tensor, "b k t h w"]:
        """What `predict` is given of the first pictures, one row each."""
        raise NotImplementedError

    def predict(self, x: Tensor, given: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """The prediction for latents x (b c t h w) at the model's times (b,)."""
        raise NotImplementedError

    def finish(self, x: Tensor, given: Tensor) -> Tensor:
        """Sampled latents as they are decoded."""
        return x

    def split(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of a training batch, and what `predict` is given of their first picture."""
        raise NotImplementedError

    def cut(self, latents: Tensor, frames: int) -> Tensor:
        """Of what `encode` makes of clips, what it makes of their first `frames` pictures."""
        return latents[:, :, : (frames - 1) // self.layout.scale[0] + 1]

    @property
    def boundary(self) -> float:
        """The sigma at and above which the first of two experts predicts; 0 where there is one."""
        return 0.0

    @property
    def times(self) -> tuple[float, float]:
        """Between which the times lie that are trained at."""
        return 0.0, 1.0

    def draw(self, count: int, shape: Sequence[int], device: torch.device) -> Float[Tensor, " b"]:
        """Times to train at."""
        return self.layout.process(shape).draw(count, device)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """batch: latents as `encode` makes them of clips; text (b l d), or ids and mask (b l) to train its encoder too.

        Optional noise (as latents) and sigma (b,) fix what is drawn otherwise; weight (b 1 lt lh lw) says how much the
        error in each cell counts. Mean squared error of the prediction, on all frames that are not given.
        """
        x, given = self.split(batch["latents"])
        text = batch["text"] if "text" in batch else self.layout.embed_tokens(batch["ids"], batch["mask"])
        noise = batch["noise"][:, : x.shape[1]] if "noise" in batch else torch.randn_like(x)
        sigma = batch["sigma"] if "sigma" in batch else self.draw(len(x), x.shape[1:], x.device)
        process = self.layout.process(x.shape[1:])
        found = self.predict(process.noised(x, noise, sigma), given, process.time(sigma), text)
        error = (found.float() - process.target(x, noise, sigma))[:, :, self.start :].square()
        return (error * batch["weight"][:, :, self.start :] if "weight" in batch else error).mean(), {}

    def noise(self, prompts: Sequence[Prompt], window: int = 0) -> Tensor:
        """Each prompt's own noise (b c t h w) for a window, a function of its seed alone."""
        seeds = [seed_for(p.seed, "window", window) if window else p.seed for p in prompts]
        rows = [torch.randn(self.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(rows).to(self.device)

    def dream(self, prompts: Sequence[Prompt], *, noise: Tensor | None = None) -> list[Clip]:
        """One clip per prompt, in order. Prompts with one first frame or instruction share its encoding.

        noise: (b c t h w) in place of the seeds'. Raises ValueError for a picture of another size, and as `fitting`.
        """
        return self.clips(prompts, self.denoise(prompts, noise=noise))

    @torch.no_grad()
    def denoise(self, prompts: Sequence[Prompt], *, noise: Tensor | None = None) -> Float[Tensor, "b c lt lh lw"]:
        """The first part of `dream`: normalised latents of all windows, on the device; `clips` makes them pictures."""
        h, w = self.robot.canvas
        for prompt in prompts:
            if prompt.image.shape != (h, w, 3):
                raise ValueError(f"the first frame of prompt '{prompt.id}' is {prompt.image.shape}; embodiment "
                                 f"'{self.robot.name}' has a canvas of {(h, w, 3)}")  # fmt: skip
        images = torch.from_numpy(np.stack([prompt.image for prompt in prompts]))[:, None]
        text, plain = self.embed([prompt.instruction for prompt in prompts]), self.negative(len(prompts))
        found = []
        with fitting(self, len(prompts)):
            for k in range(self.windows):
                start = self.noise(prompts, k) if noise is None else noise.split(self.latent_shape[1], 2)[k]
                found.append(self._window(images, start, text, plain))
                if k + 1 < self.windows:
                    images = self.decode(found[-1], names=[prompt.id for prompt in prompts])[:, -1:]
        return torch.cat(found, 2)

    def _window(self, images: Tensor, noise: Tensor, text: Tensor, plain: Tensor | None) -> Tensor:
        """Latents of one window for pictures (b 1 h w 3), each distinct picture conditioned once."""
        keys = [image.numpy(force=True).tobytes() for image in images]
        distinct = list(dict.fromkeys(keys))
        given = self.condition(images[[keys.index(key) for key in distinct]])[[distinct.index(key) for key in keys]]
        scheduler, times = self.layout.schedule(self.steps, noise.shape[1:], self.device)
        return self.descend(self.layout.begin(noise), given, text, plain, scheduler, times)

    def descend(self, x: Tensor, given: Tensor, text: Tensor, plain: Tensor | None, scheduler: Any,
                times: Iterable[Tensor], first: int = 0) -> Tensor:  # fmt: skip
        """Clean latents of what the scheduler holds as x before its step `first`; plain: see `Sampler.guided`."""

        def predict(x: Tensor, given: Tensor, time: Tensor, text: Tensor) -> Tensor:
            with autocast(self.precision, self.device):
                return self.predict(*map(twin, (x, given, time, text)))[: len(x)].float()

        model = self.sampler.guided(predict, given, text, plain, self.guidance)
        return self.finish(self.layout.end(integrate(model, x, scheduler, times, first)), given)

    def clips(self, prompts: Sequence[Prompt], latents: Float[Tensor, "b c lt lh lw"]) -> list[Clip]:
        """The last part of `dream`: decoded latents of all windows with the provenance of their prompts."""
        names, hz = [prompt.id for prompt in prompts], self.clock.video_hz
        videos = self.decode(latents, windows=self.windows, names=names).cpu().numpy()
        return [Clip(id=p.id, video=v, video_hz=hz, instruction=p.instruction, seed=p.seed, pair=p.pair, state=p.state,
                     origin=p.origin) for p, v in zip(prompts, videos, strict=True)]  # fmt: skip

    def trained(self) -> dict[str, nn.Module]:
        """The transformers that a training changes, by their names in the pipeline."""
        return self.layout.experts

    def require_plain(self) -> None:
        """Raise ValueError for a step cache or adapters, which a training would meet."""
        if self.adapters or self.sampler.cache is not None:
            raise ValueError("adapters and step_cache are for dreaming; leave them out where a world model is trained")

    def train_full(self) -> None:
        """Make all weights of the transformers trainable, in fp32. Raises ValueError for a step cache or adapters."""
        self.require_plain()
        for module in self.trained().values():
            module.float().requires_grad_(True)

    def train_lora(self, *, rank: int | None = None, alpha: int | None = None) -> None:
        """Put a LoRA on the attention and feed-forward layers; only it is trained, in fp32. Raises as `train_full`."""
        self.require_plain()
        targets = self.lora.get("targets") or self.layout.targets
        for module in self.trained().values():
            add_lora(module, rank=rank or self.lora["rank"], alpha=alpha or self.lora["alpha"], targets=targets)

    def spec(self) -> dict[str, Any]:
        """Constructor arguments as plain JSON, without the weights' place."""
        own = ("text_length", "steps", "guidance", "negative_prompt", "shift", "train_shift", "template", "precision",
               "windows", "weights", "lora")  # fmt: skip
        return {"video_hz": self.clock.video_hz, "frames": self.clock.frames,
                **{key: getattr(self, key) for key in own}, **self.sampler.spec()}  # fmt: skip
