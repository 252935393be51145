"""The tiny base: a diffusers pipeline in the layout of Wan2.2-TI2V, small enough for two cores.

Clean first latent frame, per-token timesteps, a residual VAE on pixel patches, a UMT5 with its own tokenizer.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanResample, WanResidualBlock
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

# words of the trade, so that instructions the base never saw still split into known pieces
WORDS = (
    "a an the and or of on in into onto from to with at up down left right front back forward backward away off out "
    "over under near between pick place put push pull open close press lift stack turn rotate slide move grasp release "
    "reach insert remove pour wipe fold hang drop throw hit sweep unlock lock unplug assemble soccer basketball ball "
    "block cube cup plate bowl box drawer door window handle button lever dial faucet peg plug stick shelf wall hammer "
    "nail coffee mug machine pot lid table counter bin basket bottle can towel spoon fork knife pear potato meat salt "
    "cupcake apple red green blue yellow orange purple black white brown pink grey robot arm gripper hand it its is "
    "goal target side top bottom hole nut disassemble plunger sweet first then while do nothing view camera shows"
).split()


@dataclass(frozen=True, kw_only=True)
class TinyLayout:
    """Sizes of the tiny base. Defaults are those of the one that ships.

    The VAE takes patches of `vae_patch` pixels and halves space and time between the levels of `vae_widths`, which are
    multiples of `vae_dim` (decoder: `vae_decoder_dim`). Wan2.2 has four levels and time by 4; few levels learn faster.
    """

    z_dim: int = 64
    vae_dim: int = 32
    vae_decoder_dim: int = 40
    vae_patch: int = 4
    vae_widths: Sequence[int] = (2, 2)
    vae_blocks: int = 1
    width: int = 320
    heads: int = 5
    ffn: int = 960
    layers: int = 5
    text_width: int = 128
    text_layers: int = 2
    shift: float = 5.0


def tokenizer(instructions: Iterable[str], *, size: int = 768) -> PreTrainedTokenizerFast:
    """A unigram tokenizer with T5's special tokens, learned from `instructions` and everyday words of the trade."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    corpus = sorted(set(instructions)) * 20 + [" ".join(WORDS)] * 5 + list(WORDS) * 3
    piece = Tokenizer(models.Unigram())
    piece.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    piece.pre_tokenizer = pre_tokenizers.Metaspace()
    piece.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False,
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz0123456789.,'-"),
    )  # fmt: skip
    piece.train_from_iterator(corpus, trainer)
    # the trainer adds up, and scores the characters that it never saw, in any order: settle both, so that a seed gives
    # the same tokenizer every time
    seen = set("".join(corpus).lower()) | {"\u2581"}
    learned = json.loads(piece.to_str())["model"]["vocab"]
    vocab = [(text, round(score, 6) if len(text) > 1 or text in seen else -20.0) for text, score in learned]
    piece.model = models.Unigram(vocab[:3] + sorted(vocab[3:], key=lambda row: (-row[1], row[0])), unk_id=2)
    piece.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", piece.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=piece, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def _quiet(vae: AutoencoderKLWan) -> None:
    """Let the VAE start on its parameter-free shortcuts: residual branches at 0, little noise on the latents."""
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
        elif isinstance(module, WanResample):
            nn.init.zeros_(module.resample[1].weight)
            nn.init.zeros_(module.resample[1].bias)
        elif isinstance(module, WanAttentionBlock):
            nn.init.zeros_(module.proj.weight)
            nn.init.zeros_(module.proj.bias)
    with torch.no_grad():
        half = vae.config.z_dim
        vae.quant_conv.weight[half:] = 0
        vae.quant_conv.bias[half:] = -6


def build(layout: TinyLayout, instructions: Iterable[str], *, seed: int = 0) -> WanImageToVideoPipeline:
    """An untrained pipeline of this layout; its weights depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        words = tokenizer(instructions)
        halvings, pixels = len(layout.vae_widths) - 1, 3 * layout.vae_patch**2
        vae = AutoencoderKLWan(
            base_dim=layout.vae_dim, decoder_base_dim=layout.vae_decoder_dim, z_dim=layout.z_dim,
            dim_mult=list(layout.vae_widths), num_res_blocks=layout.vae_blocks, attn_scales=[],
            temperal_downsample=[True] * halvings, is_residual=True, patch_size=layout.vae_patch, in_channels=pixels,
            out_channels=pixels, scale_factor_temporal=2**halvings,
            scale_factor_spatial=layout.vae_patch * 2**halvings, latents_mean=[0.0] * layout.z_dim,
            latents_std=[1.0] * layout.z_dim,
        )  # fmt: skip
        _quiet(vae)
        text_encoder = UMT5EncoderModel(UMT5Config(
            vocab_size=len(words), d_model=layout.text_width, d_kv=layout.text_width // 4, num_heads=4,
            d_ff=2 * layout.text_width, num_layers=layout.text_layers, dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
            decoder_start_token_id=0, tie_word_embeddings=True,
        ))  # fmt: skip
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=layout.heads, attention_head_dim=layout.width // layout.heads,
            in_channels=layout.z_dim, out_channels=layout.z_dim, text_dim=layout.text_width, freq_dim=128,
            ffn_dim=layout.ffn, num_layers=layout.layers, rope_max_seq_len=128,
        )  # fmt: skip
    return WanImageToVideoPipeline(
        tokenizer=words, text_encoder=text_encoder.eval(), vae=vae.eval(), transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=layout.shift), expand_timesteps=True,
    )  # fmt: skip
