"""Speed of dreaming against the stock pipeline, called in a loop over distinct prompts, under equal settings.

stock     WanImageToVideoPipeline, one call a prompt (it takes one picture and repeats it over a batch): text and its
          negative encoded for every call, guidance in two passes, VAE decode at the end. For this layout (Wan2.2-TI2V)
          it encodes the first picture alone, as we do; the black frames that it encodes elsewhere are not in this row
ours      distinct prompts in batches, each text and first frame encoded once; the same noise, so the frames must be
          equal but for rounding, which is checked first
others    what the knobs do: guidance in two passes, other batches, bf16

On a CPU the ratio is of processor seconds, since the clock on the wall measures the neighbours; both are in the JSON.
The floor is the FLOPs of the transformer alone (methods: 12 d^2 L + 4 d^2 T + 4 d f L + 4 L^2 d + 4 L T d a layer).

    python benchmarks/dream.py                      # the base that ships, 32 prompts, on this CPU
    python benchmarks/dream.py --tiny               # an untrained base, in seconds: does it run?
    python benchmarks/dream.py --size wan2.2-5b     # random weights, 480x832x81, on a GPU
    python benchmarks/dream.py --size wan2.2-5b-long  # 31,680 tokens a forward pass
    python benchmarks/dream.py --size wan2.2-5b --compile  # our blocks compiled

The last line is JSON.
"""

import argparse
import json
import math
import re
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from dreamgen.core.clip import Prompt  # noqa: E402
from dreamgen.core.embodiment import Embodiment, Part, View  # noqa: E402
from dreamgen.engine.devices import device  # noqa: E402
from dreamgen.engine.precision import best_device  # noqa: E402
from dreamgen.worlds.layout import locate  # noqa: E402
from dreamgen.worlds.prefix import PrefixWorld  # noqa: E402
from dreamgen.worlds.texts import Texts  # noqa: E402
from dreamgen.worlds.tiny import TinyLayout, build, tokenizer  # noqa: E402

TEXTS = ["put the red block on the plate", "open the drawer", "close the drawer", "press the button"]
SMALL = TinyLayout(
    z_dim=8, vae_dim=8, vae_decoder_dim=8, width=32, heads=2, ffn=48, layers=2, text_width=32, text_layers=1
)


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model and a clip. text: tokens of a prompt; prompts, steps: how many are dreamed, in how many steps."""

    height: int
    width: int
    frames: int
    text: int
    prompts: int
    steps: int
    guidance: float
    batch: int
    others: tuple[tuple[int, str, str], ...] = ()  # batch, guidance mode, precision of what is not held in bf16


SIZES = {
    "tiny": Size(height=32, width=48, frames=9, text=16, prompts=4, steps=2, guidance=2.0, batch=4,
                 others=((2, "two_pass", "fp32"),)),
    "base": Size(height=64, width=64, frames=17, text=32, prompts=32, steps=4, guidance=2.0, batch=16,
                 others=((16, "two_pass", "fp32"), (4, "batched", "fp32"), (16, "batched", "auto"))),
    "wan2.2-5b": Size(height=480, width=832, frames=81, text=512, prompts=2, steps=8, guidance=5.0, batch=1,
                      others=((1, "two_pass", "fp32"), (2, "batched", "fp32"), (1, "batched", "bf16"))),
    "wan2.2-5b-long": Size(height=704, width=1280, frames=141, text=512, prompts=1, steps=2, guidance=1.0, batch=1),
}  # fmt: skip


def pipeline(name: str) -> WanImageToVideoPipeline:
    """The base that ships, an untrained small one, or Wan2.2-TI2V-5B's transformer and VAE with random weights."""
    if name == "base":
        return WanImageToVideoPipeline.from_pretrained(locate("tiny"))
    if name == "tiny":
        return build(SMALL, TEXTS)
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    words = tokenizer(TEXTS)
    with torch.device(best_device()):
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=24, attention_head_dim=128, in_channels=48, out_channels=48,
            text_dim=4096, freq_dim=256, ffn_dim=14336, num_layers=30,
        ).to(torch.bfloat16)  # fmt: skip
        vae = AutoencoderKLWan(
            base_dim=160, decoder_base_dim=256, z_dim=48, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
            temperal_downsample=[False, True, True], is_residual=True, in_channels=12, out_channels=12, patch_size=2,
            scale_factor_spatial=16, scale_factor_temporal=4, latents_mean=[0.0] * 48, latents_std=[1.0] * 48,
        )  # fmt: skip
        # one layer in place of the 24 of UMT5-XXL: it is encoded once a text, here and there
        text = UMT5EncoderModel(UMT5Config(vocab_size=len(words), d_model=4096, d_kv=64, num_heads=64, d_ff=10240,
                                           num_layers=1, dropout_rate=0.0, tie_word_embeddings=True))  # fmt: skip
    return WanImageToVideoPipeline(
        tokenizer=words, text_encoder=text.to(torch.bfloat16).eval(), vae=vae.eval(), transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0), expand_timesteps=True,
    )  # fmt: skip


def made(pipe: WanImageToVideoPipeline, size: Size, mode: str, precision: str, compiled: bool) -> PrefixWorld:
    """Our world model around the same weights."""
    robot = Embodiment(name="bench", robot_hz="20", action=[Part(name="move", start=0, stop=3, kind="delta")],
                       views=[View(name="front", key="front", height=size.height, width=size.width)])  # fmt: skip
    held = "bf16" if pipe.transformer.dtype == torch.bfloat16 else "fp32"
    return PrefixWorld(robot=robot, pipeline=pipe, frames=size.frames, steps=size.steps, guidance=size.guidance,
                       text_length=size.text, guidance_mode=mode, precision=precision, weights=held,
                       compile=compiled)  # fmt: skip


def prompts(size: Size) -> list[Prompt]:
    """Distinct pictures and seeds; few texts, as robots have."""
    rng = np.random.default_rng(0)
    return [Prompt(id=f"p{i}", instruction=TEXTS[i % len(TEXTS)], seed=9 + i,
                   image=rng.integers(0, 256, (size.height, size.width, 3), np.uint8))
            for i in range(size.prompts)]  # fmt: skip


def stock(pipe: WanImageToVideoPipeline, world: PrefixWorld, size: Size, listed: list[Prompt]) -> list[np.ndarray]:
    """One call a prompt, with the noise that ours draws for it."""
    found = []
    for prompt in listed:
        frames = pipe(
            image=Image.fromarray(prompt.image), prompt=prompt.instruction, negative_prompt="", height=size.height,
            width=size.width, num_frames=size.frames, num_inference_steps=size.steps, guidance_scale=size.guidance,
            latents=world.noise([prompt]), max_sequence_length=size.text, output_type="np",
        ).frames[0]  # fmt: skip
        found.append((frames * 255).round().astype(np.uint8))
    return found


def ours(world: PrefixWorld, batch: int, listed: list[Prompt]) -> list[np.ndarray]:
    """Batches of distinct prompts."""
    world.texts = Texts(world.layout)  # encoded anew in every round, as elsewhere
    return [clip.video for i in range(0, len(listed), batch) for clip in world.dream(listed[i : i + batch])]


def flops(world: PrefixWorld, size: Size) -> float:
    """Of the transformer, for all prompts."""
    config, tokens, text = world.transformer.config, world.clip_tokens, size.text
    d, f = config.num_attention_heads * config.attention_head_dim, config.ffn_dim
    layer = 12 * d * d * tokens + 4 * d * d * text + 4 * d * f * tokens + 4 * tokens**2 * d + 4 * tokens * text * d
    return float(config.num_layers * layer * size.steps * (2 if size.guidance > 1 else 1) * size.prompts)


def timed(run: Callable[[], Any]) -> tuple[Any, float, float, float]:
    """Result, seconds on the wall, seconds that count, and peak memory in GiB."""
    cuda = best_device().type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # Linux counts the peak anew
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    if cuda:
        torch.cuda.synchronize()
        seconds = time.perf_counter() - wall
        return result, seconds, seconds, torch.cuda.max_memory_allocated() / 2**30
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    status = Path("/proc/self/status")
    told = re.search(r"VmHWM:\s+(\d+) kB", status.read_text() if status.exists() else "")
    peak = int(told[1]) if told else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return result, wall, cpu, peak / 2**20


def apart(left: list[np.ndarray], right: list[np.ndarray]) -> tuple[int, float]:
    """Largest difference in levels of 255, and PSNR in dB."""
    gap = np.abs(np.stack(left).astype(int) - np.stack(right).astype(int))
    return int(gap.max()), float(10 * math.log10(255**2 / max((gap**2).mean(), 1e-9)))


def check(gap: tuple[int, float], large: bool) -> None:
    """End with an error where the frames are not equal but for rounding (weights in bf16 round each way's sums)."""
    if gap[0] > (8 if large else 2) and gap[1] < 40:
        sys.exit(f"error: frames differ by {gap[0]} levels ({gap[1]:.1f} dB) under equal settings")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=sorted(SIZES), default="base")
    parser.add_argument("--tiny", action="store_true", help="the same as --size tiny")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of ours")
    parser.add_argument("--alone", action="store_true", help="leave out the rows of other knobs")
    parser.add_argument("--prompts", type=int, help="fewer or more than the size has")
    parser.add_argument("--steps", type=int, help="of the sampler")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    name = "tiny" if given.tiny else given.size
    size, large = SIZES[name], name.startswith("wan")
    size = replace(size, prompts=given.prompts or size.prompts, steps=given.steps or size.steps)
    if large and best_device().type == "cpu":
        sys.exit(f"error: --size {name} needs a GPU; none was found")
    theirs, pipe = pipeline(name).to(best_device()), pipeline(name).to(best_device())
    theirs.set_progress_bar_config(disable=True)
    world, listed = made(pipe, size, "batched", "fp32", given.compile).place(), prompts(size)
    ways: dict[str, Callable[[], list[np.ndarray]]] = {"stock": lambda: stock(theirs, world, size, listed),
                                                       "ours": lambda: ours(world, size.batch, listed)}  # fmt: skip
    for batch, mode, precision in () if given.alone else size.others:
        other = made(pipe, size, mode, precision, False).place()
        ways[f"batch {batch}, {mode}, {precision}"] = lambda w=other, b=batch: ours(w, b, listed)
    few = listed[: min(size.batch, 2)]  # warms up, and says first whether the frames are equal
    check(apart(stock(theirs, world, size, few), ours(world, size.batch, few)), large)
    found, rows = {}, {way: [] for way in ways}
    for number in range(given.rounds):
        for way, run in ways.items():
            if number == 0 or way in ("stock", "ours"):
                found[way], *times = timed(run)
                rows[way].append(times)
    gaps = {way: apart(found["stock"], clips) for way, clips in found.items()}
    check(gaps["ours"], large)
    best = {way: min(times, key=lambda row: row[1]) for way, times in rows.items()}
    here, floor = device("here"), flops(world, size)
    print(f"{name}: {size.prompts} clips of {size.frames}x{size.height}x{size.width}, {size.steps} steps, guidance "
          f"{size.guidance}, {world.clip_tokens} tokens; {floor / 1e12:.2f} TFLOP; peak of {here.name} "
          f"{here.bf16 / 1e12:.2f} TFLOP/s in its best precision")  # fmt: skip
    print(f"{'way':<28} {'s':>8} {'s (wall)':>9} {'ratio':>6} {'clips/s':>8} {'of peak':>8} {'GiB':>6} {'differs':>12}")
    for way, (wall, seconds, peak) in best.items():
        share = floor / seconds / here.bf16 if here.bf16 else math.nan
        print(f"{way:<28} {seconds:8.2f} {wall:9.2f} {best['stock'][1] / seconds:6.2f} {size.prompts / seconds:8.3f} "
              f"{share:8.1%} {peak:6.2f} {gaps[way][0]:3d} {gaps[way][1]:5.1f} dB")  # fmt: skip
    print(json.dumps({
        "name": f"dream {name}", "ratio": best["stock"][1] / best["ours"][1], "ours": best["ours"][1] / size.prompts,
        "peer": best["stock"][1] / size.prompts, "ratio_wall": best["stock"][0] / best["ours"][0],
        "share_of_peak": floor / best["ours"][1] / here.bf16 if here.bf16 else None, "floor_tflop": floor / 1e12,
        "peak_gib": {way: row[2] for way, row in best.items()},
        "others": {way: row[1] / size.prompts for way, row in best.items()},
        "differs": {way: {"levels": gap[0], "psnr": gap[1]} for way, gap in gaps.items()},
        "settings": {"size": name, **{k: v for k, v in vars(size).items() if k != "others"},
                     "precision": "bf16 weights" if large else "fp32", "compile": given.compile,
                     "rounds": given.rounds, "threads": given.threads,
                     "seconds": "wall" if best_device().type == "cuda" else "processor"},
        "device": here.name,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
