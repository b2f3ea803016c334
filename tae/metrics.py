"""How close a reconstruction is to its source: PSNR, SSIM, and whether tile borders show.

Pictures are "frames 3 height width" in [0, 1]; one value for each frame. The accumulator takes clips as they
are read and written (uint8, channels last) and needs no more memory than the chunk it is given.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

MAX_PSNR = 100.0  # dB; stands for "equal", so that means stay finite

# Wang et al. 2004, section III.C: an 11 x 11 Gaussian window, sigma 1.5, K1 = .01, K2 = .03.
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2


def psnr(
    reconstruction: Float[Tensor, "frames 3 height width"], source: Float[Tensor, "frames 3 height width"]
) -> Float[Tensor, " frames"]:
    """Peak signal-to-noise ratio of each frame in dB, -10·log10(mean squared error), at most MAX_PSNR."""
    error = (reconstruction - source).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(error.clamp_min(10 ** (-MAX_PSNR / 10)))


def ssim(
    reconstruction: Float[Tensor, "frames 3 height width"], source: Float[Tensor, "frames 3 height width"]
) -> Float[Tensor, " frames"]:
    """Structural similarity of each frame (Wang et al. 2004, eq. 13), mean over channels and pixels.

    Borders are mirrored, as in torchmetrics; below 6 pixels a side the window is cut to fit.
    """
    moments = (reconstruction, source, reconstruction.square(), source.square(), reconstruction * source)
    mean_x, mean_y, square_x, square_y, product = _smooth(torch.stack(moments))
    var_x, var_y = square_x - mean_x.square(), square_y - mean_y.square()
    covariance = product - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x.square() + mean_y.square() + _C1)
    structure = (2 * covariance + _C2) / (var_x + var_y + _C2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _smooth(maps: Float[Tensor, "n frames 3 height width"]) -> Float[Tensor, "n frames 3 height width"]:
    # The window is separable, and two band matrices are several times faster on a CPU than a convolution.
    rows, columns = (_window_matrix(side, maps) for side in maps.shape[3:])
    return rows @ maps @ columns.T


def _window_matrix(side: int, like: Tensor) -> Float[Tensor, "side side"]:
    """Row i holds the window around position i, mirrored at the ends."""
    reach = min(_WINDOW // 2, side - 1)
    offset = torch.arange(-reach, reach + 1, device=like.device)
    window = torch.exp(-offset.to(like.dtype).square() / (2 * _SIGMA**2))
    position = (torch.arange(side, device=like.device)[:, None] + offset).abs()
    position = torch.where(position >= side, 2 * (side - 1) - position, position)
    weights = (window / window.sum()).expand(side, -1)
    return like.new_zeros(side, side).scatter_add_(1, position, weights)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Means over a clip and the values of each frame.

    `seam` is the change of the error from frame to frame where a tile begins, over the change inside tiles:
    1 where borders do not show, more where they flicker; None for a clip of one tile or without any error.
    """

    frames: int
    psnr: float
    ssim: float
    seam: float | None
    psnr_by_frame: tuple[float, ...]
    ssim_by_frame: tuple[float, ...]


class QualityMeter:
    """Measure a clip chunk by chunk; `seam` looks at the borders of tiles of `tile_frames` frames."""

    def __init__(self, tile_frames: int) -> None:
        self._tile_frames = tile_frames
        self._psnr: list[float] = []
        self._ssim: list[float] = []
        self._change = {True: [0.0, 0], False: [0.0, 0]}
        self._last_error: Tensor | None = None

    def update(
        self,
        reconstruction: UInt8[np.ndarray, "frames height width 3"],
        source: UInt8[np.ndarray, "frames height width 3"],
    ) -> None:
        """Add frames that follow those of the call before."""
        for restored, original in zip(reconstruction, source, strict=True):
            x, y = _picture(restored), _picture(original)
            self._follow(x - y)
            self._psnr += psnr(x, y).tolist()
            self._ssim += ssim(x, y).tolist()

    def _follow(self, error: Tensor) -> None:
        if self._last_error is not None:
            change = self._change[len(self._psnr) % self._tile_frames == 0]
            change[0] += float((error - self._last_error).abs().mean())
            change[1] += 1
        self._last_error = error

    def result(self) -> Quality:
        """Figures of all frames so far.

        Raises:
            ValueError: no frame was measured.
        """
        if not self._psnr:
            raise ValueError("quality: no frame was measured")
        (border, borders), (inside, insides) = self._change[True], self._change[False]
        seam = (border / borders) / (inside / insides) if borders and inside else None
        return Quality(
            frames=len(self._psnr),
            psnr=math.fsum(self._psnr) / len(self._psnr),
            ssim=math.fsum(self._ssim) / len(self._ssim),
            seam=seam,
            psnr_by_frame=tuple(self._psnr),
            ssim_by_frame=tuple(self._ssim),
        )


def _picture(frame: UInt8[np.ndarray, "height width 3"]) -> Float[Tensor, "1 3 height width"]:
    return torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1).unsqueeze(0) / 255
