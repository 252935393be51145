"""Speed of a fine-tuning step against the stock example trainer's: same weights, clips, texts, noise, optimiser.

stock   the VAE encodes the clips and the text encoder the prompts inside every step, as diffusers' example trainers do
ours    latents and text embeddings come from the cache on disk, read ahead in a thread; with --compile the blocks of
        the transformer are compiled, after the losses have been compared

The decoding of video files, which the stock trainer also does at every step, is left out of both. The first losses must
be equal. Rounds are interleaved; the least time of each counts.

    python benchmarks/finetune.py [--size tiny|wan2.2-5b] [--method full|lora] [--batch 16] [--rounds 5]

tiny is the base that ships, all weights trained. wan2.2-5b has random weights, a LoRA of rank 32 with checkpointing,
and 480x832x81 clips (8190 tokens); it wants a GPU of 80 GB. The last line is JSON.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from dreamgen.core.embodiment import Embodiment, Part, View  # noqa: E402
from dreamgen.core.seeding import rng_for  # noqa: E402
from dreamgen.data.cache import Cache, Embeddings  # noqa: E402
from dreamgen.engine.ahead import Ahead  # noqa: E402
from dreamgen.engine.compiling import compile_blocks  # noqa: E402
from dreamgen.engine.cost import Transformer  # noqa: E402
from dreamgen.engine.devices import device  # noqa: E402
from dreamgen.engine.precision import autocast, best_device  # noqa: E402
from dreamgen.engine.shares import moved, pinned  # noqa: E402
from dreamgen.stages.plan import Model  # noqa: E402
from dreamgen.worlds.prefix import PrefixWorld  # noqa: E402

TEXTS = ["put the red block on the plate", "open the drawer", "close the drawer", "push the button"]
LARGE = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"


def random_wan(place: torch.device) -> object:
    """Wan2.2-TI2V-5B with random weights: transformer and text encoder (UMT5-XXL) in bf16, VAE in fp32."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline
    from diffusers import WanTransformer3DModel as Wan
    from transformers import UMT5Config, UMT5EncoderModel

    from dreamgen.worlds.tiny import tokenizer

    config = {k: v for k, v in Model.of(LARGE).config.items() if not k.startswith("_")}
    torch.manual_seed(0)
    with place:
        transformer = Wan.from_config(config).to(torch.bfloat16)
        text = UMT5EncoderModel(
            UMT5Config(
                vocab_size=256384,
                d_model=4096,
                d_kv=64,
                num_heads=64,
                d_ff=10240,
                num_layers=24,
                feed_forward_proj="gated-gelu",
            )
        ).to(torch.bfloat16)
        vae = AutoencoderKLWan(
            base_dim=160, decoder_base_dim=256, z_dim=48, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
            temperal_downsample=[False, True, True], is_residual=True, patch_size=2, in_channels=12, out_channels=12,
            scale_factor_temporal=4, scale_factor_spatial=16, latents_mean=[0.0] * 48, latents_std=[1.0] * 48,
        )  # fmt: skip
    return WanImageToVideoPipeline(
        tokenizer=tokenizer(TEXTS), text_encoder=text.eval(), vae=vae.eval(), transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0), expand_timesteps=True,
    )  # fmt: skip


def open_world(size: str, method: str) -> PrefixWorld:
    """The tiny base on 17 frames of 64x64, or the large one on 81 frames of 480x832; trainable."""
    h, w = (64, 64) if size == "tiny" else (480, 832)
    robot = Embodiment(
        name="camera",
        robot_hz="10",
        views=[View(name="front", key="front", height=h, width=w)],
        action=[Part(name="move", start=0, stop=1)],
        state=[Part(name="at", start=0, stop=1)],
    )
    if size == "tiny":
        world = PrefixWorld(robot=robot, path="tiny", frames=17).place()
        world.train_lora(rank=32, alpha=32) if method == "lora" else world.train_full()
        return world
    world = PrefixWorld(robot=robot, path=LARGE, frames=81, text_length=512, weights="bf16",
                        pipeline=random_wan(best_device()))  # fmt: skip
    world.place().train_lora(rank=32, alpha=32)
    world.transformer.enable_gradient_checkpointing()
    return world


class Trainer:
    """One way to train: `batch_at(step)` on the CPU, `prepared(batch)` on the device, then a step of AdamW."""

    def __init__(self, world: PrefixWorld, batch_at: Callable[[int], dict], prepared: Callable[[dict], dict]) -> None:
        self.world, self.prepared, self.step = world, prepared, 0
        self.ahead = Ahead(lambda step: pinned(batch_at(step), world.device), 10**9)
        self.weights = [p for p in world.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.weights, lr=0.0)  # so that both ways keep the same weights

    def run(self) -> float:
        batch = self.prepared(moved(self.ahead(self.step), self.world.device))
        torch.manual_seed(self.step)
        with autocast(self.world.precision, self.world.device):
            loss, _ = self.world.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        return float(loss.detach())


def clock(place: torch.device) -> float:
    """Seconds: processor time of all threads on a CPU, where the clock on the wall measures the neighbours."""
    if place.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def peak_memory(run: Callable[[], float], place: torch.device) -> float:
    """MB that a step takes beyond what was there: on a CPU in a fork, whose peak is its own."""
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / 1e6
    reader, writer = os.pipe()
    if os.fork() == 0:
        torch.set_num_threads(1)
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        run()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        os.write(writer, str(peak - before).encode())
        os._exit(0)
    os.wait()
    return int(os.read(reader, 64)) / 1e6


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--size", default="tiny", choices=["tiny", "wan2.2-5b"])
    words.add_argument("--method", default=None, choices=["full", "lora"], help="full, or lora of the large size")
    words.add_argument("--batch", default=None, type=int, help="clips in a batch: 16, or 1 of the large size")
    words.add_argument("--compile", action="store_true", help="our blocks, as the stage does on a CPU")
    words.add_argument("--rounds", default=5, type=int)
    words.add_argument("--threads", default=1, type=int)
    given = words.parse_args()
    torch.set_num_threads(given.threads)
    count = given.batch or (16 if given.size == "tiny" else 1)
    method = (given.method or "full") if given.size == "tiny" else "lora"
    world = open_world(given.size, method)
    place, frames = world.device, world.clock.frames
    clips = rng_for(0, "clips").integers(0, 256, (2 * count, frames, *world.robot.canvas, 3), dtype=np.uint8)
    texts = [TEXTS[k % len(TEXTS)] for k in range(len(clips))]
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache(Path(folder), {"benchmark": 1}, count=len(clips), size=count)
        encode = lambda items: world.encode(torch.from_numpy(clips[items.start : items.stop])).cpu().numpy()  # noqa: E731
        begun = clock(place)
        list(cache.build(encode))
        embedded = Embeddings(Path(folder), "benchmark", TEXTS, lambda listed: world.texts.read(listed, place))
        spent = clock(place) - begun
        world.pipe.text_encoder.to(place)  # the stock trainer reads at every step
        which = np.array([TEXTS.index(text) for text in texts])

        def chosen(step: int) -> np.ndarray:
            return (np.arange(count) + step) % len(clips)

        def ours_at(step: int) -> dict[str, Tensor]:
            return {"latents": torch.from_numpy(cache.take(chosen(step))), "text": embedded.take(which[chosen(step)])}

        def stock_at(step: int) -> dict:
            return {"video": torch.from_numpy(clips[chosen(step)]), "texts": [texts[k] for k in chosen(step)]}

        @torch.no_grad()
        def stock(batch: dict) -> dict[str, Tensor]:
            prompts = [world.prompt(text) for text in batch["texts"]]
            return {"latents": world.encode(batch["video"]), "text": world.layout.embed(prompts, place)}

        ways = {"stock": Trainer(world, stock_at, stock), "ours": Trainer(world, ours_at, lambda batch: batch)}
        losses = {name: way.run() for name, way in ways.items()}
        if abs(losses["ours"] - losses["stock"]) > (1e-4 if given.size == "tiny" else 2e-2) * abs(losses["stock"]):
            sys.exit(f"error: the first losses differ, {losses}; expected the same")
        if given.compile:
            compile_blocks(world.transformer)
            stance = torch.compiler.set_stance  # the stock trainer runs the blocks as they are written
            ways["stock"].run = stance("force_eager")(ways["stock"].run)
            ways["ours"].run()
        memory = {name: peak_memory(way.run, place) for name, way in ways.items()}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        wall, waited = 0.0, ways["ours"].ahead.waited
        for _ in range(given.rounds):
            for name, way in ways.items():
                begun, on_wall = clock(place), time.perf_counter()
                way.run()
                seconds[name].append(clock(place) - begun)
                wall += (time.perf_counter() - on_wall) * (name == "ours")
        waited = (ways["ours"].ahead.waited - waited) / wall
    best = {name: min(times) for name, times in seconds.items()}
    sizes = Transformer.of({**world.transformer.config, "_class_name": "WanTransformer3DModel"})
    video = sizes.tokens(world.latent_shape[1:])
    flops = count * sizes.step(video, world.text_length, lora=method == "lora")
    peak = device("here").bf16
    print(f"{'way':<8} {'samples/s':>10} {'ratio':>6} {'of peak':>8} {'peak MB':>9}")
    for name, taken in best.items():
        share = f"{flops / taken / peak:8.1%}" if peak else f"{'?':>8}"
        print(f"{name:<8} {count / taken:10.3g} {best['stock'] / taken:6.2f} {share} {memory[name]:9.0f}")
    floor = f", floor {1e3 * flops / peak:.3g} ms" if peak else ""
    print(f"{count} clips of {video} tokens: {flops / 1e12:.3g} TFLOP a step{floor}; waited for data {waited:.2%} of "
          f"our steps; encoding once {spent / len(clips):.3g} s a clip")  # fmt: skip
    print(json.dumps({
        "name": "finetune", "ratio": best["stock"] / best["ours"], "ours": count / best["ours"],
        "peer": count / best["stock"], "unit": "samples/s", "data_wait": waited,
        "of_peak": flops / best["ours"] / peak if peak else None, "peak_mb": memory,
        "settings": {"size": given.size, "batch": count, "frames": frames, "canvas": list(world.robot.canvas),
                     "tokens": video, "method": method, "checkpointing": given.size != "tiny",
                     "rounds": given.rounds, "compile": given.compile, "torch": torch.__version__,
                     "clock": "wall" if place.type == "cuda" else "processor seconds"},
        "device": torch.cuda.get_device_name() if place.type == "cuda" else f"cpu, {given.threads} thread",
    }))  # fmt: skip


if __name__ == "__main__":
    main()
