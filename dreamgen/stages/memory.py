"""Whether a step of fine-tuning fits on this GPU, said before the first one."""

from collections.abc import Iterable, Sequence

from torch import nn

from dreamgen.engine.cost import Transformer, training_memory
from dreamgen.engine.devices import memory_left
from dreamgen.engine.precision import best_device


def require_memory(
    modules: Iterable[nn.Module],
    sizes: Transformer,
    parts: Sequence[tuple[int, int]],
    text: int,
    *,
    held: str,
    lora: bool,
    checkpointing: bool,
    ema: bool,
    accumulate: int,
    shards: int,
) -> None:
    """ValueError, saying what would fit, if a step over any of `parts` (clips, tokens) is too large for this GPU.

    modules: those that are trained, of these `sizes`: with lora what asks for gradients, else all of them, which need
    not be in fp32 yet; held: "bf16" or "fp32", what is frozen of them. The rest is as in
    `dreamgen.engine.cost.training_memory`.
    """
    if best_device().type != "cuda":
        return
    weights = [p for module in modules for p in module.parameters()]
    total, trained = (sum(p.numel() for p in weights if p.requires_grad or some) for some in (True, not lora))
    left = memory_left() + sum(p.numel() * p.element_size() for p in weights if p.is_cuda)

    def needed(clips: int, video: int, checkpointing: bool) -> float:
        return training_memory(sizes, parameters=total, trained=trained, clips=clips, video=video, text=text,
                               lora=lora, checkpointing=checkpointing, ema=ema, shards=shards,
                               weight_bytes=2 if held == "bf16" else 4).total  # fmt: skip

    clips, video = max(parts, key=lambda part: part[0] * part[1])
    if needed(clips, video, checkpointing) <= left:
        return
    less = "stage.method=lora, world_model.weights=bf16, or stage.sharding=fsdp2 on more GPUs"
    fits = [f"stage.checkpointing={str(on).lower()} with {-(-clips // k)} clips at a time (stage.accumulate="
            f"{accumulate * k})"
            for on in sorted({checkpointing, True}) for k in range(1, clips + 1)
            if needed(-(-clips // k), video, on) <= left]  # fmt: skip
    raise ValueError(f"a step of {clips} clips of {video} tokens needs about "
                     f"{needed(clips, video, checkpointing) / 1e9:.0f} GB; {left / 1e9:.0f} GB are free. What would "
                     f"fit: {fits[0] if fits else less}")  # fmt: skip
