"""The convolutions of the autoencoder, as few products and copies as they need (Movie Gen, section 3.1.1).

Letters: b batch, c channels, t frames, h height, w width. Activations are channels-last in memory; each layer
works on a view of them: frames as a batch of pictures, pixels as rows, time as the height of a picture.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tae.chunks import neighbours

Stride = tuple[int, int, int]


class SpatialConv(nn.Conv3d):
    """2D convolution of each frame, kernel 3; what it pads is up to `padding`."""

    def __init__(
        self, channels_in: int, channels_out: int, stride: Stride = (1, 1, 1), padding: int = 1
    ) -> None:
        kernel = (1, 3, 3)
        super().__init__(channels_in, channels_out, kernel, stride=stride, padding=(0, padding, padding))

    def forward(self, input: Tensor) -> Tensor:
        stride, padding = self.stride[1:], self.padding[1:]
        y = F.conv2d(frames_of(input), self.weight.squeeze(2), self.bias, stride=stride, padding=padding)
        return clip_of(y, len(input))


class PointwiseConv(nn.Conv3d):
    """1x1x1 convolution: one matrix product."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 1)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)


class TemporalConv(nn.Conv3d):
    """1D convolution over time, kernel 3, symmetric replicate padding: ceil(t / stride) frames come out."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__(channels, channels, (3, 1, 1), stride=(stride, 1, 1))

    def reset_parameters(self) -> None:
        """Identity: centre tap one, no bias, so that a one-frame clip passes as through the image model."""
        nn.init.dirac_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, before: Tensor | None = None, after: Tensor | None = None) -> Tensor:
        """Convolve a clip, or a chunk of it between the frames `before` and `after` ("b c 1 h w").

        Without gradients the frames outside are padded with zeros, in the kernel, and their share is added
        to the first and the last frame: no padded copy is made. Autograd and compilers copy for every
        such addition what they change; there the padded copy is the cheaper way.
        """
        weight, frames, stride = self.weight.squeeze(4), input.shape[2], self.stride[0]
        if frames == 1 and before is None and after is None:
            return F.linear(input.movedim(1, -1), weight.sum(dim=(2, 3)), self.bias).movedim(-1, 1)
        first, last = _neighbours(input, before, after)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            rows = _rows_of(torch.cat((first, input, last), dim=2))
            return _clip_of_rows(F.conv2d(rows, weight, self.bias, stride=(stride, 1)), input)
        y = F.conv2d(_rows_of(input), weight, self.bias, stride=(stride, 1), padding=(1, 0))
        y = _clip_of_rows(y, input)
        _add_product(y[:, :, :1], first, weight[:, :, 0, 0])
        if (frames - 1) % stride == 0:
            _add_product(y[:, :, -1:], last, weight[:, :, 2, 0])
        return y

    def stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Every chunk but the last has a multiple of `stride` frames."""
        for before, chunk, after in neighbours(chunks):
            yield self(chunk, before, after)


class Conv(nn.Module):
    """2D convolution on each frame, then a 1D convolution over time."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.spatial = SpatialConv(channels_in, channels_out)
        self.temporal = TemporalConv(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.temporal(self.spatial(x))

    def stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        return self.temporal.stream(map(self.spatial, chunks))


class NearestSpatialConv(SpatialConv):
    """Nearest-neighbour upsampling in space by `factor`, then the convolution, neither of them run as such.

    The pixels of one phase (position within a block of `factor`) see the same pixels of the small frame
    through the same sums of taps: a small convolution for each phase, 16 products a pixel instead of 36.
    """

    def __init__(self, channels_in: int, channels_out: int, factor: tuple[int, int]) -> None:
        super().__init__(channels_in, channels_out)
        self.factor = factor

    def forward(self, input: Tensor) -> Tensor:
        frames, (fh, fw) = F.pad(frames_of(input), (1, 1, 1, 1)), self.factor
        h, w = input.shape[3:]
        rows = []
        for top, across in _phases(fh):
            columns = []
            for left, along in _phases(fw):
                kh, kw = len(across), len(along)
                taps = torch.kron(self.weight.new_tensor(across), self.weight.new_tensor(along))
                kernel = _summed(self.weight, taps, (kh, kw))
                seen = frames[:, :, top : top + h + kh - 1, left : left + w + kw - 1]
                columns.append(F.conv2d(seen, kernel, self.bias).movedim(1, -1))
            rows.append(torch.stack(columns, dim=3).flatten(2, 3))
        return clip_of(torch.stack(rows, dim=2).flatten(1, 2).movedim(-1, 1), len(input))


class NearestTemporalConv(TemporalConv):
    """Nearest-neighbour upsampling in time by `factor`, then the convolution, phase by phase."""

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__(channels)
        self.factor = factor

    def forward(self, input: Tensor, before: Tensor | None = None, after: Tensor | None = None) -> Tensor:
        first, last = _neighbours(input, before, after)
        padded, frames = _rows_of(torch.cat((first, input, last), dim=2)), input.shape[2]
        phases = []
        for start, taps in _phases(self.factor):
            kernel = _summed(self.weight, self.weight.new_tensor(taps), (len(taps), 1))
            phases.append(F.conv2d(padded[:, :, start : start + frames + len(taps) - 1], kernel, self.bias))
        blocks = torch.stack([phase.movedim(1, -1) for phase in phases], dim=2)
        return blocks.flatten(1, 2).unflatten(2, input.shape[3:]).movedim(-1, 1)


# Axes are joined and parted with the channels at the end, where channels-last memory is one block. Done on
# "b c t h w", a view leaves the stride of a batch of one to chance; the next kernel takes the tensor for
# another layout and copies it.


def frames_of(x: Tensor) -> Tensor:
    """ "b c t h w" to "(b t) c h w", a view of channels-last memory."""
    return x.movedim(1, -1).flatten(0, 1).movedim(-1, 1)


def clip_of(frames: Tensor, batch: int) -> Tensor:
    """Inverse of `frames_of`."""
    return frames.movedim(1, -1).unflatten(0, (batch, -1)).movedim(-1, 1)


def _rows_of(x: Tensor) -> Tensor:
    """ "b c t h w" to "b c t (h w)", a view of channels-last memory."""
    return x.movedim(1, -1).flatten(2, 3).movedim(-1, 1)


def _neighbours(x: Tensor, before: Tensor | None, after: Tensor | None) -> tuple[Tensor, Tensor]:
    """The frames on either side of a chunk; at an end of the clip its own outermost frame."""
    return x[:, :, :1] if before is None else before, x[:, :, -1:] if after is None else after


def _clip_of_rows(rows: Tensor, like: Tensor) -> Tensor:
    """Inverse of `_rows_of`, with the height and width of `like`."""
    return rows.movedim(1, -1).unflatten(2, like.shape[3:]).movedim(-1, 1)


def _add_product(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """Add weight @ x to one frame `y` ("b c 1 h w") in its place."""
    for i in range(len(y)):  # indexed, not unbound: autograd lets only such views be written to
        rows, seen = (frame[i].movedim(0, -1).flatten(0, 2) for frame in (y, x))
        # Autocast casts for the convolution, but not for what is done in place.
        rows.addmm_(seen.to(rows.dtype), weight.t().to(rows.dtype))


def _phases(factor: int) -> list[tuple[int, list[list[float]]]]:
    """Where each phase of a nearest-upsampled axis reads with kernel 3, on the small axis padded by one.

    For each phase the first cell read and, cell by cell, a one for every tap that falls on it.
    """
    found = []
    for phase in range(factor):
        reads = [(phase + tap - 1) // factor + 1 for tap in range(3)]
        cells = sorted(set(reads))
        found.append((cells[0], [[float(read == cell) for read in reads] for cell in cells]))
    return found


def _summed(weight: Tensor, taps: Tensor, size: tuple[int, int]) -> Tensor:
    """Kernel of `size`: the taps of `weight`, taken as one row, summed by each row of "cells taps"."""
    return (taps @ weight.flatten(2).transpose(1, 2)).unflatten(1, size).movedim(-1, 1)
