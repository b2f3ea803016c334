"""How much the picture moves, and whether the camera shakes: dense optical flow between neighbours."""

import functools
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

_STEP = 24.0  # the rate of film: lengths are per 24th of a second, whatever the clip's own rate
_SPARSE = 4  # of the quickest preset, which finds the flow at a quarter of the size and interpolates
_SMOOTH = 0.5  # seconds over which a camera's own path is averaged


@functools.cache
def _flow() -> Any:
    import cv2

    return cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)


def motion(before: UInt8[np.ndarray, "h w"], after: UInt8[np.ndarray, "h w"]) -> dict[str, float]:
    """Mean length of the flow from one grey frame to the next, and its median, the camera.

    In shares of the longer side (Kroeger et al. 2016, dense inverse search, through OpenCV).
    """
    # OpenCV's flow wants pictures that its patches fit in.
    if min(before.shape) < 16:
        before, after = (np.pad(each, [(0, max(0, 16 - side)) for side in each.shape], "edge")
                         for each in (before, after))  # fmt: skip
    before, after = np.ascontiguousarray(before), np.ascontiguousarray(after)
    dense = _flow().calc(before, after, None)
    x, y = dense[_SPARSE // 2 :: _SPARSE, _SPARSE // 2 :: _SPARSE].reshape(-1, 2).T / max(before.shape)
    return {"flow": float(np.sqrt(x * x + y * y).mean()), "flow_x": _median(x), "flow_y": _median(y)}


def _median(values: Float[np.ndarray, " n"]) -> float:
    """The upper one of two, several times as fast as NumPy's own for a few hundred values."""
    middle = len(values) // 2
    return float(np.partition(values, middle)[middle])


def amount(flow: Float[np.ndarray, " frames"], fps: float) -> float:
    """Mean length of the flow in a shot, in thousandths of the longer side in a 24th of a second.

    One thousandth is .77 pixels of a picture of 768 in that time.
    """
    return float(1000 * flow.mean() * fps / _STEP) if len(flow) else 0.0


def shake(x: Float[np.ndarray, " frames"], y: Float[np.ndarray, " frames"], fps: float) -> float:
    """How far the camera's path strays from its moving average, in thousandths of the longer side (RMS)."""
    if len(x) < 3:
        return 0.0
    path = np.cumsum(np.stack([x, y]), axis=1)
    width = min(len(x), max(3, round(_SMOOTH * fps))) | 1
    padded = np.pad(path, ((0, 0), (width // 2, width // 2)), mode="reflect", reflect_type="odd")
    kernel = np.ones(width) / width
    smooth = np.stack([np.convolve(line, kernel, "valid") for line in padded])
    return float(1000 * np.sqrt(((path - smooth[:, : path.shape[1]]) ** 2).sum(axis=0).mean()))
