"""Small autoencoders of every layout, with random weights."""

import torch
from torch import nn

from tae import TAE, TAEConfig

MINI = TAEConfig(
    patch_size=(2, 4, 4),
    channels=8,
    multipliers=(1, 2, 2),
    strides=((2, 2, 2), (2, 1, 1)),
    encoder_blocks=(1, 0, 1),
    decoder_blocks=(0, 1, 1),
    shortcuts=True,
    latent_channels=4,
    norm="rms",
    attention=False,
)
PAPER = TAEConfig(
    channels=4,
    multipliers=(1, 1, 1, 1),
    encoder_blocks=(1, 0, 1, 0),
    decoder_blocks=(0, 1, 0, 1),
    latent_channels=4,
    norm="rms",
    attention=False,
)
SHORT = TAEConfig(
    patch_size=(1, 8, 8),
    channels=4,
    multipliers=(1, 1),
    strides=((4, 1, 1),),
    encoder_blocks=(0, 1),
    decoder_blocks=(1, 0),
    latent_channels=4,
    norm="rms",
    attention=False,
)
CONFIGS = {"mini": MINI, "paper": PAPER, "short": SHORT}


def random_tae(config: TAEConfig) -> TAE:
    """Random weights in float64, none of them zero, so that every tap has a say."""
    generator = torch.Generator().manual_seed(0)
    model = TAE(config).double().eval()
    model.init_weights()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.requires_grad_(False)
