"""How close a reconstruction is to its source: PSNR, SSIM, perceptual distance, flicker, and tile borders.

Pictures are "frames 3 height width" in [0, 1]; one value for each frame. The accumulator takes clips as they
are read and written (uint8, channels last) and needs no more memory than the chunk it is given.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]

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

    `flicker` is what moves in the reconstruction and not in the source, or the other way round: the mean
    absolute difference between the changes from frame to frame, in levels of 255; its first value belongs to
    the second frame; None for one frame. `seam` is that change where a tile begins over the change inside
    tiles: 1 where borders do not show, more where they flicker; None for a clip of one tile or without any
    error. `perceptual` is measured at the frames `perceptual_frames` only, and None where it is not.
    """

    frames: int
    psnr: float
    ssim: float
    perceptual: float | None
    flicker: float | None
    seam: float | None
    psnr_by_frame: tuple[float, ...]
    ssim_by_frame: tuple[float, ...]
    flicker_by_frame: tuple[float, ...]
    perceptual_by_frame: tuple[float, ...]
    perceptual_frames: tuple[int, ...]


class QualityMeter:
    """Measure a clip chunk by chunk; `seam` looks at the borders of tiles of `tile_frames` frames.

    Args:
        tile_frames: frames in one tile.
        perceptual: a distance of "1 3 1 height width" in [-1, 1]; None leaves it out.
        every: measure the perceptual distance at every so many frames, from the first on.
    """

    def __init__(self, tile_frames: int, *, perceptual: Distance | None = None, every: int = 1) -> None:
        self._tile_frames, self._perceptual, self._every = tile_frames, perceptual, every
        self._psnr: list[float] = []
        self._ssim: list[float] = []
        self._distance: dict[int, float] = {}
        self._flicker: list[float] = []
        self._last_error: Tensor | None = None

    def update(
        self,
        reconstruction: UInt8[np.ndarray, "frames height width 3"],
        source: UInt8[np.ndarray, "frames height width 3"],
    ) -> list[float]:
        """Add frames that follow those of the call before, and give the PSNR of each."""
        for restored, original in zip(reconstruction, source, strict=True):
            x, y = _picture(restored), _picture(original)
            error = x - y
            if self._last_error is not None:
                self._flicker.append(255 * float((error - self._last_error).abs().mean()))
            self._last_error = error
            if self._perceptual is not None and len(self._psnr) % self._every == 0:
                both = (2 * picture.unsqueeze(2) - 1 for picture in (x, y))
                self._distance[len(self._psnr)] = float(self._perceptual(*both))
            self._psnr += psnr(x, y).tolist()
            self._ssim += ssim(x, y).tolist()
        return self._psnr[-len(source) :]

    def result(self) -> Quality:
        """Figures of all frames so far.

        Raises:
            ValueError: no frame was measured.
        """
        if not self._psnr:
            raise ValueError("quality: no frame was measured")
        tile = self._tile_frames
        border = _mean(self._flicker[tile - 1 :: tile])
        inside = _mean([value for i, value in enumerate(self._flicker, 1) if i % tile])
        return Quality(
            frames=len(self._psnr),
            psnr=math.fsum(self._psnr) / len(self._psnr),
            ssim=math.fsum(self._ssim) / len(self._ssim),
            perceptual=_mean(list(self._distance.values())),
            flicker=_mean(self._flicker),
            seam=border / inside if border is not None and inside else None,
            psnr_by_frame=tuple(self._psnr),
            ssim_by_frame=tuple(self._ssim),
            flicker_by_frame=tuple(self._flicker),
            perceptual_by_frame=tuple(self._distance.values()),
            perceptual_frames=tuple(self._distance),
        )


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _picture(frame: UInt8[np.ndarray, "height width 3"]) -> Float[Tensor, "1 3 height width"]:
    return torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1).unsqueeze(0) / 255
