"""A tiny random pipeline of every class that is a world model, in a folder as `save_pretrained` makes it."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXTransformer3DModel,
    Cosmos2_5_PredictBasePipeline,
    Cosmos2VideoToWorldPipeline,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    LTXImageToVideoPipeline,
    LTXVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)

from dreamgen.core.embodiment import Embodiment, Part, View
from dreamgen.worlds.cogvideox import CogVideoXWorld
from dreamgen.worlds.concat import ConcatWorld
from dreamgen.worlds.cosmos import Cosmos2World, CosmosWorld, Unguarded
from dreamgen.worlds.ltx import LtxWorld
from dreamgen.worlds.prefix import PrefixWorld
from dreamgen.worlds.tiny import tokenizer
from dreamgen.worlds.world import VideoWorld

TEXTS = ["open the drawer", "put the red block on the plate", "close the drawer"]
WORLDS: dict[str, type[VideoWorld]] = {
    "wan22_ti2v_5b": PrefixWorld, "ltx_video": LtxWorld, "cosmos_predict25_2b": CosmosWorld,
    "cosmos_predict2_2b": Cosmos2World, "wan21_i2v_14b": ConcatWorld, "wan22_i2v_a14b": ConcatWorld,
    "cogvideox_5b_i2v": CogVideoXWorld,
}  # fmt: skip
FRAMES, LENGTH = 9, 18
CHAT = "{% for m in messages %}{{ m['role'] }} {% for c in m['content'] %}{{ c['text'] }} {% endfor %}{% endfor %}"


def robot(height: int = 16, width: int = 32, views: tuple[str, ...] = ("front",)) -> Embodiment:
    """A robot whose picture is not square; LTX takes multiples of 32."""
    return Embodiment(
        name="toy", robot_hz="20", action=[Part(name="move", start=0, stop=3, kind="delta")],
        state=[Part(name="pose", start=0, stop=2)],
        views=[View(name=v, key=f"observation.images.{v}", height=height, width=width // len(views)) for v in views],
    )  # fmt: skip


def length(name: str) -> int:
    """Tokens of a prompt; Predict2.5 reads it in a chat, Wan2.1 knows a picture's tokens by their number."""
    return {"cosmos_predict25_2b": 85, "wan21_i2v_14b": 512}.get(name, LENGTH)


def sizes(name: str) -> tuple[int, int]:
    return (32, 64) if name == "ltx_video" else (16, 32)


def _wan_vae(z: int = 4) -> AutoencoderKLWan:
    vae = AutoencoderKLWan(base_dim=4, z_dim=z, dim_mult=[1, 1, 1, 1], num_res_blocks=1, attn_scales=[],
                           temperal_downsample=[False, True, True], latents_mean=[0.1 * i for i in range(z)],
                           latents_std=[0.5 + 0.1 * i for i in range(z)])  # fmt: skip
    with torch.no_grad():  # some stock pipelines draw from the posterior: it is a point here
        vae.quant_conv.weight[z:], vae.quant_conv.bias[z:] = 0, -30
        vae.decoder.conv_out.weight.mul_(8)  # pictures with contrast
    return vae.eval()


def _wan_transformer(inputs: int, z: int = 4, **options: Any) -> WanTransformer3DModel:
    return WanTransformer3DModel(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=inputs,
                                 out_channels=z, text_dim=16, freq_dim=16, ffn_dim=20, num_layers=2,
                                 rope_max_seq_len=32, **options).eval()  # fmt: skip


def _t5(words: Any) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=len(words), d_model=16, d_kv=4, num_heads=4, d_ff=20, num_layers=1,
                                   dropout_rate=0.0, pad_token_id=0)).eval()  # fmt: skip


def _cosmos_transformer(**options: Any) -> CosmosTransformer3DModel:
    return CosmosTransformer3DModel(in_channels=5, out_channels=4, num_attention_heads=2, attention_head_dim=12,
                                    num_layers=2, mlp_ratio=2, text_embed_dim=16, adaln_lora_dim=4,
                                    max_size=(8, 32, 32), rope_scale=(1.0, 3.0, 3.0), extra_pos_embed_type=None,
                                    **options).eval()  # fmt: skip


def build(name: str) -> Any:
    """The pipeline of this name in `conf/world_model`, tiny and random; its weights depend on nothing else."""
    torch.manual_seed(3)
    words = tokenizer(TEXTS)
    euler = FlowMatchEulerDiscreteScheduler
    if name == "ltx_video":
        four, five = (8, 8, 8, 8), (1, 1, 1, 1, 1)
        vae = AutoencoderKLLTXVideo(
            latent_channels=8, block_out_channels=four, decoder_block_out_channels=four, layers_per_block=five,
            decoder_layers_per_block=five, spatio_temporal_scaling=(True, True, True, False),
            decoder_spatio_temporal_scaling=(True, True, True, False), decoder_inject_noise=(False,) * 5,
            upsample_residual=(False,) * 4, upsample_factor=(1,) * 4, patch_size=1, patch_size_t=1,
        ).eval()  # fmt: skip
        vae.latents_mean, vae.latents_std = 0.1 * torch.arange(8.0), 0.5 + 0.1 * torch.arange(8.0)
        transformer = LTXVideoTransformer3DModel(in_channels=8, out_channels=8, num_attention_heads=2,
                                                 attention_head_dim=12, cross_attention_dim=24, num_layers=2,
                                                 caption_channels=16).eval()  # fmt: skip
        times = euler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024,
                      max_image_seq_len=4096, shift_terminal=0.1)  # fmt: skip
        return LTXImageToVideoPipeline(times, vae, _t5(words), words, transformer)
    if name == "cogvideox_5b_i2v":
        vae = AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        ).eval()  # fmt: skip
        with torch.no_grad():
            vae.encoder.conv_out.conv.weight[4:], vae.encoder.conv_out.conv.bias[4:] = 0, -30
        transformer = CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=8, out_channels=4, time_embed_dim=8,
            text_embed_dim=16, num_layers=2, sample_width=4, sample_height=2, sample_frames=FRAMES,
            max_text_seq_length=LENGTH, use_rotary_positional_embeddings=True, use_learned_positional_embeddings=True,
        ).eval()  # fmt: skip
        times = CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=1.0,
                                       timestep_spacing="trailing", clip_sample=False)  # fmt: skip
        return CogVideoXImageToVideoPipeline(words, _t5(words), vae, transformer, times)
    if name == "cosmos_predict2_2b":
        return Cosmos2VideoToWorldPipeline(_t5(words), words, _cosmos_transformer(), _wan_vae(),
                                           euler(use_karras_sigmas=True), Unguarded())  # fmt: skip
    if name == "cosmos_predict25_2b":
        words.chat_template = CHAT
        config = Qwen2_5_VLConfig(
            text_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                         "num_key_value_heads": 2, "vocab_size": len(words), "pad_token_id": 0, "bos_token_id": 1,
                         "eos_token_id": 1,
                         "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6}},
            vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
                           "out_hidden_size": 16},
        )  # fmt: skip
        text = Qwen2_5_VLForConditionalGeneration(config).eval()
        transformer = _cosmos_transformer(use_crossattn_projection=True, crossattn_proj_in_channels=32,
                                          encoder_hidden_states_channels=16)  # fmt: skip
        times = UniPCMultistepScheduler(use_karras_sigmas=True, use_flow_sigmas=True, sigma_max=200.0, sigma_min=0.01,
                                        prediction_type="flow_prediction")  # fmt: skip
        return Cosmos2_5_PredictBasePipeline(text, words, transformer, _wan_vae(), times, Unguarded())
    given: dict[str, Any] = {"expand_timesteps": True, "scheduler": euler(shift=5.0)}
    inputs, options = 4, {}
    if name == "wan21_i2v_14b":
        inputs, options = 12, {"image_dim": 8, "added_kv_proj_dim": 24}
        vision = CLIPVisionConfig(hidden_size=8, intermediate_size=12, projection_dim=8, num_hidden_layers=2,
                                  num_attention_heads=2, image_size=4, patch_size=2)  # fmt: skip
        given |= {"expand_timesteps": False, "image_encoder": CLIPVisionModel(vision).eval(),
                  "image_processor": CLIPImageProcessor(size=4, crop_size=4),
                  "scheduler": UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0,
                                                       prediction_type="flow_prediction")}  # fmt: skip
    if name == "wan22_i2v_a14b":
        inputs = 12
        given |= {"expand_timesteps": False, "boundary_ratio": 0.9, "transformer_2": _wan_transformer(inputs)}
    return WanImageToVideoPipeline(tokenizer=words, text_encoder=_t5(words), vae=_wan_vae(),
                                   transformer=_wan_transformer(inputs, **options), **given)  # fmt: skip


def save(name: str, folder: Path) -> Path:
    """Write the pipeline; its transformers speak up, since fresh ones may predict zeros."""
    pipe = build(name)
    with torch.no_grad():
        for part in ("transformer", "transformer_2"):
            for parameter in getattr(getattr(pipe, part, None), "parameters", list)():
                parameter.add_(0.05 * torch.randn_like(parameter))
    pipe.save_pretrained(folder)
    return folder


def world(name: str, folder: Path | str, **settings: Any) -> VideoWorld:
    """The tiny pipeline as a world model."""
    extra = {"guardrail": False} if name.startswith("cosmos") else {}
    defaults = {"robot": robot(*sizes(name)), "frames": FRAMES, "steps": 3, "guidance": 2.5, "precision": "fp32",
                "text_length": length(name)}  # fmt: skip
    return WORLDS[name](**{"path": str(folder), **defaults, **extra, **settings})
