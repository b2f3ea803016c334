"""Upsampling of clips (Movie Gen, section 3.1.5): a clip at the larger size is shown, its details are made.

The clip is resized bilinearly and encoded frame by frame; the latents are shown everywhere, and those of the
larger clip are made from noise, in windows that overlap. So are pictures.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from kinoflow.configs.errors import UserError
from kinoflow.dit_video.flow.known import Known, shown_everywhere
from kinoflow.tae.model.pixels import from_bytes, to_bytes
from kinoflow.tae.model.stills import resized
from kinoflow.tae.model.tae import TAE
from kinoflow.tae.tiles.tiled import TiledTAE

STEPS = 20
NEAR_STEPS = 4
"""Of a backbone whose head adds to what is shown (dit.shown_variance): it is near from the start."""
WINDOW_SHARE = 4 / 14  # of a window that its neighbour shares


@dataclass(frozen=True, kw_only=True)
class UpsampleConfig:
    """What an upsampler does to a clip; its windows are as long as its default bucket.

    Raises:
        UserError: a value outside its range.
    """

    factor: int = 0
    """How many times larger a clip becomes; 0: it makes clips of prompts."""
    overlap: int = 4
    """Frames that neighbouring windows share."""

    def __post_init__(self) -> None:
        if self.factor < 0 or self.factor == 1:
            raise UserError(f"upsample.factor: {self.factor} is not 0, or 2 and more")
        if self.overlap < 0:
            raise UserError(f"upsample.overlap: {self.overlap} is below 0")


@torch.no_grad()
def shown_small(small: UInt8[np.ndarray, "frames _ _ 3"], tae: TAE, height: int, width: int) -> Known:
    """What the backbone is told of a clip of any smaller size, one frame after the other."""
    device = next(tae.parameters()).device
    latents = []
    for frame in torch.from_numpy(small):
        large = resized(from_bytes(frame[None, None].to(device)), height, width)
        latents.append(tae.normalize(tae.encode(large).mean))
    return shown_everywhere(torch.cat(latents, dim=2))


@torch.no_grad()
def decode_stills(
    tae: TAE, latent: Float[Tensor, "1 c frames h w"], memory: int
) -> Iterator[UInt8[Tensor, "1 1 height width 3"]]:
    """The frames of a normalized latent that has one for each, in order, in tiles of up to `memory` bytes.

    Raises:
        UserError: frames too large for `memory`, when the first one is asked for.
    """
    tiled = TiledTAE(tae, memory=memory)
    for still in tae.denormalize(latent).split(1, dim=2):
        for piece in tiled.decode_whole(still, 1):
            yield to_bytes(piece).cpu()
