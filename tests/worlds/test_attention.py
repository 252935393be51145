"""Attention backends beside torch's own: of which dtype what reaches them is, and which models refuse them."""

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.transformers import transformer_cosmos, transformer_wan

from tests.worlds import zoo
from tests.worlds.test_models import prompts

BF16 = {torch.bfloat16}


@pytest.fixture
def reached(monkeypatch):
    """Dtypes of queries, keys and values as they come to the attention, under a norm such as CUDA's autocast makes."""
    found, norm = [], torch.nn.RMSNorm.forward

    def dispatch(query, key, value, **given):
        found.append({query.dtype, key.dtype, value.dtype})
        return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))
                                                                ).transpose(1, 2)  # fmt: skip

    monkeypatch.setattr(torch.nn.RMSNorm, "forward", lambda self, x: norm(self, x.float()))
    for module in (transformer_wan, transformer_cosmos):
        monkeypatch.setattr(module, "dispatch_attention_fn", dispatch)
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)
    return found


@pytest.mark.parametrize("name", ["wan22_ti2v_5b", "wan21_i2v_14b", "wan22_i2v_a14b", "cosmos_predict2_2b"])
def test_queries_and_keys_reach_other_kernels_as_values_do(name, tmp_path, reached):
    folder = zoo.save(name, tmp_path / "toy")

    def dreamt(precision: str, backend: str | None):
        reached.clear()
        world = zoo.world(name, folder, precision=precision, attention_backend=backend, steps=1)
        return world, world.dream(prompts(name, 1))[0].video

    world, video = dreamt("bf16", "flex")
    assert reached and all(kinds == BF16 for kinds in reached)
    world.save(tmp_path / "saved")
    assert all("hook" not in key for key in world.state_dict())
    plain, _ = dreamt("bf16", None)
    assert plain.state_dict().keys() == world.state_dict().keys()
    assert any(torch.float32 in kinds for kinds in reached)  # torch's own casts them
    exact = dreamt("fp32", "flex")[1]
    assert (exact == dreamt("fp32", None)[1]).all() and all(kinds == {torch.float32} for kinds in reached)


def test_backends_that_a_model_cannot_use_are_refused(tmp_path, monkeypatch):
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)
    masked = ("flash", "_flash_3", "sage", "_sage_qk_int8_pv_fp8_cuda", "_native_flash")
    torchs = ("flash", "flex", "_native_cudnn")
    for name, bad, words in (
        ("ltx_video", masked, "takes no mask"), ("cogvideox_5b_i2v", torchs, "by torch, whatever"),
    ):  # fmt: skip
        folder = zoo.save(name, tmp_path / name)
        for backend in bad:
            with pytest.raises(ValueError, match=f"attention_backend is '{backend}'.*{words}.*expected native"):
                zoo.world(name, folder, attention_backend=backend)
        zoo.world(name, folder, attention_backend="native")
        zoo.world(name, folder)
