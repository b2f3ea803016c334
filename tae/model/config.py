"""The shape of a temporal autoencoder, and of what it makes of a clip."""

import math
from dataclasses import dataclass
from typing import Literal

Norm = Literal["group", "rms"]
Stride = tuple[int, int, int]


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

    `patch_size` (time, height, width) folds pixels into channels before the first convolution; `strides`
    (one a level, the last level has none) shrink what is left. `encoder_blocks` and `decoder_blocks` count
    residual blocks, finest level first. With `detail_channels` the decoder ends in a level of its own, at
    half a patch: `detail_blocks` residual blocks, so that the pixels of a patch are not a linear map of the
    features around it. With `shortcuts` the resampling layers change the width themselves and carry a
    shortcut, and a linear map of each 8x8x8 block runs beside encoder and decoder, which start at zero:
    training starts from a linear autoencoder. Without, the layout is that of latent diffusion. `post_quant`
    puts a 1x1 convolution between latent and decoder, which some image autoencoders have. `latent_mean` and
    `latent_std`, one value a channel, are measured on training clips; empty means that they are not known
    yet.
    """

    patch_size: Stride = (1, 1, 1)
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    strides: tuple[Stride, ...] = ((2, 2, 2), (2, 2, 2), (2, 2, 2))
    encoder_blocks: tuple[int, ...] = (2, 2, 2, 2)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 3)
    detail_channels: int = 0
    detail_blocks: int = 2
    shortcuts: bool = False
    latent_channels: int = 16
    norm: Norm = "group"
    attention: bool = True
    post_quant: bool = False
    latent_mean: tuple[float, ...] = ()
    latent_std: tuple[float, ...] = ()

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
        """Latent sizes of a clip: ceil(frames / 8), height / 8, width / 8.

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
