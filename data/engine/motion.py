"""How much the picture moves, and whether the camera shakes: dense optical flow between neighbours."""

import functools
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

_STEP = 24.0  # the rate of film: lengths are per 24th of a second, whatever the clip's own rate
_SPARSE = 4  # of the quickest preset, which finds the flow at a quarter of the size and interpolates
_STILL = 0.75e-3  # of the longer side in a 24th of a second
_SMOOTH = 0.5  # seconds over which a camera's own path is averaged


@functools.cache
def _flow() -> Any:
    import cv2

    return cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)


def motion(before: UInt8[np.ndarray, "h w"], after: UInt8[np.ndarray, "h w"]) -> dict[str, float]:
    """Mean length of the flow from one grey frame to the next, and its median, the camera.

    In shares of the longer side (Kroeger et al. 2016, dense inverse search, through OpenCV). Of the camera
    also by how much the picture grows, as a share, and turns clockwise, in radians.
    """
    # OpenCV's flow wants pictures that its patches fit in.
    if min(before.shape) < 16:
        before, after = (np.pad(each, [(0, max(0, 16 - side)) for side in each.shape], "edge")
                         for each in (before, after))  # fmt: skip
    before, after = np.ascontiguousarray(before), np.ascontiguousarray(after)
    dense = _flow().calc(before, after, None)
    x, y = dense[_SPARSE // 2 :: _SPARSE, _SPARSE // 2 :: _SPARSE].reshape(-1, 2).T / max(before.shape)
    camera_x, camera_y = _median(x), _median(y)
    zoom, roll = _turn(x - camera_x, y - camera_y, dense.shape)
    return {"flow": float(np.sqrt(x * x + y * y).mean()), "flow_x": camera_x, "flow_y": camera_y,
            "zoom": zoom, "roll": roll}  # fmt: skip


@functools.cache
def _places(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Where the flow is looked at, from the middle of the picture, in shares of the longer side."""
    rows, columns = (np.arange(side)[_SPARSE // 2 :: _SPARSE] - (side - 1) / 2 for side in shape[:2])
    y, x = np.meshgrid(rows / max(shape[:2]), columns / max(shape[:2]), indexing="ij")
    return x.reshape(-1).astype(np.float32), y.reshape(-1).astype(np.float32)


def _turn(u: np.ndarray, v: np.ndarray, shape: tuple[int, ...]) -> tuple[float, float]:
    """Of u = zoom x - roll y, v = zoom y + roll x the least squares, without what moves by itself.

    After a first fit the half of the places that fit it worst are left out.
    """
    x, y = _places(shape)
    zoom, roll = _similarity(u, v, x, y)
    off = (u - zoom * x + roll * y) ** 2 + (v - zoom * y - roll * x) ** 2
    kept = off <= _median(off)
    return _similarity(u[kept], v[kept], x[kept], y[kept])


def _similarity(u: np.ndarray, v: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    size = float(x @ x + y @ y)
    return float(x @ u + y @ v) / max(size, 1e-9), float(x @ v - y @ u) / max(size, 1e-9)


def camera(
    x: Float[np.ndarray, " frames"],
    y: Float[np.ndarray, " frames"],
    zoom: Float[np.ndarray, " frames"],
    roll: Float[np.ndarray, " frames"],
    fps: float,
) -> str:
    """What the camera mostly does in a shot: pan, tilt, zoom or roll with its direction, or still.

    Each is taken by how far it moves a place half a side from the middle in a 24th of a second; of what stays
    below three quarters of a thousandth of the side, nothing is said. The picture goes the other way than a
    camera that pans, tilts or rolls.
    """
    if len(x) == 0:
        return "still"
    moves = [(x, "pan left", "pan right"), (y, "tilt up", "tilt down"), (zoom / 2, "zoom in", "zoom out"),
             (roll / 2, "roll counterclockwise", "roll clockwise")]  # fmt: skip
    sizes = [float(np.mean(values)) * fps / _STEP for values, _, _ in moves]
    largest = int(np.argmax(np.abs(sizes)))
    if abs(sizes[largest]) < _STILL:
        return "still"
    _, positive, negative = moves[largest]
    return positive if sizes[largest] > 0 else negative


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
