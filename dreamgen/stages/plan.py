"""What fine-tuning a model on a dataset and dreaming with it will cost, before anything is spent.

Sizes come from a folder's configuration or the published ones in `published.json`, with which diffusers'
`scripts/convert_{wan,cosmos,ltx,cogvideox}_to_diffusers.py` make the hub's checkpoints (of LTX-Video 0.9.0); the
transformer is built on the meta device, without weights. FLOPs and bytes are those of `dreamgen.engine.cost`; seconds
are FLOPs over the device's peak times the share of it that is expected.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from dreamgen.core.clock import Clock
from dreamgen.core.embodiment import Embodiment
from dreamgen.core.manifest import read_json, write_json
from dreamgen.data.layout import INFO, read_layout
from dreamgen.data.windows import Windows
from dreamgen.engine.cost import Memory, Transformer, lora_parameters, training_memory
from dreamgen.engine.devices import device
from dreamgen.engine.devices import table as devices
from dreamgen.engine.processes import require_sharding
from dreamgen.engine.shares import require_rows
from dreamgen.stages.plan_vae import vae_memory
from dreamgen.stages.validation import ROWS
from dreamgen.worlds.layout import locate
from dreamgen.worlds.world import LORA

DREAMS = 1000  # that are counted where nobody knows how many there will be


@dataclass(frozen=True, kw_only=True)
class Model:
    """A published model: its transformer's configuration, how many experts it has, frames and pixels in a latent.

    channels: of a latent; vae: the configuration of its autoencoder; picture: numbers in CLIP's view of the first
    frame, 0 where the transformer has none.
    """

    config: dict[str, Any]
    experts: int
    scale: tuple[int, int]
    channels: int
    vae: dict[str, Any]
    picture: int = 0

    @classmethod
    def of(cls, path: str) -> "Model":
        """Of a diffusers folder, "tiny", or a hub id that `published.json` has. ValueError names these."""
        folder = Path(locate(path))
        if (folder / "transformer" / "config.json").is_file():
            vae = read_json(folder / "vae" / "config.json")
            second, seen = (folder / "transformer_2").is_dir(), folder / "image_encoder" / "config.json"
            clip = read_json(seen) if seen.is_file() else None
            picture = clip and ((clip["image_size"] // clip["patch_size"]) ** 2 + 1) * clip["hidden_size"]
            return cls(config=read_json(folder / "transformer" / "config.json"), experts=1 + second, scale=_scale(vae),
                       channels=vae.get("z_dim") or vae.get("latent_channels", 16), vae=vae,
                       picture=picture or 0)  # fmt: skip
        known = json.loads((files("dreamgen.stages") / "published.json").read_text())
        if path not in known:
            raise ValueError(f"no transformer's configuration in {folder}, and no published one is known; known are "
                             f"{', '.join(known)}")  # fmt: skip
        row = known[path]
        picture = 257 * (row["config"].get("image_dim") or 0)
        return cls(config=row["config"], experts=row["experts"], scale=tuple(row["scale"]), channels=row["channels"],
                   vae=row["vae"], picture=picture)  # fmt: skip

    def require(self, path: str, canvas: tuple[int, int], frames: int, patch: int) -> None:
        """Raise ValueError for a clip that fine-tuning would refuse; see `Layout.require`."""
        (time, side), kind = self.scale, self.config["_class_name"]
        grain = max(4, time) if kind.startswith("Wan") else time  # as `WanLayout.grain`
        if (frames - 1) % grain or any(n % (side * patch) for n in canvas):
            raise ValueError(f"clips of {frames} frames of {canvas[0]}x{canvas[1]}; {path} takes 1 + a multiple of "
                             f"{grain} frames and sides that are multiples of {side * patch}")  # fmt: skip
        if self.config.get("use_learned_positional_embeddings"):
            fixed = (self.config["sample_height"] * side, self.config["sample_width"] * side)
            if (canvas, frames) != (fixed, self.config["sample_frames"]):
                raise ValueError(f"clips of {frames} frames of {canvas[0]}x{canvas[1]}; {path} has learned positions, "
                                 f"for {self.config['sample_frames']} frames of {fixed[0]}x{fixed[1]} alone"
                                 )  # fmt: skip

    def planes(self, latents: tuple[int, int, int]) -> int:
        """Channels of a clip in the cache, for latents (t h w): with the condition where that is channels, packed as
        `dreamgen.worlds.concat.pack` does."""
        if self.config["in_channels"] < 2 * self.channels:  # a clean prefix, which the latents hold
            return self.channels
        given = 1 if self.config["_class_name"].startswith("CogVideoX") else latents[0]
        cells = math.prod(latents)
        return self.channels - (-(self.channels * given * latents[1] * latents[2] + self.picture) // cells)

    def parameters(self) -> int:
        """Weights of one transformer, counted on the meta device."""
        import diffusers

        kind = getattr(diffusers, self.config["_class_name"], None)
        if kind is None:
            raise ValueError(f"diffusers has no {self.config['_class_name']}; it is too old for this model")
        with torch.device("meta"):
            built = kind.from_config({k: v for k, v in self.config.items() if not k.startswith("_")})
        return sum(p.numel() for p in built.parameters())


def plan(
    *,
    model: str,
    robot: Embodiment,
    out: Path,
    dataset: Path | None = None,
    height: int | None = None,
    width: int | None = None,
    video_hz: str | int = "10",
    frames: int = 17,
    text_length: int = 512,
    weights: str = "bf16",
    denoising_steps: int = 50,
    guidance: float = 1.0,
    dreaming: Mapping[str, Any] | None = None,
    gpu: str = "h100",
    gpus: int = 1,
    efficiency: float = 0.4,
    sharding: str = "ddp",
    steps: int = 1000,
    batch_size: int = 16,
    token_budget: int | None = None,
    accumulate: int = 1,
    lengths: Sequence[int] | None = None,
    hop: int = 1,
    copies: int = 0,
    short: str = "drop",
    method: str = "full",
    rank: int | None = None,
    lora: Mapping[str, Any] | None = None,
    expert: str = "both",
    ema: float | None = 0.995,
    validate_every: int = 250,
    samples: int = 4,
    dreams: int | None = None,
    seed: int = 0,
    record: dict,
) -> dict:
    """Write `out/plan.json` and `out/plan.txt`; returns the figures and, as `text`, the table.

    model: a folder, hub id or "tiny"; height, width: pixels of a clip, `robot`'s canvas where None. dataset: counted
    where it is there. gpu: a name of `dreamgen.engine.devices`, or "cpu" for this one; efficiency: the share of its
    peak that is expected. guidance above 1 doubles the forwards of a dream. dreaming: `steps` and `guidance` of dreams,
    where they are others than those of validation's samples, and `best_of`. dreams: how many; where None, 1,000 are
    counted, and the table says so. lora: the world model's, whose rank is taken where `rank` is None; expert: of two,
    which are trained. The rest is as in `finetune` and `dream`.

    Raises ValueError for an unknown model, device, method, sharding or expert, a GPU in use whose peak is not known,
    clips of several lengths, sizes that the model cannot take, a batch of fewer clips than parts, a dataset whose list
    of episodes cannot be read, and one in which no clip fits.
    """
    require_sharding(sharding)
    if len(set(lengths or ())) > 1:
        raise ValueError(f"lengths is {list(lengths)}; a plan is of clips of one length: give stage.lengths=[n], once "
                         "for each of them")  # fmt: skip
    frames = lengths[0] if lengths else frames
    if method not in ("full", "lora") or not 0 < efficiency <= 1 or gpus < 1:
        raise ValueError(f"method is '{method}', efficiency {efficiency}, gpus {gpus}; expected 'full' or 'lora', a "
                         "share of the peak in (0, 1], and at least 1")  # fmt: skip
    found, machine, adapter = Model.of(model), device(gpu), method == "lora"
    if not machine.bf16:
        raise ValueError(f"gpu is '{gpu}', {machine.name}, whose peak is not known; name one like it as stage.gpu: "
                         f"{', '.join(devices())}")  # fmt: skip
    if expert != "both" and (expert not in ("high", "low") or found.experts < 2):
        raise ValueError(f"expert is '{expert}'; expected 'both' or, for a model of two experts, 'high' or 'low'")
    sizes, canvas = Transformer.of(found.config), (height or robot.canvas[0], width or robot.canvas[1])
    found.require(model, canvas, frames, sizes.patch[1])
    time, side = found.scale
    latents = ((frames - 1) // time + 1, canvas[0] // side, canvas[1] // side)
    video = sizes.tokens(latents)
    if token_budget is not None and token_budget < video:
        raise ValueError(f"token_budget is {token_budget}; one clip has {video} tokens. Raise the budget or take "
                         "shorter clips.")  # fmt: skip
    batch_size = token_budget // video if token_budget is not None else batch_size
    require_rows(batch_size, gpus, accumulate)
    each = found.parameters()
    parameters = each * found.experts
    trained = lora_parameters(sizes, rank or (lora or {}).get("rank", LORA["rank"])) if adapter else each
    trained *= found.experts if expert == "both" else 1
    clips = -(-batch_size // (gpus * accumulate))
    memory = {
        on: training_memory(sizes, parameters=parameters, trained=trained, clips=clips, video=video, text=text_length,
                            lora=adapter, checkpointing=on, ema=bool(ema), weight_bytes=2 if weights == "bf16" else 4,
                            shards=gpus if sharding == "fsdp2" else 1)
        for on in (False, True)
    }  # fmt: skip
    checkpointing = memory[False].total > 0.92 * machine.memory
    forward = sizes.forward(video, text_length)
    step = batch_size * sizes.step(video, text_length, lora=adapter)
    done = batch_size * sizes.step(video, text_length, lora=adapter, checkpointing=checkpointing)
    speed = machine.bf16 * efficiency
    sampled = {"steps": denoising_steps, "guidance": guidance, "best_of": 1, **(dreaming or {})}
    dream = forward * _forwards(**sampled)
    windows, recorded = _windows(dataset, Clock(robot_hz=robot.robot_hz, video_hz=video_hz, frames=frames), hop, short)
    windows = windows and windows * (1 + copies)
    check = ROWS * forward + samples * forward * _forwards(denoising_steps, guidance)
    vae = vae_memory(found.vae, (found.channels, *latents), (frames, *canvas))
    dreaming = parameters * (2 if weights == "bf16" else 4) + vae["weights"] + vae["decode"]
    figures = {
        "model": model, "gpu": machine.name, "gpus": gpus, "efficiency": efficiency, "peak_flops": machine.bf16,
        "parameters": parameters, "trained_parameters": trained, "video_tokens": video, "text_tokens": text_length,
        "canvas": list(canvas), "frames": frames, "dataset": dataset and str(dataset), "windows": windows,
        "epochs": windows and steps * batch_size / windows,
        "forward_flops": forward, "step_flops": step, "checkpointing": checkpointing,
        "memory": {"plain": _bytes(memory[False]), "checkpointing": _bytes(memory[True]), "device": machine.memory},
        "fits": memory[checkpointing].total <= 0.92 * machine.memory,
        "vae_memory": vae, "dream_fits": dreaming <= 0.92 * machine.memory,
        "latent_cache_bytes": windows and 4 * windows * found.planes(latents) * math.prod(latents),
        "encoded_frames": windows and windows * frames, "recorded_frames": recorded,
        "validation_seconds": check / speed,
        "validation_gpu_hours": gpus * (-(-steps // validate_every) if validate_every else 1) * check / speed / 3600,
        "seconds_a_step": done / (speed * gpus), "train_gpu_hours": steps * done / speed / 3600,
        "dream_flops": dream, "dream_seconds": dream / speed, "dream_seconds_at_peak": dream / machine.bf16,
        "dreams_an_hour": 3600 * speed * gpus / dream, "dreams": dreams or DREAMS, "dreaming": sampled,
        "dream_gpu_hours": (dreams or DREAMS) * dream / speed / 3600,
    }  # fmt: skip
    text = table(figures, steps=steps, known=dreams is not None, method=method, batch_size=batch_size, hop=hop)
    write_json(out / "plan.json", {**figures, "config": record})
    (out / "plan.txt").write_text(text + "\n")
    return {**figures, "text": text}


def _scale(vae: Mapping[str, Any]) -> tuple[int, int]:
    """Frames in a latent frame and pixels along the side of a latent cell, as the pipelines take them from a VAE's
    configuration: named there, or from its down-sampling blocks."""
    time = vae.get("scale_factor_temporal") or vae.get("temporal_compression_ratio")
    side = vae.get("scale_factor_spatial") or vae.get("spatial_compression_ratio")
    if "spatio_temporal_scaling" in vae:  # LTX
        halvings = 2 ** sum(vae["spatio_temporal_scaling"])
        return time or vae["patch_size_t"] * halvings, side or vae["patch_size"] * halvings
    return time or 4, side or 2 ** (len(vae.get("block_out_channels", [0] * 4)) - 1)


def _forwards(steps: int, guidance: float, best_of: int = 1) -> int:
    """Of a dream: two a step with guidance, for each seed of which the best is kept."""
    return best_of * steps * (2 if guidance > 1 else 1)


def _bytes(memory: Memory) -> dict[str, float]:
    return {**vars(memory), "total": memory.total}


def _windows(dataset: Path | None, clock: Clock, hop: int, short: str) -> tuple[int | None, int | None]:
    """Clips and frames of a LeRobot folder, by its list of episodes; None where there is none."""
    if dataset is None or not (Path(dataset) / INFO).is_file():
        return None, None
    rows = [entry.length for entry in read_layout(Path(dataset)).entries]
    return len(Windows(rows, clock, hop=hop, short=short)), sum(rows)


def si(value: float, unit: str) -> str:
    """A figure with the prefix that keeps it between 1 and 1000."""
    scale = max((n for n in (1e15, 1e12, 1e9, 1e6) if n <= value), default=1.0)
    return f"{value / scale:.4g} {'PTGM'[[1e15, 1e12, 1e9, 1e6].index(scale)] if scale > 1 else ''}{unit}"


def table(found: dict, *, steps: int, known: bool, method: str, batch_size: int, hop: int) -> str:
    """The figures as lines of text. known: how many dreams there will be."""
    memory, vae, gb, how = found["memory"], found["vae_memory"], 1e9, found["dreaming"]
    rows = [
        ("model", f"{found['model']}: {found['parameters'] / 1e9:.3g}B parameters, "
                  f"{found['trained_parameters'] / 1e6:.4g}M of them trained ({method})"),
        ("clip", f"{found['frames']} frames of {found['canvas'][0]}x{found['canvas'][1]}: {found['video_tokens']} "
                 f"tokens of video, {found['text_tokens']} of text"),
        ("dataset", f"{found['windows']} clips, {found['epochs']:.3g} epochs, "
                    f"{found['latent_cache_bytes'] / gb:.3g} GB of latents"
                    if found["windows"] else f"none at {found['dataset']}, so it is not counted"),
        ("encoding", f"{found['encoded_frames']} frames, {found['encoded_frames'] / found['recorded_frames']:.3g} for "
                     f"each one recorded (stage.hop={hop}); not counted below"
                     if found["windows"] else "depends on the dataset"),
        ("device", f"{found['gpus']} x {found['gpu']}: {si(found['peak_flops'], 'FLOP/s')} each, of which "
                   f"{found['efficiency']:.0%} are expected; {memory['device'] / gb:.4g} GB"),
        ("forward pass", f"{si(found['forward_flops'], 'FLOP')} a clip"),
        ("memory a GPU", "".join(f"\n  {name:14} {row['total'] / gb:8.3g} GB = weights {row['weights'] / gb:.3g}, "
                                 f"gradients {row['gradients'] / gb:.3g}, optimiser {row['optimiser'] / gb:.3g}, "
                                 f"activations {row['activations'] / gb:.3g}"
                                 for name, row in memory.items() if isinstance(row, dict))),
        ("autoencoder", f"{vae['encode'] / gb:.3g} GB to encode, {vae['decode'] / gb:.3g} GB to decode "
                        f"{vae['clips']} clips at a time, beside {vae['weights'] / gb:.3g} GB of weights (fp32)"),
        ("training", f"{si(found['step_flops'], 'FLOP')} a step of {batch_size} clips"
                     f"{', with checkpointing' if found['checkpointing'] else ''}: {found['seconds_a_step']:.3g} s, "
                     f"{found['train_gpu_hours']:.3g} GPU hours for {steps} steps"),
        ("validation", f"{found['validation_seconds']:.3g} s a time on every GPU, {found['validation_gpu_hours']:.3g} "
                       "GPU hours in all (stage.validate_every, stage.samples)"),
        ("dreaming", f"{si(found['dream_flops'], 'FLOP')} a dream of {how['steps']} steps"
                     f"{', the best of ' + str(how['best_of']) if how['best_of'] > 1 else ''}: "
                     f"{found['dream_seconds']:.3g} s "
                     f"({found['dream_seconds_at_peak']:.3g} s at peak), {found['dreams_an_hour']:.3g} an hour, "
                     f"{found['dream_gpu_hours']:.3g} GPU hours for {found['dreams']}"
                     f"{'' if known else ' (stage.dreams; how many there will be is not known)'}"),
    ]  # fmt: skip
    if not found["fits"]:
        rows.append(("too large", "the step does not fit: take stage.method=lora, a larger stage.accumulate, "
                                  "stage.sharding=fsdp2 on more stage.gpus, or a smaller clip"))  # fmt: skip
    if not found["dream_fits"]:
        rows.append(("too large", "transformer and autoencoder do not fit beside what is decoded: take a smaller clip, "
                                  "world_model.weights=bf16 or another stage.gpu"))  # fmt: skip
    return "\n".join(f"{name:14} {text}" for name, text in rows)
