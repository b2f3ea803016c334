"""3x3 convolution with half of the products, for CPUs: F(4, 3) of Lavin and Gray 2016, arXiv:1509.09308.

Along the height only: there 4 pixels and the 3 taps of a kernel are polynomials. Both are evaluated at 6
points, where their product is one product a point (6, not 12), and the pixels are read off from those
values. Each product is a convolution of one row by 3 taps, which the library runs as fast as one of 3x3. In
both dimensions a quarter of the products would do, but reading and writing memory would take the time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kinoflow.tae.cpu import scratch
from kinoflow.tae.model.chunks import streams

TILE = 4
# Where the polynomials are evaluated, beside infinity. With these the transforms are sums of two terms, and
# the error is twice that of a direct convolution in fp32, or about 2e-6 of the values.
HALF, SQUARE = 0.5, 0.25
POINTS = (0.0, 1.0, -1.0, HALF, -HALF)
# With fewer the transforms cost what the products save.
LEAST_CHANNELS = 96
LEAST_PIXELS = 256
# About what the values at one point take of the tiles that are transformed at once.
STRIP_BYTES = 2 << 20


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether `conv3x3` takes "n c h w" frames on this device and in this mode, and is faster on them.

    What decides is the same for one frame and for many: a frame gives the same numbers in any batch.
    """
    height, width = x.shape[2:]
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and streams()
        and not torch.is_autocast_enabled("cpu")
        and min(weight.shape[:2]) >= LEAST_CHANNELS
        and height % TILE == 0
        and height * width >= LEAST_PIXELS
    )


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...]
) -> Tensor:
    """`F.conv2d` by kernels of 3x3 with stride 1 and padding 1, as `conv3x3` where it pays."""
    return conv3x3(x, weight, bias) if pays(x, weight) else F.conv2d(x, weight, bias, stride, padding)


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """2D convolution, stride 1, padded by one zero: "n i h w" by "o i 3 3", fp32, without gradients.

    The result is channels-last in memory, as `x` should be.

    Raises:
        ValueError: a height that is not a multiple of 4.
    """
    n, channels, height, width = x.shape
    if height % TILE:
        raise ValueError(f"a height of {height} is not a multiple of {TILE}")
    kernels = _kernels(weight)
    biases = (None, bias, None, None, None, None)  # what is added at the point one comes out in every pixel
    rows = x.movedim(1, -1).unflatten(1, (-1, TILE))
    y = x.new_empty(n, height // TILE, TILE, width, len(weight))
    step = max(STRIP_BYTES // (n * width * channels * x.element_size()), 1)
    for top in range(0, height // TILE, step):
        values = _values(rows, top, min(top + step, height // TILE))
        products = [
            F.conv2d(value.movedim(-1, 1), kernel, constant, padding=(0, 1)).movedim(1, -1)
            for value, kernel, constant in zip(values, kernels, biases, strict=True)
        ]
        _write_pixels(products, y[:, top : top + step])
    return y.flatten(1, 2).movedim(-1, 1)


def _values(rows: Tensor, top: int, bottom: int) -> Tensor:
    """Values of some tiles of "n tile row w c" at the points: "point n tile w c".

    Each lacks a factor, which the kernel has. A tile sees the last row of the one above it and the first row
    of the one below; at an edge, zeros.
    """
    first, second, third, fourth = rows[:, top:bottom].unbind(2)
    values = scratch.take("values", (len(POINTS) + 1, *first.shape), rows)
    even, odd = (scratch.take(name, tuple(first.shape), rows) for name in ("even", "odd"))
    torch.sub(fourth, second, alpha=SQUARE, out=even)
    torch.sub(third, first, alpha=SQUARE, out=odd)
    torch.add(even, odd, out=values[1])
    torch.sub(even, odd, out=values[2])
    torch.sub(fourth, second, out=even)
    torch.sub(third, first, out=odd)
    torch.add(even, odd, alpha=HALF, out=values[3])
    torch.sub(even, odd, alpha=HALF, out=values[4])
    inside = slice(0, bottom - top if bottom < rows.shape[1] else -1)
    values[5].zero_()[:, inside] = rows[:, top + 1 : bottom + 1, 0]
    values[5].sub_(third).sub_(odd, alpha=SQUARE)
    outside = odd.zero_()
    outside[:, top == 0 :] = rows[:, max(top - 1, 0) : bottom - 1, 3]
    torch.add(even, outside.sub_(second), alpha=SQUARE, out=values[0])
    return values


def _write_pixels(products: list[Tensor], pixels: Tensor) -> None:
    """Values of convolved tiles at the points ("n tile w c") to "n tile row w c"; overwrites `products`."""
    at_zero, one, minus_one, half, minus_half, at_infinity = products
    even_one, even_half = one + minus_one, half + minus_half
    odd_one, odd_half = one.sub_(minus_one), half.sub_(minus_half)
    first, second, third, fourth = pixels.unbind(2)
    torch.add(at_zero.add_(even_one), even_half, out=first)
    torch.add(odd_one, odd_half, alpha=HALF, out=second)
    torch.add(even_one, even_half, alpha=SQUARE, out=third)
    torch.add(at_infinity.add_(odd_one), odd_half, alpha=HALF * SQUARE, out=fourth)


def _kernels(weight: Tensor) -> list[Tensor]:
    """Every kernel, a polynomial along its height, at the points: "o i 1 3" each, with what `_values` lacks.

    With V(k) the powers below k of each point, a convolution is V(4)' (V(3) kernel * V(6)'^-1 tile). A row of
    V(6)'^-1 is the polynomial with roots at all other points, which is what `_values` evaluates, over that
    polynomial at the point itself. At infinity only the highest power counts.
    """
    above, beside, below = weight.movedim(1, -1).unbind(1)
    kernels = [above / SQUARE]
    for point, other in ((1.0, HALF), (HALF, 1.0)):
        scale = 1 / (2 * point**2 * (point**2 - other**2))
        even = (above * scale).add_(below, alpha=scale * point**2)
        kernels += [
            torch.add(even, beside, alpha=scale * point),
            torch.sub(even, beside, alpha=scale * point),
        ]
    return [kernel.movedim(-1, 1).unsqueeze(2) for kernel in (*kernels, below)]
