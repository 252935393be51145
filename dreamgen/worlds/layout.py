"""What one diffusers pipeline class asks of those who use its parts: pictures to latents, text, the transformer's call.

A conditioning family (clean prefix, channel concat) is the same for many pipelines; what differs between them is a
`Layout`, one file each. Defaults are those of most: a causal video VAE, flow matching, guidance from the plain
prediction.
"""

import contextlib
import logging
from collections.abc import Iterable, Sequence
from copy import copy, deepcopy
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor, nn

from dreamgen.core.embodiment import Embodiment
from dreamgen.core.manifest import read_json, tree_digest, write_json
from dreamgen.engine.precision import best_device
from dreamgen.worlds.flow import Diffusion, Flow

log = logging.getLogger(__name__)
TINY = "tiny"  # the base that ships with the package


def locate(path: str) -> str:
    """The folder of the base that ships, for "tiny"; else the path or hub id as it is. ValueError for an empty one."""
    if not path:
        raise ValueError("the path of the world model is empty; give a diffusers folder, a hub id, or 'tiny' "
                         "(world_model.path=...)")  # fmt: skip
    return str(files("dreamgen.worlds") / "tiny_base") if path == TINY else path


def content(path: str, revision: str | None = None) -> str:
    """Names what lies at a path or "tiny" by its bytes, and at a hub id by that and the revision."""
    folder = Path(locate(path))
    return tree_digest(folder) if folder.exists() else f"{path}@{revision}" if revision else str(path)


def twin(x: Tensor) -> Tensor:
    """A batch of one twice, on a CPU: PyTorch takes another convolution for one small clip, which rounds otherwise."""
    return torch.cat([x, x]) if len(x) == 1 and x.device.type == "cpu" else x


def shifted(scheduler: Any, shift: float) -> Any:
    """A diffusers scheduler as it is configured, but for this shift. ValueError for one whose noise levels no shift
    moves."""
    config = scheduler.config
    key = next((key for key in ("shift", "flow_shift") if key in config), None)
    if key is None or config.get("use_karras_sigmas"):
        raise ValueError(f"shift is {shift}, but the noise levels of {type(scheduler).__name__}, as it is configured "
                         "here, take none; leave it null")  # fmt: skip
    fixed = {"use_dynamic_shifting": False} if config.get("use_dynamic_shifting") else {}
    return type(scheduler).from_config(config, **{key: shift}, **fixed)


class Layout:
    """pipeline: the diffusers class; opens: the names in `model_index.json` that it takes; targets: LoRA's modules.

    clean: the model's time of a clean latent frame. video_hz: frames a second, for those who tell the model. shift,
    train_shift: see `VideoWorld`; ValueError for a shift that the pipeline's scheduler does not take.
    """

    pipeline: ClassVar[Any]
    opens: ClassVar[tuple[str, ...]]
    targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    clean: ClassVar[float] = 0.0

    def __init__(self, pipe: Any, *, video_hz: float, text_length: int, shift: float | None = None,
                 train_shift: float | None = None) -> None:  # fmt: skip
        self.pipe, self.video_hz, self.text_length, self.train_shift = pipe, video_hz, text_length, train_shift
        self.scheduler = pipe.scheduler if shift is None else shifted(pipe.scheduler, shift)

    @classmethod
    def open(cls, path: str, *, revision: str | None = None, weights: torch.dtype | None = None, **parts: Any) -> Any:
        """The pipeline in a folder, on the hub, or "tiny". weights: of transformers and encoders; None: transformers
        are in fp32, and encoders as their files are (bf16 in "tiny"), which is what no dtype means to transformers.

        The VAE is held in fp32, and computes in the precision of its world model. parts: components that are given, not
        loaded.

        Raises ValueError where there is no pipeline, or another one.
        """
        path = locate(path)
        if Path(path).is_dir() and not (Path(path) / "model_index.json").is_file():
            raise ValueError(f"{path} is no diffusers pipeline (no model_index.json)")
        options: dict[str, Any] = {} if revision is None else {"revision": revision}
        try:
            name = DiffusionPipeline.load_config(path, **options).get("_class_name")
            if name not in cls.opens:
                raise ValueError(f"{path} is a {name}; this world model takes {' or '.join(cls.opens)}. Choose the "
                                 "`world_model` that is made for it.")  # fmt: skip
            if weights is not None:
                if best_device().type == "cpu":
                    log.warning("%s is a model for a GPU (its weights are held in bf16), and none is seen here: all of "
                                "it will be read, and run very slowly", path)  # fmt: skip
                low = dict.fromkeys(("transformer", "transformer_2", "text_encoder", "image_encoder"), weights)
                options["torch_dtype"] = low | {"default": torch.float32}
            return cls.pipeline.from_pretrained(path, **options, **parts)
        except OSError as error:
            raise ValueError(f"no world model at '{path}': {str(error).splitlines()[0]}. Give a diffusers folder, a "
                             "hub id that this machine can reach, or 'tiny'.") from error  # fmt: skip

    @property
    def experts(self) -> dict[str, nn.Module]:
        """The transformers by their names in the pipeline, from high noise to low."""
        return {"transformer": self.pipe.transformer}

    @property
    def pixels(self) -> int:
        """Sides of a picture are multiples of this."""
        return self.pipe.vae_scale_factor_spatial * self.patch

    @property
    def patch(self) -> int:
        """Latent cells along the side of a token."""
        return self.pipe.transformer.config.patch_size[1]

    @property
    def scale(self) -> tuple[int, int]:
        """Frames in a latent frame, pixels along the side of a latent cell."""
        return self.pipe.vae_scale_factor_temporal, self.pipe.vae_scale_factor_spatial

    @property
    def grain(self) -> int:
        """Frames by which a clip grows after its first."""
        return self.scale[0]

    def require(self, robot: Embodiment, frames: int, path: str) -> None:
        """Raise ValueError for a canvas or a number of frames that the VAE and the tokens cannot take."""
        (h, w), side, time = robot.canvas, self.pixels, self.grain
        if h % side or w % side:
            raise ValueError(f"the canvas of embodiment '{robot.name}' is {h}x{w}; {path} takes multiples of {side}. "
                             "Change the size of its views.")  # fmt: skip
        if (frames - 1) % time:
            near = (frames - 1) // time * time + 1
            raise ValueError(f"frames is {frames}; {path} takes 1 + a multiple of {time}, for instance {near} or "
                             f"{near + time}")  # fmt: skip

    def require_backend(self, name: str) -> None:
        """Raise ValueError for one of diffusers' attention backends that the transformers do not take."""

    @property
    def channels(self) -> int:
        return self.pipe.vae.config.z_dim

    def moments(self) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
        """Mean and spread by which the latents of the VAE are normalised."""
        config = self.pipe.vae.config
        return torch.tensor(config.latents_mean), torch.tensor(config.latents_std)

    def encode(self, video: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b c lt lh lw"]:
        """The posterior's mean, not normalised, of pictures in [-1, 1]."""
        return self.pipe.vae.encode(video).latent_dist.mode()

    def decode(self, z: Float[Tensor, "b c lt lh lw"]) -> Float[Tensor, "b 3 t h w"]:
        # a shallow copy: causal VAEs keep frames of the clip in themselves, and a thread may decode while others encode
        return copy(self.pipe.vae).decode(z).sample

    def cleaned(self, text: str) -> str:
        """A finished prompt as its tokenizer is given it: texts that are one here have one embedding."""
        return text

    def count(self, text: str) -> int:
        """Tokens of a finished prompt, however many."""
        return len(self.pipe.tokenizer(self.cleaned(text)).input_ids)

    def require_read(self, texts: Sequence[str]) -> None:
        """Raise ValueError for a finished prompt that has more tokens than are read."""
        for text in dict.fromkeys(texts):
            if (count := self.count(text)) > self.text_length:
                raise ValueError(
                    f"a prompt has {count} tokens, and the end of it would not be read: text_length is "
                    f"{self.text_length}. Shorten the instruction or the template around it, or raise text_length "
                    "(world_model.text_length; stage.text_length of pretrain) where the model was trained on texts so "
                    f"long. It is '{text}'"
                )

    def embed(self, texts: Sequence[str], device: torch.device) -> Float[Tensor, "b l d"]:
        """Embeddings of finished prompts, as the stock pipeline makes them. Raises ValueError as `require_read`."""
        self.require_read(texts)
        found = self.pipe.encode_prompt(list(texts), do_classifier_free_guidance=False, device=device,
                                        max_sequence_length=self.text_length)  # fmt: skip
        return found[0].to(self.pipe.transformer.dtype)

    def forward(self, transformer: nn.Module, x: Float[Tensor, "b c t h w"], times: Tensor, text: Tensor,
                image: Tensor | None = None) -> Float[Tensor, "b k t h w"]:  # fmt: skip
        """The transformer's prediction; times (b,), or (b t) one for each latent frame.

        Text may come in another dtype: one that is trained is fp32, whatever it was when its texts were embedded.
        """
        raise NotImplementedError

    def process(self, shape: Sequence[int]) -> Flow | Diffusion:
        """How it was trained, on latents of `shape` (c t h w)."""
        config = self.pipe.scheduler.config
        return Flow(self.train_shift or config.get("shift") or config.get("flow_shift") or 1.0)

    def schedule(self, steps: int, shape: Sequence[int], device: torch.device) -> tuple[Any, Iterable[Tensor]]:
        """The scheduler of the pipeline with its steps set, and the model's name for each step."""
        scheduler = deepcopy(self.scheduler)
        scheduler.set_timesteps(steps, device=device)
        return scheduler, scheduler.timesteps

    def begin(self, noise: Tensor) -> Tensor:
        """Unit noise as the sampler starts from it."""
        return noise

    def end(self, x: Tensor) -> Tensor:
        """What the sampler ends at, as clean latents."""
        return x

    def guide(self, found: Tensor, plain: Tensor, guidance: float) -> Tensor:
        """The prediction with a prompt, pushed away from the one without (Ho & Salimans 2022, arXiv:2207.12598)."""
        return plain + guidance * (found - plain)

    def published(self) -> contextlib.AbstractContextManager:
        """The pipeline as it was published, to be saved."""
        return contextlib.nullcontext()

    def save(self, folder: Path) -> None:
        """Write the pipeline as it was published, without the places of this machine that diffusers notes."""
        with self.published():
            self.pipe.save_pretrained(folder)
        for file in (folder / "model_index.json", *folder.glob("*/config.json")):
            settings = read_json(file)
            if settings.pop("_name_or_path", None) is not None:
                write_json(file, settings)

    def allow(self, texts: Sequence[str]) -> None:
        """Raise ValueError for prompts that the model's licence asks to be refused."""

    def censor(self, video: Any, names: Sequence[str] = ()) -> Any:
        """Pictures (b t h w 3) uint8 as the model's licence asks for them; names: of the clips, for errors. Raises
        ValueError for a clip that it asks to be refused."""
        return video
