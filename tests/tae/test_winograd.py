"""The convolution with half of the products against the plain one."""

import threading

import pytest
import torch
import torch.nn.functional as F

from kinoflow.tae.cpu import scratch, winograd
from kinoflow.tae.model.convolution import SpatialConv


def operands(*shape, seed=0):
    n, channels_in, channels_out, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(*size, generator=generator)
        for size in ((n, channels_in, height, width), (channels_out, channels_in, 3, 3), (channels_out,))
    )
    return x.to(memory_format=torch.channels_last), weight / (9 * channels_in) ** 0.5, bias


SHAPES = [(1, 5, 7, 4, 1), (2, 3, 4, 8, 5), (3, 16, 8, 16, 33), (1, 128, 96, 64, 40), (4, 130, 128, 32, 16)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("strip", [1, winograd.STRIP_BYTES], ids=["one row of tiles", "as it is"])
@torch.inference_mode()
def test_equals_the_direct_convolution(shape, strip, monkeypatch):
    monkeypatch.setattr(winograd, "STRIP_BYTES", strip)
    x, weight, bias = operands(*shape)
    truth = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    y = winograd.conv3x3(x, weight, bias)
    assert y.shape == truth.shape and y.is_contiguous(memory_format=torch.channels_last)
    error = (y - truth).abs()
    assert error.max() < 6e-5 and error.square().mean().sqrt() < 3e-6  # values are about one


@torch.inference_mode()
def test_one_pixel_and_one_tap():
    """Each tap moves a pixel by its offset, into the tile above and the one below too; outside are zeros."""
    for row in range(8):
        for tap in range(3):
            x, weight = torch.zeros(1, 1, 8, 1), torch.zeros(1, 1, 3, 3)
            x[0, 0, row], weight[0, 0, tap, 1] = 1, 1
            wanted = torch.zeros(8)
            if 0 <= row + 1 - tap < 8:
                wanted[row + 1 - tap] = 1
            y = winograd.conv3x3(x, weight, torch.zeros(1))
            assert torch.allclose(y[0, 0, :, 0], wanted, atol=1e-6), (row, tap)


def test_kernels_satisfy_the_identity():
    """In float64: the tile by the polynomial with the other roots, times the kernel, read off as pixels."""
    generator = torch.Generator().manual_seed(1)
    tile, taps = torch.randn(6, generator=generator).double(), torch.randn(3, generator=generator).double()
    kernels = torch.stack(
        [kernel[0, 0, 0, 0] for kernel in winograd._kernels(taps.view(1, 1, 3, 1).expand(1, 1, 3, 3))]
    )
    points = torch.tensor(winograd.POINTS, dtype=torch.float64)
    products = []
    for kernel, roots in zip(kernels, [*(points[points != point] for point in points), points], strict=True):
        polynomial = torch.ones(1, dtype=torch.float64)
        for root in roots:
            polynomial = F.pad(polynomial, (1, 0)) - root * F.pad(polynomial, (0, 1))
        products.append(kernel * (polynomial @ tile[: len(polynomial)]))
    pixels = points ** torch.arange(4)[:, None] @ torch.stack(products[:5])
    pixels[3] += products[5]
    assert torch.allclose(pixels, tile.unfold(0, 3, 1) @ taps, rtol=0, atol=1e-12)


def test_a_height_that_is_no_multiple_is_refused():
    with pytest.raises(ValueError, match="height of 6 is not a multiple of 4"):
        winograd.conv3x3(*operands(1, 4, 4, 6, 4))


@torch.inference_mode()
def test_a_frame_is_the_same_alone_and_among_others():
    x, weight, bias = operands(4, 128, 128, 32, 32)
    together = winograd.conv3x3(x, weight, bias)
    assert all(
        torch.allclose(winograd.conv3x3(x[i : i + 1], weight, bias)[0], together[i], atol=1e-6)
        for i in range(4)
    )


def test_where_it_pays():
    x, weight, _ = operands(1, 128, 128, 32, 32)
    assert not winograd.pays(x, weight)  # gradients may be asked for
    with torch.no_grad():
        assert winograd.pays(x, weight) and winograd.pays(x.repeat(3, 1, 1, 1), weight)
        assert not winograd.pays(x.bfloat16(), weight.bfloat16())
        assert not winograd.pays(x.double(), weight.double())
        assert not winograd.pays(x.to("meta"), weight.to("meta"))
        assert not winograd.pays(x[:, :, :30], weight)
        assert not winograd.pays(x[:, :, :8, :8], weight)
        assert not winograd.pays(x, weight[:64])
        with torch.autocast("cpu", torch.bfloat16):
            assert not winograd.pays(x, weight)


def test_the_layer_takes_it_without_gradients_only(monkeypatch):
    calls = []
    convolve = winograd.conv3x3
    monkeypatch.setattr(winograd, "conv3x3", lambda *given: calls.append(1) or convolve(*given))
    layer = SpatialConv(128, 96)
    layer.convolve = winograd.convolve
    x = torch.randn(2, 128, 3, 32, 16).to(memory_format=torch.channels_last_3d)
    plain = layer(x)
    assert not calls and plain.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.allclose(layer(x), plain, atol=2e-5)
    assert len(calls) == 2


def test_threads_do_not_share_their_scratch():
    """Eight threads convolve at once; each has what it has alone."""
    given = [operands(1, 16, 16, 32, 32, seed=seed) for seed in range(8)]
    alone = [F.conv2d(*operand, padding=1) for operand in given]
    found: list[torch.Tensor | None] = [None] * 8

    @torch.no_grad()
    def work(i):
        for _ in range(20):
            found[i] = winograd.conv3x3(*given[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, alone, strict=True):
        assert one is not None and torch.allclose(one, other, atol=1e-4)


def test_scratch_is_kept_grows_and_changes_type(monkeypatch):
    like = torch.zeros(1)
    first = scratch.take("test", (4, 5), like)
    assert first.shape == (4, 5) and first.dtype == torch.float32
    assert scratch.take("test", (10,), like).data_ptr() == first.data_ptr()
    assert scratch.take("test", (3,), like.double()).dtype == torch.float64
    assert scratch.take("other", (4, 5), like).data_ptr() != first.data_ptr()
    assert scratch.take("test", (400,), like).numel() == 400
    monkeypatch.setattr(scratch, "KEPT_BYTES", 100)
    large = scratch.take("test", (200,), like)
    assert scratch.take("test", (200,), like).data_ptr() != large.data_ptr()
    assert scratch.take("test", (2,), like.to("meta")).device.type == "meta"


def test_scratch_made_in_inference_mode_is_used_outside_it():
    with torch.inference_mode():
        scratch.take("mode", (8,), torch.zeros(1)).fill_(1)
    with torch.no_grad():
        assert scratch.take("mode", (8,), torch.zeros(1)).fill_(2).sum() == 16
