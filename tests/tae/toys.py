"""Small autoencoders of every layout, with random weights."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from kinoflow.tae import TAE, TAEConfig
from kinoflow.tae.tiles import blend as tiling
from kinoflow.tae.tiles import halo
from kinoflow.tae.tiles.blend import Decode, Encode, TemporalTiling
from kinoflow.tae.tiles.halo import HaloTiling
from kinoflow.tae.tiles.tiled import TiledTAE

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
DETAILED = replace(MINI, detail_channels=4, detail_blocks=1)
CONFIGS = {"mini": MINI, "paper": PAPER, "short": SHORT, "detailed": DETAILED}


def random_tae(config: TAEConfig) -> TAE:
    """Random weights in float64, none of them zero, so that every tap has a say."""
    generator = torch.Generator().manual_seed(0)
    model = TAE(config).double().eval()
    model.init_weights()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.requires_grad_(False)


def give_up(_tiling: HaloTiling, failure: Exception) -> HaloTiling:
    """There is no smaller tiling."""
    raise failure


def encode_whole(tiled: TiledTAE, video: Tensor) -> Tensor:
    """Latent of a whole clip."""
    return torch.cat(list(tiled.encode_stream([video])), dim=2)


def decode_whole(tiled: TiledTAE, latent: Tensor, frames: int) -> Tensor:
    """A whole clip from its latent."""
    return torch.cat(list(tiled.decode_stream([latent], frames=frames)), dim=2)


def encode_tiled(video: Tensor, encode: Encode, tiles: HaloTiling | TemporalTiling) -> Tensor:
    """Latent of a whole clip, tile by tile."""
    if isinstance(tiles, HaloTiling):
        return torch.cat(list(halo.encode_stream([video], encode, tiles, give_up)), dim=2)
    return torch.cat(list(tiling.encode_stream([video], encode, tiles)), dim=2)


def decode_tiled(
    latent: Tensor, decode: Decode, tiles: HaloTiling | TemporalTiling, *, frames: int
) -> Tensor:
    """A whole clip from its latent, tile by tile."""
    if isinstance(tiles, HaloTiling):
        return torch.cat(list(halo.decode_stream([latent], decode, tiles, give_up, frames=frames)), dim=2)
    return torch.cat(list(tiling.decode_stream([latent], decode, tiles, frames=frames)), dim=2)
