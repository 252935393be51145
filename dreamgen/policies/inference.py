"""The K Euler steps of acting, with all that does not change between them computed once.

The observation's keys and values, the state token and the future tokens are the same in every step; what depends on
the flow time alone (AdaLN, the time half of the action encoder) is computed for all K times at once; of the last layer
only the chunk is wanted. The result is that of `euler` over `FlowPolicy.velocity`, up to rounding. Looking is a hundred
small operations, which a small policy takes longer to start than to do; compiled, they take a sixth of the time.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from dreamgen.engine.precision import autocast


def integrate(
    policy: Any,
    noise: Float[Tensor, "b h a"],
    state: Float[Tensor, "b 1 w"],
    plan: Float[Tensor, "b h w"],
    context: list,
    steps: int,
    body: int,
) -> Float[Tensor, "b h a"]:
    """From noise to a chunk in `steps` Euler steps, all rows of one body."""
    dit, encode, horizon = policy.dit, policy.encode_action, policy.horizon
    t = torch.arange(steps, device=noise.device, dtype=torch.float32) / steps
    time = F.silu(dit.time_embedding(dit.time_proj(t * 1000).to(noise.dtype)))
    gates = [block.modulate(time).chunk(2, dim=-1) for block in dit.blocks]
    out_scale, out_shift = dit.modulate_out(time).chunk(2, dim=-1)
    width = dit.width
    inner, late = encode.layer2.weight[body].split(width)
    late = encode.time(t * 1000).to(noise.dtype) @ late + encode.layer2.bias[body]
    head = state
    if policy.flare:
        head = torch.cat([state, policy.flare.tokens.expand(len(noise), -1, -1)], 1)
    entries = policy.spaces.entries(body, noise.device)
    x, last = noise, len(dit.blocks) - 1
    for k in range(steps):
        chunk = encode.layer3(F.silu(encode.layer1(x, body) @ inner + late[k]), body) + plan
        y = torch.cat([head, chunk], 1)
        for number, (block, kv, (scale, shift)) in enumerate(zip(dit.blocks, context, gates, strict=True)):
            if number == last and block.crosses:
                y = y[:, -horizon:]
            y = block.modulated(y, scale[k], shift[k], kv, None)
        y = dit.out(dit.norm_out(y[:, -horizon:]) * (1 + out_scale[k]) + out_shift[k])
        u = policy.decode_action(y, body).float()
        x = x + (u if entries is None else u * entries) / steps
    return x


def see(policy: Any, pictures: Tensor, words: Tensor, states: Float[Tensor, "b d"], known: Tensor,
        body: int) -> tuple[list, Float[Tensor, "b h w"], Float[Tensor, "b 1 w"]]:  # fmt: skip
    """What the Euler steps read of observations: keys and values, what is known of each step, the state token."""
    tokens = policy.encode(pictures, words)
    state = policy.state_token(states, known, body)
    return policy.dit.context(tokens), policy.plan(tokens, state), state


def chunk(policy: Any, noise: Float[Tensor, "b h a"], inputs: Sequence[Tensor], steps: int,
          body: int) -> Float[Tensor, "b h a"]:  # fmt: skip
    """From the tensors of observations to a chunk: `see`, then `integrate`."""
    large = policy.dit.width >= 512  # below, a product takes less than to ask who shall do it
    with autocast("fp32", noise.device) if large else contextlib.nullcontext():
        context, plan, state = see(policy, *inputs, body)
        return integrate(policy, noise, state, plan, context, steps, body)


@functools.cache
def compiled(mode: str | None, device: str) -> Callable[..., Tensor]:
    """`chunk` through torch.compile with this mode ("default", "reduce-overhead", "max-autotune"), or as it is for
    null. On a CPU kernels are called from C++, which saves a fifth of the time. Compiling takes up to minutes at the
    first call with a batch size."""
    if mode is None:
        return chunk
    if device != "cpu":
        return torch.compile(chunk, mode=mode, dynamic=False)
    import torch._inductor as inductor

    options: dict[str, Any] = {**inductor.list_mode_options(mode), "cpp_wrapper": True}
    return torch.compile(chunk, options=options, dynamic=False)
