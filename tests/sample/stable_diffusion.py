"""A tiny pipeline of Stable Diffusion 3's kinds with random weights, as diffusers writes it."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5EncoderModel

from tests.conditioning.writing import clip_tokenizer, t5_config, t5_tokenizer
from tests.dit_video.released import transformer


def pipeline(kind: str, folder: Path, *, with_t5: bool = True) -> StableDiffusion3Pipeline:
    """The parts of one, written into the folder. Its pictures are 4 pixels to a latent cell."""
    torch.manual_seed(1)
    first, second = clip_tokenizer(), clip_tokenizer(pad_token="!")  # as CLIP-G is released
    sentences = t5_tokenizer()
    built = StableDiffusion3Pipeline(
        transformer=transformer(kind),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        text_encoder=tower(first, width=16, projection=8),
        tokenizer=first,
        text_encoder_2=tower(second, width=20, projection=12),
        tokenizer_2=second,
        text_encoder_3=T5EncoderModel(t5_config(len(sentences), 40)).eval() if with_t5 else None,
        tokenizer_3=sentences if with_t5 else None,
    )
    built.save_pretrained(folder)
    built.set_progress_bar_config(disable=True)
    return built


def tower(tokenizer, width: int, projection: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=2, projection_dim=projection, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config).eval()


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 64, 64), layers_per_block=1, latent_channels=16,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip
