"""Tiny transformers of Stable Diffusion 3's kinds with random weights, in diffusers' own class and layout."""

from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel

SHAPE = {
    "sample_size": 16,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 40,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 12,
}
KINDS = {
    "3": {},
    "3.5 large": {"qk_norm": "rms_norm"},
    "3.5 medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
}


def transformer(kind: str, folder: Path | None = None, **changed) -> SD3Transformer2DModel:
    """A model in which every weight matters, written into the folder."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(**SHAPE | KINDS[kind] | changed)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases start at one and zero, where errors hide
            parameter.add_(0.3 * torch.randn_like(parameter) if parameter.ndim == 1 else 0.0)
    if folder is not None:
        model.save_pretrained(folder)
    return model.eval()
