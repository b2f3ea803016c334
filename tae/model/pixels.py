"""Bytes and model values: the one place that fixes how 0..255 and [-1, 1] stand for each other.

`Pixels` stands where an autoencoder does when the pixels themselves are the latents.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from kinoflow.tae.model.config import LatentShape

_LUMA = (0.299, 0.587, 0.114)  # BT.601


def from_bytes(
    frames: UInt8[Tensor, "*b frames height width 3"],
) -> Float[Tensor, "*b 3 frames height width"]:
    """RGB bytes to float32 in [-1, 1], channels first."""
    # In place on a copy: a tile of frames is large, and each operation would make another.
    return frames.movedim(-1, -4).to(torch.float32, copy=True).div_(127.5).sub_(1)


def to_bytes(video: Float[Tensor, "*b 3 f height width"]) -> UInt8[Tensor, "*b f height width 3"]:
    """RGB in [-1, 1] to the nearest bytes, channels last; what lies outside is clamped."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(-4, -1)


@dataclass(frozen=True, kw_only=True)
class PixelsConfig:
    """The latent of a clip is its pixels in [-1, 1], of one channel (grey) or three (RGB)."""

    channels: int
    """1 or 3."""

    def latent_shape(self, frames: int, height: int, width: int) -> LatentShape:
        """Sizes of the latent of a clip, which are the clip's."""
        return LatentShape(channels=self.channels, frames=frames, height=height, width=width)


class Pixels:
    """The parts of an autoencoder that precomputing and sampling ask for, where there is none."""

    def __init__(self, channels: int) -> None:
        self.config = PixelsConfig(channels=channels)

    def encode(self, video: Float[Tensor, "b 3 frames h w"]) -> Float[Tensor, "b c frames h w"]:
        """RGB in [-1, 1] as it is; of a single channel the luma, which of grey is each of the three."""
        if self.config.channels == 3:
            return video
        return torch.einsum("bcfhw,c->bfhw", video, torch.tensor(_LUMA))[:, None]

    def denormalize(self, latent: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b c t h w"]:
        """The latent, which was never normalized."""
        return latent

    def decode(self, latent: Float[Tensor, "b c t h w"], frames: int) -> Float[Tensor, "b 3 frames h w"]:
        """RGB in [-1, 1]; a single channel is grey."""
        return latent[:, :, :frames].expand(-1, 3, -1, -1, -1)
