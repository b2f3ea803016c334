"""2.5D layers: every 2D spatial operation is followed by its 1D temporal twin (Movie Gen, section 3.1.1).

Letters: b batch, c channels, t frames, h height, w width. Activations are kept channels-last in memory.
`forward` takes a whole clip. `stream` takes it as chunks of a few frames and gives chunks, without gradients:
the same numbers, while fine levels stay in cache and the memory they need does not grow with the clip.
"""

import math
import sys
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kinoflow.tae.model.chunks import fork, regroup
from kinoflow.tae.model.config import Norm, Stride
from kinoflow.tae.model.convolution import (
    Conv,
    NearestSpatialConv,
    NearestTemporalConv,
    PointwiseConv,
    SpatialConv,
    TemporalConv,
    clip_of,
    frames_of,
)


class ChannelRMSNorm(nn.Module):
    """RMS over the channels of each position: no statistics cross a tile border."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = rearrange(x, "b c t h w -> b t h w c")
        return rearrange(F.rms_norm(x, (x.shape[-1],), self.weight, eps=1e-6), "b t h w c -> b c t h w")


class FrameGroupNorm(nn.GroupNorm):
    """Group normalization of each frame by itself, as in the image autoencoder: none leaks through time."""

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        return clip_of(super().forward(frames_of(input)), len(input))


def make_norm(kind: Norm, channels: int) -> nn.Module:
    return FrameGroupNorm(channels) if kind == "group" else ChannelRMSNorm(channels)


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice, around a skip."""

    def __init__(self, channels_in: int, channels_out: int, norm: Norm) -> None:
        super().__init__()
        self.norm1 = make_norm(norm, channels_in)
        self.conv1 = Conv(channels_in, channels_out)
        self.norm2 = make_norm(norm, channels_out)
        self.conv2 = Conv(channels_out, channels_out)
        self.skip = PointwiseConv(channels_in, channels_out) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.conv2(self._second(self.conv1(self._first(x))))

    def stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        main, aside = fork(chunks)
        h = self.conv2.stream(map(self._second, self.conv1.stream(map(self._first, main))))
        return map(self._add, h, aside)

    def reads(self, start: int, stop: int) -> tuple[int, int]:
        """As `Conv.reads`."""
        return self.conv1.reads(*self.conv2.reads(start, stop))

    def _first(self, x: Tensor) -> Tensor:
        return activate(self.norm1(x))

    def _second(self, h: Tensor) -> Tensor:
        return activate(self.norm2(h))

    def _add(self, h: Tensor, x: Tensor) -> Tensor:
        return h.add_(self.skip(x))


class Attention(nn.Module):
    """One-head attention over the positions of each frame, then over the frames of each position."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.spatial_norm = make_norm(norm, channels)
        self.spatial_qkv = nn.Linear(channels, 3 * channels)
        self.spatial_out = nn.Linear(channels, channels)
        self.temporal_norm = make_norm(norm, channels)
        self.temporal_qkv = nn.Linear(channels, 3 * channels)
        self.temporal_out = nn.Linear(channels, channels)

    def init_temporal_identity(self) -> None:
        """A zero output projection: at the start time attention adds nothing."""
        nn.init.zeros_(self.temporal_out.weight)
        nn.init.zeros_(self.temporal_out.bias)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        tokens = rearrange(self.spatial_norm(x), "b c t h w -> b t (h w) c")
        update = self.spatial_out(_attend(self.spatial_qkv(tokens)))
        x = x + rearrange(update, "b t (h w) c -> b c t h w", h=h, w=w)
        # Contiguous, or the linear layer becomes a product with a copy of its weight for every position.
        tokens = rearrange(self.temporal_norm(x), "b c t h w -> b (h w) t c").contiguous()
        update = self.temporal_out(_attend(self.temporal_qkv(tokens)))
        return x + rearrange(update, "b (h w) t c -> b c t h w", h=h, w=w)

    def stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Each frame sees all others, so the chunks are joined; this is the coarsest level."""
        yield from regroup([self(torch.cat(list(chunks), dim=2))])

    def reads(self, start: int, stop: int) -> tuple[int, int]:  # noqa: ARG002
        """All there are."""
        return 0, sys.maxsize


def _attend(qkv: Tensor) -> Tensor:
    q, k, v = qkv.chunk(3, dim=-1)
    return F.scaled_dot_product_attention(q, k, v)


class Downsample(nn.Module):
    """Strided 2D convolution (padded at the far edges, as in latent diffusion), then strided over time.

    With `shortcut` the folded input, averaged over groups of channels, is added (the residual autoencoding
    of Chen et al. 2024, arXiv:2410.10733): pixels reach the latent along a linear path from the first step.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: Stride, shortcut: bool) -> None:
        super().__init__()
        self.stride = stride
        self.shortcut = shortcut
        self.channels = channels_out
        self.spatial = (
            SpatialConv(channels_in, channels_out, (1, *stride[1:]), padding=0)
            if max(stride[1:]) > 1
            else None
        )
        self.temporal = TemporalConv(channels_out, stride[0]) if stride[0] > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self._in_space(x)
        return self._with_shortcut(y if self.temporal is None else self.temporal(y), x)

    def stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        main, aside = fork(regroup(chunks, multiple=self.stride[0]))
        h = map(self._in_space, main)
        h = h if self.temporal is None else self.temporal.stream(h)
        return regroup(map(self._with_shortcut, h, aside))

    def _in_space(self, x: Tensor) -> Tensor:
        return x if self.spatial is None else self.spatial(F.pad(x, (0, 1, 0, 1)))

    def _with_shortcut(self, y: Tensor, x: Tensor) -> Tensor:
        if not self.shortcut:
            return y
        folded = fold(pad_time(x, self.stride[0]), self.stride)
        return y + rearrange(folded, "b (c g) t h w -> b c g t h w", c=self.channels).mean(dim=2)


class Upsample(nn.Module):
    """Nearest neighbour in space and a 2D convolution, nearest neighbour in time and a 1D convolution.

    Either convolution may be absent where that axis is not upsampled. With `shortcut` the input, its channels
    repeated and unfolded, is added: the mirror of `Downsample`.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: Stride, shortcut: bool) -> None:
        super().__init__()
        self.stride = stride
        self.shortcut = shortcut
        self.repeats = channels_out * math.prod(stride) // channels_in
        self.spatial = (
            NearestSpatialConv(channels_in, channels_out, stride[1:]) if max(stride[1:]) > 1 else None
        )
        self.temporal = NearestTemporalConv(channels_out, stride[0]) if stride[0] > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.spatial is None else self.spatial(x)
        return self._with_shortcut(y if self.temporal is None else self.temporal(y), x)

    def stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        main, aside = fork(regroup(chunks, growth=float(math.prod(self.stride))))
        h = main if self.spatial is None else map(self.spatial, main)
        h = regroup(h if self.temporal is None else self.temporal.stream(h))
        # Both are as large: they are cut at the same frames, whatever came in.
        return map(torch.add, h, regroup(map(self._shortcut, aside))) if self.shortcut else h

    def reads(self, start: int, stop: int) -> tuple[int, int]:
        """As `Conv.reads`, before the frames become more."""
        around = 0 if self.temporal is None else 1
        return _before_stride(start - around, stop + around, self.stride[0])

    def _with_shortcut(self, y: Tensor, x: Tensor) -> Tensor:
        return y + self._shortcut(x) if self.shortcut else y

    def _shortcut(self, x: Tensor) -> Tensor:
        return unfold(x.repeat_interleave(self.repeats, dim=1), self.stride)


class Detail(nn.Module):
    """A decoder's level between patches and pixels: cells parted by `stride`, residual blocks, a linear map.

    Without it all pixels of a patch are one linear map of the features around it, which blurs what moves
    within the patch.
    """

    def __init__(self, blocks: list[ResBlock], channels: int, stride: Stride, channels_out: int) -> None:
        super().__init__()
        self.stride = stride
        self.layers = nn.Sequential(*blocks)
        self.to_patch = PointwiseConv(channels, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_patch(self.layers(self._parted(x)))

    def stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        chunks = regroup(map(self._parted, chunks))
        for block in self.layers:
            assert isinstance(block, ResBlock)
            chunks = block.stream(chunks)
        return map(self.to_patch, chunks)

    def reads(self, start: int, stop: int) -> tuple[int, int]:
        """As `Upsample.reads`."""
        for block in self.layers:
            assert isinstance(block, ResBlock)
            start, stop = block.reads(start, stop)
        return _before_stride(start, stop, self.stride[0])

    def _parted(self, x: Tensor) -> Tensor:
        return unfold(x, self.stride)


def _before_stride(start: int, stop: int, stride: int) -> tuple[int, int]:
    return start // stride, -(-stop // stride)


def activate(normalized: Tensor) -> Tensor:
    """SiLU of a norm's output: in its place where no gradient will ask for it."""
    return F.silu(normalized, inplace=not torch.is_grad_enabled())


def pad_time(x: Tensor, multiple: int) -> Tensor:
    """Repeat the last frame until the length is a multiple."""
    missing = -x.shape[2] % multiple
    return torch.cat((x, x[:, :, -1:].expand(-1, -1, missing, -1, -1)), dim=2) if missing else x


def fold(x: Tensor, patch: Stride) -> Tensor:
    """Blocks of `patch` (time, height, width) become channels, those of one offset side by side."""
    pt, ph, pw = patch
    return rearrange(x, "b c (t pt) (h ph) (w pw) -> b (pt ph pw c) t h w", pt=pt, ph=ph, pw=pw)


def unfold(x: Tensor, patch: Stride) -> Tensor:
    """Inverse of `fold`; channels-last in memory, in one copy."""
    pt, ph, pw = patch
    pixels = rearrange(x, "b (pt ph pw c) t h w -> b (t pt) (h ph) (w pw) c", pt=pt, ph=ph, pw=pw)
    return pixels.movedim(-1, 1)
