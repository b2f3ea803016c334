"""The convolutions of the autoencoder, as few products and copies as they need (Movie Gen, section 3.1.1).

Letters: b batch, c channels, t frames, h height, w width. Activations are channels-last in memory; each layer
works on a view of them: frames as a batch of pictures, pixels as rows, time as the height of a picture.

What the plain layers do by torch's `conv2d` and `cat` are attributes, where a device's own may be put.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinoflow.tae.model.chunks import neighbours, streams
from kinoflow.tae.model.config import Stride

Convolve = Callable[..., Tensor]  # of frames ("n c h w"), weight, bias, stride and padding
Concatenate = Callable[[list[Tensor], int], Tensor]


class SpatialConv(nn.Conv3d):
    """2D convolution of each frame, kernel 3; what it pads is up to `padding`."""

    convolve: Convolve = staticmethod(F.conv2d)

    def __init__(
        self, channels_in: int, channels_out: int, stride: Stride = (1, 1, 1), padding: int = 1
    ) -> None:
        kernel = (1, 3, 3)
        super().__init__(channels_in, channels_out, kernel, stride=stride, padding=(0, padding, padding))

    def forward(self, input: Tensor) -> Tensor:
        frames, weight = frames_of(input), self.weight.squeeze(2)
        y = self.convolve(frames, weight, self.bias, self.stride[1:], self.padding[1:])
        return clip_of(y, len(input))


class PointwiseConv(nn.Conv3d):
    """1x1x1 convolution: one matrix product."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 1)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)


class TemporalConv(nn.Conv3d):
    """1D convolution over time, kernel 3, symmetric replicate padding: ceil(t / stride) frames come out."""

    concatenate: Concatenate = staticmethod(torch.cat)

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__(channels, channels, (3, 1, 1), stride=(stride, 1, 1))

    def reset_parameters(self) -> None:
        """Identity: centre tap one, no bias, so that a one-frame clip passes as through the image model."""
        nn.init.dirac_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, before: Tensor | None = None, after: Tensor | None = None) -> Tensor:
        """Convolve a clip, or a chunk of it between the frames `before` and `after` ("b c 1 h w")."""
        weight = self.weight.squeeze(4)
        if input.shape[2] == 1 and before is None and after is None:
            return F.linear(input.movedim(1, -1), weight.sum(dim=(2, 3)), self.bias).movedim(-1, 1)
        first, last = _neighbours(input, before, after)
        if input.shape[2] == 1:  # three pictures side by side: faster than as three rows of pixels
            joined, kernel = torch.cat((first, input, last), dim=1), weight.movedim(2, 1).flatten(1, 2)
            return F.conv2d(joined.squeeze(2), kernel.unsqueeze(3), self.bias).unsqueeze(2)
        rows = self._rows(first, input, last)
        return _clip_of_rows(F.conv2d(rows, weight, self.bias, stride=(self.stride[0], 1)), input)

    def stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Every chunk but the last has a multiple of `stride` frames."""
        for before, chunk, after in neighbours(chunks):
            yield self(chunk, before, after)

    def _rows(self, *pieces: Tensor) -> Tensor:
        """Pieces of a clip, one after the other, as "b c t (h w)", channels-last in memory."""
        rows = [piece.movedim(1, -1).flatten(2, 3) for piece in pieces]
        return self.concatenate(rows, 1).movedim(-1, 1)


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

    def reads(self, start: int, stop: int) -> tuple[int, int]:
        """The frames that frames start..stop-1 are made of; at an end of the clip some are not there."""
        return start - 1, stop + 1


class NearestSpatialConv(SpatialConv):
    """Nearest-neighbour upsampling in space by `factor`, then the convolution, neither of them run as such.

    The pixels of one phase (position within a block of `factor`) see the same pixels of the small frame
    through the same sums of taps: a small convolution for each phase, 16 products a pixel instead of 36.
    """

    def __init__(self, channels_in: int, channels_out: int, factor: tuple[int, int]) -> None:
        super().__init__(channels_in, channels_out)
        self.factor = factor

    def forward(self, input: Tensor) -> Tensor:
        frames, (h, w), (fh, fw) = frames_of(input), input.shape[3:], self.factor
        phases = []
        for top, across in _phases(fh):
            for left, along in _phases(fw):
                taps = torch.kron(self.weight.new_tensor(across), self.weight.new_tensor(along))
                kernel = _summed(self.weight, taps, (len(across), len(along)))
                y = F.conv2d(frames, kernel, self.bias, padding=1)  # one row or column more than is asked
                phases.append(y.movedim(1, -1)[:, top : top + h, left : left + w])
        return clip_of(_interleaved(phases, self.factor).movedim(-1, 1), len(input))


class NearestTemporalConv(TemporalConv):
    """Nearest-neighbour upsampling in time by `factor`, then the convolution, phase by phase."""

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__(channels)
        self.factor = factor

    def forward(
        self, input: Tensor, before: Tensor | None = None, after: Tensor | None = None, *, join: bool = True
    ) -> Tensor | list[Tensor]:
        """The frames, or without `join` of each block the first ones, then the second ones, and so on."""
        phases = self._phases(input, before, after)
        if not join:
            return phases
        return torch.stack([phase.movedim(1, -1) for phase in phases], dim=2).flatten(1, 2).movedim(-1, 1)

    def stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """What comes of a chunk of one frame is given frame by frame: nothing is copied to join them."""
        for before, chunk, after in neighbours(chunks):
            if chunk.shape[2] == 1:
                yield from self(chunk, before, after, join=False)  # by a call, before which ZeRO-3 gathers
            else:
                yield self(chunk, before, after)

    def _phases(self, x: Tensor, before: Tensor | None, after: Tensor | None) -> list[Tensor]:
        """The first frame of every block of `factor`, then the second of every block, and so on."""
        first, last = _neighbours(x, before, after)
        padded, phases = self._rows(first, x, last), []
        for start, taps in _phases(self.factor):
            kernel = _summed(self.weight, self.weight.new_tensor(taps), (len(taps), 1))
            seen = padded[:, :, start : start + x.shape[2] + len(taps) - 1]
            phases.append(_clip_of_rows(F.conv2d(seen, kernel, self.bias), x))
        return phases


# Axes are joined and parted with the channels at the end, where channels-last memory is one block. Done on
# "b c t h w", a view leaves the stride of a batch of one to chance; the next kernel takes the tensor for
# another layout and copies it.


def frames_of(x: Tensor) -> Tensor:
    """ "b c t h w" to "(b t) c h w", a view of channels-last memory."""
    return x.movedim(1, -1).flatten(0, 1).movedim(-1, 1)


def clip_of(frames: Tensor, batch: int) -> Tensor:
    """Inverse of `frames_of`."""
    return frames.movedim(1, -1).unflatten(0, (batch, -1)).movedim(-1, 1)


def _neighbours(x: Tensor, before: Tensor | None, after: Tensor | None) -> tuple[Tensor, Tensor]:
    """The frames on either side of a chunk; at an end of the clip its own outermost frame."""
    return x[:, :, :1] if before is None else before, x[:, :, -1:] if after is None else after


def _clip_of_rows(rows: Tensor, like: Tensor) -> Tensor:
    """ "b c t (h w)" to "b c t h w", with the height and width of `like`."""
    return rows.movedim(1, -1).unflatten(2, like.shape[3:]).movedim(-1, 1)


def _interleaved(phases: list[Tensor], factor: tuple[int, int]) -> Tensor:
    """Pixels of every phase ("n h w c", row by row of a block) to "n (h fh) (w fw) c"."""
    n, h, w, c = phases[0].shape
    if not streams():
        pixels = torch.stack(phases, dim=3).unflatten(3, factor).transpose(2, 3)
    else:
        pixels = phases[0].new_empty(n, h, factor[0], w, factor[1], c)
        for i, phase in enumerate(phases):
            pixels[:, :, i // factor[1], :, i % factor[1]] = phase
    return pixels.flatten(3, 4).flatten(1, 2)


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
