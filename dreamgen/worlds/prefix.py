"""World models conditioned by a clean first latent frame: the family of Wan2.2-TI2V.

The causal VAE makes latent frame 0 depend on picture 0 alone, so the condition is `latents[:, :, :1]`: it stays clean,
its tokens have time 0, and the loss is taken on the other frames (Wan2.2 `expand_timesteps`, arXiv:2503.20314).
"""

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from dreamgen.core.clip import Clip, Prompt
from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment
from dreamgen.core.manifest import read_json, tree_digest, write_json
from dreamgen.engine.precision import autocast, best_device
from dreamgen.worlds.autoencoder import to_frames, to_video
from dreamgen.worlds.flow import draw_sigma, noised, sample, velocity

TINY = "tiny"  # the base that ships with the package
FILE = "world.json"
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")


def locate(path: str) -> str:
    """The folder of the base that ships, for "tiny"; else the path or hub id as it is."""
    return str(files("dreamgen.worlds") / "tiny_base") if path == TINY else path


class PrefixWorld(nn.Module):
    """A Wan2.2-TI2V pipeline as a world model of `robot`.

    path: "tiny", a diffusers folder or a hub id. adapter: a folder with LoRA weights on top of it.
    video_hz, frames: the clip that it dreams. text_length: tokens of an instruction (the stock pipeline's
    `max_sequence_length`). steps, guidance, negative_prompt: of the sampler; guidance 1 leaves out the second pass.
    template: the prompt around an instruction. precision: "auto", "fp32", "bf16".

    Raises ValueError: no such pipeline, another layout, sizes that its VAE cannot take.
    """

    def __init__(
        self,
        *,
        robot: Embodiment,
        path: str = TINY,
        adapter: str | None = None,
        video_hz: str | int = "10",
        frames: int = 17,
        text_length: int = 32,
        steps: int = 20,
        guidance: float = 2.0,
        negative_prompt: str = "",
        template: str = "{instruction}",
        precision: str = "auto",
        pipeline: WanImageToVideoPipeline | None = None,
    ) -> None:
        super().__init__()
        self.robot, self.path, self.precision = robot, path, precision
        self.clock = Clock(robot_hz=robot.robot_hz, video_hz=video_hz, frames=frames)
        self.text_length, self.steps, self.guidance = text_length, steps, guidance
        self.negative_prompt, self.template = negative_prompt, template
        self.pipe = pipeline if pipeline is not None else open_pipeline(path)
        if adapter is not None:
            self.pipe.load_lora_weights(adapter)
        self.transformer = self.pipe.transformer
        self._check()
        if best_device().type == "cpu":  # the fused backward pass is three times slower there at these lengths
            self.transformer.set_attention_backend("_native_math")
        vae = self.pipe.vae.config
        self.register_buffer("mean", torch.tensor(vae.latents_mean).view(-1, 1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(vae.latents_std).view(-1, 1, 1, 1), persistent=False)
        self._texts: dict[str, Tensor] = {}
        self.requires_grad_(False).eval()

    def _check(self) -> None:
        pipe = self.pipe
        if not isinstance(pipe, WanImageToVideoPipeline) or not pipe.config.expand_timesteps:
            raise ValueError(f"{self.path} is a {type(pipe).__name__} without a clean-prefix condition "
                             "(expand_timesteps); expected the layout of Wan2.2-TI2V")  # fmt: skip
        h, w = self.robot.canvas
        space = pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size[1]
        if h % space or w % space:
            raise ValueError(f"the canvas of embodiment '{self.robot.name}' is {h}x{w}; {self.path} takes multiples of "
                             f"{space}. Change the size of its views.")  # fmt: skip
        time = pipe.vae_scale_factor_temporal
        if (self.clock.frames - 1) % time:
            near = (self.clock.frames - 1) // time * time + 1
            raise ValueError(f"frames is {self.clock.frames}; {self.path} takes 1 + a multiple of {time}, for instance "
                             f"{near} or {near + time}")  # fmt: skip

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Channels, latent frames, height, width of one clip."""
        h, w = self.robot.canvas
        s = self.pipe.vae_scale_factor_spatial
        t = (self.clock.frames - 1) // self.pipe.vae_scale_factor_temporal + 1
        return self.pipe.vae.config.z_dim, t, h // s, w // s

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    def place(self) -> "PrefixWorld":
        """Move everything to the accelerator, if there is one."""
        self.to(best_device())
        self.pipe.to(best_device())
        return self

    def cache_key(self) -> dict:
        """Names what `encode` depends on."""
        state = self.pipe.vae.state_dict()
        total = [float(v.float().abs().sum()) for v in state.values() if v.is_floating_point()]
        return {"vae": total, "mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist(),
                "clock": self.clock.spec(), "canvas": self.robot.canvas}  # fmt: skip

    @torch.no_grad()
    def encode(self, frames: UInt8[Tensor, "b t h w 3"]) -> Float[Tensor, "b c lt lh lw"]:
        """Normalised latents (the posterior's mean) of clips or, with t = 1, of first frames."""
        with autocast(self.precision, self.device):
            z = self.pipe.vae.encode(to_video(frames.to(self.device))).latent_dist.mode()
        return (z.float() - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b c lt lh lw"]) -> UInt8[Tensor, "b t h w 3"]:
        """The inverse of `encode`, as pictures."""
        with autocast(self.precision, self.device):
            return to_frames(self.pipe.vae.decode(latents * self.std + self.mean).sample)

    def tokens(self, instructions: Sequence[str]) -> dict[str, Tensor]:
        """Token ids and mask (b, text_length) of the prompts around `instructions`."""
        texts = [self.template.format(instruction=text) if text else text for text in instructions]
        found = self.pipe.tokenizer(texts, padding="max_length", max_length=self.text_length, truncation=True,
                                    return_attention_mask=True, return_tensors="pt")  # fmt: skip
        return {"ids": found.input_ids, "mask": found.attention_mask}

    def embed_tokens(self, ids: Tensor, mask: Tensor) -> Float[Tensor, "b l d"]:
        """Text embeddings in the transformer's dtype, zero past the end of each prompt, as in the stock pipeline."""
        hidden = self.pipe.text_encoder(ids, mask).last_hidden_state.to(self.transformer.dtype)
        return hidden * mask.unsqueeze(-1).to(hidden.dtype)

    @torch.no_grad()
    def embed(self, instructions: Sequence[str]) -> Float[Tensor, "b l d"]:
        """Text embeddings of `instructions`; each distinct text is encoded once. "" is the negative prompt."""
        for text in dict.fromkeys(instructions):
            if text not in self._texts:
                found = self.tokens([text or self.negative_prompt])
                self._texts[text] = self.embed_tokens(found["ids"].to(self.device), found["mask"].to(self.device))[0]
        return torch.stack([self._texts[text] for text in instructions])

    def predict(self, x: Tensor, first: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """The velocity of all latent frames; `first` (b c 1 lh lw) replaces frame 0, timestep (b,) in [0, 1000]."""
        x = torch.cat([first, x[:, :, 1:]], 2)
        b, _, t, h, w = x.shape
        tokens = (h // 2) * (w // 2)
        times = timestep.view(b, 1).expand(b, t * tokens).clone()
        times[:, :tokens] = 0
        return self.transformer(hidden_states=x, timestep=times, encoder_hidden_states=text, return_dict=False)[0]

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """batch: latents (b c t h w); text (b l d), or ids and mask (b l) to train the text encoder as well.

        Optional noise (as latents) and sigma (b,) fix what is drawn otherwise. Mean squared error of the velocity on
        all frames but the first.
        """
        x = batch["latents"]
        text = batch["text"] if "text" in batch else self.embed_tokens(batch["ids"], batch["mask"])
        noise = batch["noise"] if "noise" in batch else torch.randn_like(x)
        shift = self.pipe.scheduler.config.get("shift") or self.pipe.scheduler.config.get("flow_shift") or 1.0
        sigma = batch["sigma"] if "sigma" in batch else draw_sigma(len(x), shift=shift, device=x.device)
        found = self.predict(noised(x, noise, sigma), x[:, :, :1], sigma * 1000, text)
        error = (found.float() - velocity(x, noise))[:, :, 1:].square().mean()
        return error, {}

    def noise(self, prompts: Sequence[Prompt]) -> Tensor:
        """Each prompt's own noise (b c t h w), a function of its seed alone."""
        shape = self.latent_shape
        rows = [torch.randn(shape, generator=torch.Generator().manual_seed(p.seed)) for p in prompts]
        return torch.stack(rows).to(self.device)

    def dream(self, prompts: Sequence[Prompt], *, noise: Tensor | None = None) -> list[Clip]:
        """One clip per prompt, in order. Prompts with one first frame or instruction share its encoding.

        noise: (b c t h w) in place of the seeds'. Raises ValueError for a picture of another size than the canvas.
        """
        return self.clips(prompts, self.decode(self.denoise(prompts, noise=noise)))

    @torch.no_grad()
    def denoise(self, prompts: Sequence[Prompt], *, noise: Tensor | None = None) -> Float[Tensor, "b c lt lh lw"]:
        """The first part of `dream`: normalised latents of the clips, on the device; `decode` makes them pictures."""
        h, w = self.robot.canvas
        for prompt in prompts:
            if prompt.image.shape != (h, w, 3):
                raise ValueError(f"the first frame of prompt '{prompt.id}' is {prompt.image.shape}; embodiment "
                                 f"'{self.robot.name}' has a canvas of {(h, w, 3)}")  # fmt: skip
        images = torch.from_numpy(np.stack([prompt.image for prompt in prompts]))[:, None]
        first = self.encode(images)
        text = self.embed([prompt.instruction for prompt in prompts])
        guided = self.guidance > 1
        if guided:
            text = torch.cat([text, self.embed([""] * len(prompts))])

        def model(x: Tensor, t: Tensor) -> Tensor:
            b = len(x)
            with autocast(self.precision, self.device):
                if not guided:
                    return self.predict(x, first, t.expand(b), text).float()
                both = self.predict(x.repeat(2, 1, 1, 1, 1), first.repeat(2, 1, 1, 1, 1), t.expand(2 * b), text).float()
            cond, plain = both.chunk(2)
            return plain + self.guidance * (cond - plain)

        x = sample(model, self.noise(prompts) if noise is None else noise, self.pipe.scheduler, self.steps)
        return torch.cat([first, x[:, :, 1:]], 2)

    def clips(self, prompts: Sequence[Prompt], frames: UInt8[Tensor, "b t h w 3"]) -> list[Clip]:
        """The last part of `dream`: decoded frames with the provenance of their prompts."""
        return [
            Clip(id=p.id, video=v, video_hz=self.clock.video_hz, instruction=p.instruction, seed=p.seed, pair=p.pair,
                 state=p.state, origin=p.origin)
            for p, v in zip(prompts, frames.cpu().numpy(), strict=True)
        ]  # fmt: skip

    def train_full(self) -> None:
        """Make all weights of the transformer trainable."""
        self.transformer.requires_grad_(True)

    def train_lora(self, *, rank: int, alpha: int) -> None:
        """Put a LoRA of this rank on the attention and feed-forward layers; only it is trained, in fp32."""
        from peft import LoraConfig

        self.transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian",
                                                target_modules=list(LORA_TARGETS)))  # fmt: skip
        for parameter in self.transformer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def spec(self) -> dict[str, Any]:
        """Constructor arguments as plain JSON, without the weights' place."""
        return {"video_hz": self.clock.video_hz, "frames": self.clock.frames, "text_length": self.text_length,
                "steps": self.steps, "guidance": self.guidance, "negative_prompt": self.negative_prompt,
                "template": self.template, "precision": self.precision}  # fmt: skip

    def save(self, out: Path, *, dtype: torch.dtype | None = None) -> None:
        """A diffusers pipeline folder `out/model`, or an adapter in `out/adapter`, and `world.json` last."""
        lora = bool(getattr(self.transformer, "peft_config", None))
        if lora:
            from peft import get_peft_model_state_dict

            WanImageToVideoPipeline.save_lora_weights(
                out / "adapter", transformer_lora_layers=get_peft_model_state_dict(self.transformer),
                # with it loaders know alpha; without, they take alpha = rank
                transformer_lora_adapter_metadata=self.transformer.peft_config["default"].to_dict(),
            )  # fmt: skip
        else:
            if dtype is not None:
                self.pipe.to(dtype=dtype)
            self.pipe.save_pretrained(out / "model")
        write_json(out / FILE, {"spec": self.spec(), "contract": self.robot.contract(),
                                "base": self.path if lora else None})  # fmt: skip

    @classmethod
    def load(cls, path: Path | str, **changed: Any) -> "PrefixWorld":
        """A world model that `save` wrote; `changed` overrides its sampler settings."""
        path = Path(path)
        saved = read_json(path / FILE)
        robot = changed.pop("robot", None) or Embodiment.from_contract(saved["contract"])
        robot.require(saved["contract"], str(path))
        lora = {"path": saved["base"], "adapter": str(path / "adapter")}
        where = lora if saved["base"] else {"path": str(path / "model")}
        return cls(robot=robot, **{**saved["spec"], **where, **changed})

    def fingerprint(self) -> str:
        """Names the weights that this world model was opened with."""
        where = Path(locate(self.path))
        return tree_digest(where) if where.exists() else self.path


def open_pipeline(path: str) -> WanImageToVideoPipeline:
    """The pipeline in a folder, on the hub, or "tiny". Raises ValueError where there is none of this family."""
    path = locate(path)
    if Path(path).is_dir():
        index = Path(path) / "model_index.json"
        if not index.is_file():
            raise ValueError(f"{path} is no diffusers pipeline (no model_index.json)")
        name = json.loads(index.read_text()).get("_class_name")
        if name != "WanImageToVideoPipeline":
            raise ValueError(f"{path} is a {name}; this family takes WanImageToVideoPipeline (Wan2.2-TI2V)")
    try:
        return WanImageToVideoPipeline.from_pretrained(path)
    except OSError as error:
        raise ValueError(f"no world model at '{path}': {str(error).splitlines()[0]}. Give a diffusers folder, a hub id "
                         "that this machine can reach, or 'tiny'.") from error  # fmt: skip
