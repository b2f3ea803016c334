"""The shape of a temporal autoencoder, and of what it makes of a clip."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kinoflow.configs.errors import UserError

Norm = Literal["group", "rms"]
Stride = tuple[int, int, int]


def require_batch(name: str, shape: Sequence[int], channels: int, axes: str) -> None:
    """Refuse a tensor that is no batch of `channels` and the three other axes.

    Raises:
        UserError: one line with the shape that is wanted.
    """
    if len(shape) != 5 or shape[1] != channels:
        raise UserError(f"{name}: has shape {tuple(shape)}; give (batch, {channels}, {axes})")


@dataclass(frozen=True, kw_only=True)
class LatentShape:
    """Channels and sizes of the latent of a clip."""

    channels: int
    frames: int
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class TAEConfig:
    """Shape of a temporal autoencoder.

    With a detail level the pixels of a patch are not a linear map of the features around it. With shortcuts
    encoder and decoder start at zero beside a linear map of each 8x8x8 block: training starts from a linear
    autoencoder. Without, the layout is that of latent diffusion. latent_mean and latent_std are measured on
    training clips.
    """

    patch_size: Stride = (1, 1, 1)
    """Time, height, width of the pixels that become channels first."""
    channels: int = 128
    """Width of the finest level."""
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    """Width of each level as a multiple of channels, finest first."""
    strides: tuple[Stride, ...] = ((2, 2, 2), (2, 2, 2), (2, 2, 2))
    """Shrinking in time, height, width behind each level but the last."""
    encoder_blocks: tuple[int, ...] = (2, 2, 2, 2)
    """Residual blocks of the encoder's levels, finest first."""
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 3)
    """Residual blocks of the decoder's levels, finest first."""
    detail_channels: int = 0
    """Width of a detail level at the decoder's end, at half a patch."""
    detail_blocks: int = 2
    """Residual blocks of the detail level."""
    shortcuts: bool = False
    """Resampling layers change the width themselves and carry a shortcut."""
    latent_channels: int = 16
    """Channels of the latent."""
    norm: Norm = "group"
    """Statistics of groups, or root mean squares."""
    attention: bool = True
    """Attention and a residual block more at the coarsest level."""
    post_quant: bool = False
    """A 1x1 convolution between latent and decoder, as in some models."""
    latent_mean: tuple[float, ...] = ()
    """Means of the latent's channels; none: not measured."""
    latent_std: tuple[float, ...] = ()
    """Their standard deviations; none: not measured."""

    def __post_init__(self) -> None:
        if len(self.strides) != len(self.multipliers) - 1:
            raise ValueError(
                f"tae.strides: {len(self.multipliers)} levels need {len(self.multipliers) - 1} strides"
            )
        for key in ("encoder_blocks", "decoder_blocks"):
            if len(getattr(self, key)) != len(self.multipliers):
                raise ValueError(f"tae.{key}: give {len(self.multipliers)} counts, one a level")
        odd = [size for size in self.patch_size if size > 1 and size % 2]
        if self.detail_channels and (odd or max(self.patch_size) == 1):
            raise ValueError("tae.detail_channels: halves tae.patch_size, whose sides must be even, or 1")
        if self.norm == "group" and any(self.channels * m % 32 for m in self.multipliers):
            raise ValueError(
                "tae.channels: times each multiplier must divide by 32, the number of norm groups"
            )
        if self.norm == "group" and self.detail_channels % 32:
            raise ValueError("tae.detail_channels: must divide by 32, the number of norm groups")
        for key in ("latent_mean", "latent_std"):
            if len(getattr(self, key)) not in {0, self.latent_channels}:
                raise ValueError(
                    f"tae.{key}: give {self.latent_channels} values, one a latent channel, or none"
                )

    @property
    def factors(self) -> Stride:
        """Raw frames, rows and columns in one latent cell: 8, 8, 8 in every released configuration."""
        axes = zip(self.patch_size, *self.strides, strict=True)
        time, height, width = (math.prod(axis) for axis in axes)
        return time, height, width

    @property
    def detail_stride(self) -> Stride:
        """What the decoder's own level divides a patch by: 2 along each axis that the patch spans."""
        time, height, width = (min(size, 2) if self.detail_channels else 1 for size in self.patch_size)
        return time, height, width

    @property
    def decoded_patch(self) -> Stride:
        """The block of pixels (time, height, width) in a cell that comes out of the decoder."""
        sides = zip(self.patch_size, self.detail_stride, strict=True)
        time, height, width = (size // stride for size, stride in sides)
        return time, height, width

    def latent_shape(self, frames: int, height: int, width: int) -> LatentShape:
        """Latent sizes of a clip: ceil(frames / 8), height / 8, width / 8 (lecture notes, 1.3.2).

        Raises:
            ValueError: no frame, or a side that is not a positive multiple of the spatial factor.
        """
        time, rows, columns = self.factors
        if frames < 1:
            raise ValueError(f"frames: a clip has at least one frame, not {frames}")
        for name, size, factor in (("height", height, rows), ("width", width, columns)):
            if size < factor or size % factor:
                raise ValueError(f"{name}: {size} is not a positive multiple of {factor}; pad the frames")
        return LatentShape(
            channels=self.latent_channels,
            frames=-(-frames // time),
            height=height // rows,
            width=width // columns,
        )
