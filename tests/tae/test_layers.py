"""Fast layers against the plain operations they stand for, values and gradients; streams against clips."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from kinoflow.tae.cpu import scratch
from kinoflow.tae.model import chunks
from kinoflow.tae.model.chunks import regroup
from kinoflow.tae.model.convolution import (
    Conv,
    NearestSpatialConv,
    NearestTemporalConv,
    PointwiseConv,
    SpatialConv,
    TemporalConv,
)
from kinoflow.tae.model.layers import Attention, Downsample, FrameGroupNorm, ResBlock, Upsample

SHAPES = [(1, 4, 1, 6, 8), (2, 4, 2, 6, 8), (1, 4, 5, 7, 3)]


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


def replicated(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, 1, 1), mode="replicate")


def plain_temporal(conv: TemporalConv, x: Tensor) -> Tensor:
    return F.conv3d(replicated(x), conv.weight, conv.bias, stride=conv.stride)


def plain_spatial(conv: SpatialConv, x: Tensor) -> Tensor:
    return F.conv3d(x, conv.weight, conv.bias, stride=conv.stride, padding=conv.padding)


def plain_nearest(conv: NearestSpatialConv, x: Tensor) -> Tensor:
    return plain_spatial(conv, F.interpolate(x, scale_factor=(1, *conv.factor), mode="nearest"))


def plain_nearest_temporal(conv: NearestTemporalConv, x: Tensor) -> Tensor:
    return plain_temporal(conv, x.repeat_interleave(conv.factor, dim=2))


def plain_pointwise(conv: PointwiseConv, x: Tensor) -> Tensor:
    return F.conv3d(x, conv.weight, conv.bias)


def plain_norm(norm: FrameGroupNorm, x: Tensor) -> Tensor:
    frames = [
        F.group_norm(x[:, :, t], norm.num_groups, norm.weight, norm.bias, norm.eps) for t in range(x.shape[2])
    ]
    return torch.stack(frames, dim=2)


CASES = {
    "spatial": (lambda: SpatialConv(4, 6), plain_spatial),
    "strided": (lambda: SpatialConv(4, 6, (1, 2, 2), padding=0), plain_spatial),
    "pointwise": (lambda: PointwiseConv(4, 6), plain_pointwise),
    "temporal": (lambda: TemporalConv(4), plain_temporal),
    "temporal strided": (lambda: TemporalConv(4, 2), plain_temporal),
    "nearest": (lambda: NearestSpatialConv(4, 6, (2, 2)), plain_nearest),
    "nearest one axis": (lambda: NearestSpatialConv(4, 6, (1, 3)), plain_nearest),
    "nearest temporal": (lambda: NearestTemporalConv(4, 2), plain_nearest_temporal),
    "nearest temporal 4": (lambda: NearestTemporalConv(4, 4), plain_nearest_temporal),
}


def with_kept_memory(layer: nn.Module) -> nn.Module:
    """Rows of frames are joined where a CPU's fast path joins them."""
    for module in layer.modules():
        if isinstance(module, TemporalConv):
            module.concatenate = scratch.concatenate
    return layer


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_convolutions_equal_their_plain_twins(case: str, shape: tuple[int, ...]) -> None:
    make, plain = CASES[case]
    layer = make().double().to(memory_format=torch.channels_last_3d)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = channels_last(torch.randn(shape, dtype=torch.float64)).requires_grad_()
    fast, slow = layer(x), plain(layer, x)
    torch.testing.assert_close(fast, slow)
    with torch.no_grad():  # which takes another way through some layers
        torch.testing.assert_close(layer(x), slow)
        torch.testing.assert_close(with_kept_memory(layer)(x), slow)
    weight = torch.randn_like(slow)
    inputs = [x, *layer.parameters()]
    for one, other in zip(
        torch.autograd.grad((fast * weight).sum(), inputs),
        torch.autograd.grad((slow * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_group_norm_is_of_each_frame_and_stays_channels_last() -> None:
    norm, x = FrameGroupNorm(64), channels_last(torch.randn(2, 64, 3, 4, 5))
    nn.init.normal_(norm.weight)
    y = norm(x)
    torch.testing.assert_close(y, plain_norm(norm, x))
    assert y.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("case", CASES)
def test_convolutions_keep_channels_last(case: str) -> None:
    y = CASES[case][0]()(channels_last(torch.randn(2, 4, 4, 6, 6)))
    assert y.is_contiguous(memory_format=torch.channels_last_3d)


STREAMED = {
    "conv": lambda: Conv(32, 32),
    "block": lambda: ResBlock(32, 64, "group"),
    "block rms": lambda: ResBlock(32, 32, "rms"),
    "attention": lambda: Attention(32, "group"),
    "down": lambda: Downsample(32, 32, (2, 2, 2), shortcut=False),
    "down in space": lambda: Downsample(32, 64, (1, 2, 2), shortcut=True),
    "down shortcut": lambda: Downsample(32, 64, (2, 2, 2), shortcut=True),
    "down in time": lambda: Downsample(32, 32, (2, 1, 1), shortcut=True),
    "up": lambda: Upsample(32, 32, (2, 2, 2), shortcut=False),
    "up in space": lambda: Upsample(32, 32, (1, 2, 2), shortcut=True),
    "up shortcut": lambda: Upsample(32, 16, (2, 2, 2), shortcut=True),
    "up in time": lambda: Upsample(32, 32, (2, 1, 1), shortcut=True),
}


@pytest.mark.parametrize("case", STREAMED)
@pytest.mark.parametrize("frames", [1, 2, 5, 8])
@pytest.mark.parametrize("held", [1, 3, 100])
def test_a_stream_of_chunks_equals_the_whole_clip(
    case: str, frames: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = channels_last(torch.randn(2, 32, frames, 6, 6, dtype=torch.float64))
    monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", held * x[:, :, 0].numel() * x.element_size())
    layer = STREAMED[case]().double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    whole = layer(x)
    with torch.no_grad():
        parts = list(layer.stream(regroup([x])))
        kept = list(with_kept_memory(layer).stream(regroup([x])))
    torch.testing.assert_close(torch.cat(parts, dim=2), whole)
    torch.testing.assert_close(torch.cat(kept, dim=2), whole)
    if held == 1 and frames == 8 and case == "conv":
        assert len(parts) == frames


@pytest.mark.parametrize("lengths", [[7], [1] * 7, [3, 4], [1, 6]], ids=str)
@pytest.mark.parametrize("multiple", [1, 2])
def test_regrouping_keeps_frames_in_order_and_chunks_in_size(
    lengths: list[int], multiple: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", 3 * 4)  # three frames of one float
    x = torch.arange(7.0).view(1, 1, 7, 1, 1)
    parts = list(regroup(x.split(lengths, dim=2), multiple=multiple))
    assert torch.equal(torch.cat(parts, dim=2), x)
    assert [part.shape[2] for part in parts] == ([3, 3, 1] if multiple == 1 else [2, 2, 2, 1])


def test_attention_over_time_copies_no_weights() -> None:
    """Positions times weights, 45 GB at 720p, is what a frozen layer takes for rows that are not in order."""
    attention = Attention(64, "group").requires_grad_(False)
    x = channels_last(torch.randn(1, 64, 2, 16, 16))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        attention(x)
    shapes = [shape for event in profiled.events() for shape in event.input_shapes or () if shape]
    assert max(map(math.prod, shapes)) == 3 * x.numel()
