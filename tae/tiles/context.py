"""How far a latent cell sees: the context that a tile needs around it so that its borders don't matter.

Counted from the configuration, convolution by convolution, as intervals walked from output to input. Two
kinds of layers see further than any tile, and no halo makes their tiles exact: attention (all frames, and
the whole picture) and group normalization (its statistics are those of the picture it is given, so tiles in
space change them; tiles in time don't, since each frame is normalized by itself). Channel RMS norm sees one
position only.
"""

from dataclasses import dataclass

from kinoflow.tae.model.config import TAEConfig

_TIME = 0


@dataclass(frozen=True, kw_only=True)
class Halo:
    """Latent positions needed before and after those kept, along one axis.

    Raises:
        ValueError: a negative number.
    """

    before: int
    after: int

    def __post_init__(self) -> None:
        if min(self.before, self.after) < 0:
            raise ValueError(f"halo: {self.before} before and {self.after} after; use 0 or more")

    def limited(self, most: int) -> "Halo":
        """At most `most` on each side."""
        return Halo(before=min(self.before, most), after=min(self.after, most))


Halos = tuple[Halo, Halo, Halo]


@dataclass(frozen=True, kw_only=True)
class Context:
    """Halos (time, rows, columns) of encoder and decoder that cover all convolutions."""

    encoder: Halos
    decoder: Halos

    def limited(self, time: int, space: int) -> "Context":
        """Halos of at most `time` latent frames and `space` cells on each side."""
        most = (time, space, space)
        encoder, decoder = (
            _three(tuple(halo.limited(limit) for halo, limit in zip(halos, most, strict=True)))
            for halos in (self.encoder, self.decoder)
        )
        return Context(encoder=encoder, decoder=decoder)


def context(config: TAEConfig) -> Context:
    """The context of an autoencoder's convolutions, in whole latent positions."""
    return Context(
        encoder=_three(tuple(_encoder_halo(config, axis) for axis in range(3))),
        decoder=_three(tuple(_decoder_halo(config, axis) for axis in range(3))),
    )


def exact_in_space(config: TAEConfig) -> bool:
    """Whether nothing in an autoencoder sees more of a picture than its convolutions do."""
    return not config.attention and config.norm == "rms"


def _encoder_halo(config: TAEConfig, axis: int) -> Halo:
    low, high = _grown(0, 0, 1 + _middle_convolutions(config))
    for level in reversed(range(len(config.multipliers))):
        if level < len(config.strides):
            low, high = _before_stride(low, high, config, level, axis)
        low, high = _grown(low, high, 2 * config.encoder_blocks[level])
    low, high = _grown(low, high, 1)
    patch, factor = config.patch_size[axis], config.factors[axis]
    low, high = low * patch, high * patch + patch - 1
    return Halo(before=-(low // factor), after=high // factor)


def _decoder_halo(config: TAEConfig, axis: int) -> Halo:
    """The latent cells that the pixels of cell 0 come from."""
    patch = config.decoded_patch[axis]
    low, high = 0, (config.factors[axis] - 1) // patch
    if config.detail_channels:
        low, high = _grown(low, high, 2 * config.detail_blocks)
        low, high = low // config.detail_stride[axis], high // config.detail_stride[axis]
    low, high = _grown(low, high, 1)
    for level in range(len(config.multipliers)):
        if level > 0:
            stride = config.strides[level - 1]
            low, high = _grown(low, high, 1) if _strided(stride, axis) else (low, high)
            low, high = low // stride[axis], high // stride[axis]
        low, high = _grown(low, high, 2 * config.decoder_blocks[level])
    low, high = _grown(low, high, 1 + _middle_convolutions(config))
    return Halo(before=-low, after=high)


def _before_stride(low: int, high: int, config: TAEConfig, level: int, axis: int) -> tuple[int, int]:
    """Inputs of a downsampling layer: padded on both sides in time, at the far edge in space.

    Its shortcut reads blocks of as many positions as the stride.
    """
    stride = config.strides[level]
    near, far = (0, 0) if not _strided(stride, axis) else (1, 1) if axis == _TIME else (0, 2)
    block = stride[axis] - 1 if config.shortcuts else 0
    return low * stride[axis] - near, high * stride[axis] + max(far, block)


def _strided(stride: tuple[int, int, int], axis: int) -> bool:
    """Whether the resampling layer convolves along this axis; rows and columns go together."""
    return stride[_TIME] > 1 if axis == _TIME else max(stride[1:]) > 1


def _middle_convolutions(config: TAEConfig) -> int:
    return 4 if config.attention else 0


def _grown(low: int, high: int, convolutions: int) -> tuple[int, int]:
    """The interval that kernels of 3 read."""
    return low - convolutions, high + convolutions


def _three(halos: tuple[Halo, ...]) -> Halos:
    time, rows, columns = halos
    return time, rows, columns
