"""A larger autoencoder that starts as the one it grew from (Chen et al. 2016, arXiv:1511.05641)."""

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from kinoflow.tae.model.config import TAEConfig
from kinoflow.tae.model.layers import ResBlock
from kinoflow.tae.model.tae import TAE


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Layers that an autoencoder gains; they start as the identity.

    Raises:
        ValueError: a negative count.
    """

    encoder_blocks: int = 0
    """More residual blocks at the encoder's finest level."""
    decoder_blocks: int = 0
    """More residual blocks at the decoder's finest level."""
    detail_channels: int = 0
    """Width of a detail level for a decoder without one, as in tae.detail_channels."""
    detail_blocks: int = 2
    """Residual blocks of the detail level."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 0:
                raise ValueError(f"grow.{field.name}: {getattr(self, field.name)}; use 0 or more")


def grown(tae: TAE, growth: Growth) -> TAE:
    """A larger copy. Latents and decoded clips are those of `tae` until the new weights are trained.

    Raises:
        ValueError: a detail level for a decoder that has one, or too few channels for the pixels of a cell.
    """
    larger = TAE(_config(tae.config, growth)).to(tae.encoder.conv_in.spatial.weight)  # its device and dtype
    larger.init_weights()
    first, more = tae.config.encoder_blocks[0], growth.encoder_blocks
    added = list(larger.encoder.layers)[first : first + more]
    # The decoder's finest level comes last, so its old layers keep their names.
    added += list(larger.decoder.layers)[len(tae.decoder.layers) :]
    state = {_shifted(name, first, more): value for name, value in tae.state_dict().items()}
    if growth.detail_channels:
        assert larger.decoder.detail is not None
        added += larger.decoder.detail.layers
        state |= _detail(larger, state)
    for block in added:
        assert isinstance(block, ResBlock)
        for parameter in block.conv2.temporal.parameters():
            nn.init.zeros_(parameter)
    larger.load_state_dict(larger.state_dict() | state)
    return larger


def _config(old: TAEConfig, growth: Growth) -> TAEConfig:
    encoder, decoder = list(old.encoder_blocks), list(old.decoder_blocks)
    encoder[0] += growth.encoder_blocks
    decoder[0] += growth.decoder_blocks
    config = replace(old, encoder_blocks=tuple(encoder), decoder_blocks=tuple(decoder))
    if not growth.detail_channels:
        return config
    if old.detail_channels:
        raise ValueError("grow.detail_channels: this decoder has a detail level")
    config = replace(config, detail_channels=growth.detail_channels, detail_blocks=growth.detail_blocks)
    pixels = 3 * math.prod(config.decoded_patch)
    if growth.detail_channels < pixels:
        raise ValueError(f"grow.detail_channels: use {pixels} or more")
    return config


def _shifted(name: str, first: int, more: int) -> str:
    """The encoder's finest level comes first: layers from `first` on are counted `more` later."""
    prefix = "encoder.layers."
    if not name.startswith(prefix):
        return name
    index, rest = name.removeprefix(prefix).split(".", 1)
    return f"{prefix}{int(index) + (more if int(index) >= first else 0)}.{rest}"


def _detail(larger: TAE, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The last convolution and the map to pixels: the first channels of each cell are its old pixels."""
    decoder, rows = larger.decoder, _old_rows(larger.config)
    assert decoder.detail is not None
    channels, pixels = larger.config.detail_channels, rows.shape[1]
    new = torch.arange(len(rows) * channels).view(len(rows), channels)[:, :pixels].flatten()
    old, name = rows.flatten(), "decoder.conv_out"
    weights = {key: value.clone() for key, value in decoder.conv_out.state_dict(prefix=f"{name}.").items()}
    for part in ("spatial", "temporal"):
        weights[f"{name}.{part}.bias"][new] = state[f"{name}.{part}.bias"][old]
    weights[f"{name}.spatial.weight"][new] = state[f"{name}.spatial.weight"][old]
    temporal = state[f"{name}.temporal.weight"]
    weights[f"{name}.temporal.weight"][new[:, None], new] = temporal[old[:, None], old]
    last = torch.zeros_like(decoder.detail.to_patch.weight)
    last[:, :pixels, 0, 0, 0] = torch.eye(pixels)
    return weights | {"decoder.detail.to_patch.weight": last}


def _old_rows(config: TAEConfig) -> Tensor:
    """For each part of a patch (row) the channels that its pixels had when a patch was one cell."""
    sides = [side for pair in zip(config.detail_stride, config.decoded_patch, strict=True) for side in pair]
    rows = torch.arange(3 * math.prod(config.patch_size)).view(*sides, 3)
    return rows.permute(0, 2, 4, 1, 3, 5, 6).reshape(math.prod(config.detail_stride), -1)
