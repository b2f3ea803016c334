"""How much the picture moves, and whether the camera shakes: dense optical flow between neighbours."""

import functools
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

_STEP = 24.0  # the rate of film: lengths are per 24th of a second, whatever the clip's own rate
_SPARSE = 4  # of the quickest preset, which finds the flow at a quarter of the size and interpolates
_LEAST = 16  # pixels of a side
_STILL = 0.75e-3  # of the longer side in a 24th of a second
_SMOOTH = 0.5  # seconds over which a camera's own path is averaged


@functools.cache
def _dense() -> Any:
    import cv2

    return cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)


def motion(before: UInt8[np.ndarray, "h w"], after: UInt8[np.ndarray, "h w"]) -> dict[str, float]:
    """What `motions` says of one pair of grey frames."""
    found = motions(flow(before, after)[None], before.shape)
    return {key: float(values[0]) for key, values in found.items()}


def flow(before: UInt8[np.ndarray, "h w"], after: UInt8[np.ndarray, "h w"]) -> Float[np.ndarray, "places 2"]:
    """The flow from one grey frame to the next where it is looked at, right and down, in pixels.

    Kroeger et al. 2016, dense inverse search, through OpenCV.
    """
    # OpenCV's flow wants pictures that its patches fit in.
    if min(before.shape) < _LEAST:
        before, after = (np.pad(each, [(0, max(0, _LEAST - side)) for side in each.shape], "edge")
                         for each in (before, after))  # fmt: skip
    dense = _dense().calc(np.ascontiguousarray(before), np.ascontiguousarray(after), None)
    return dense[_SPARSE // 2 :: _SPARSE, _SPARSE // 2 :: _SPARSE].reshape(-1, 2)


def motions(
    flows: Float[np.ndarray, "frames places 2"], size: tuple[int, ...]
) -> dict[str, Float[np.ndarray, " frames"]]:
    """Mean length of each flow between pictures of `size` (height, width), and its median, the camera.

    In shares of the longer side. Of the camera also by how much the picture grows, as a share, and turns
    clockwise, in radians. Each flow by itself: the same in any company.
    """
    size = (max(_LEAST, size[0]), max(_LEAST, size[1]))
    x, y = np.moveaxis(flows, 2, 0) / np.float32(max(size))
    camera_x, camera_y = _median(x), _median(y)
    zoom, roll = _turn(x - camera_x[:, None], y - camera_y[:, None], size)
    return {"flow": np.sqrt(x * x + y * y).mean(axis=1), "flow_x": camera_x, "flow_y": camera_y,
            "zoom": zoom, "roll": roll}  # fmt: skip


@functools.cache
def _places(size: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Where the flow is looked at, from the middle of the picture, in shares of the longer side."""
    rows, columns = (np.arange(side)[_SPARSE // 2 :: _SPARSE] - (side - 1) / 2 for side in size)
    y, x = np.meshgrid(rows / max(size), columns / max(size), indexing="ij")
    return x.reshape(-1).astype(np.float32), y.reshape(-1).astype(np.float32)


def _turn(
    u: Float[np.ndarray, "frames n"], v: Float[np.ndarray, "frames n"], size: tuple[int, ...]
) -> tuple[Float[np.ndarray, " frames"], Float[np.ndarray, " frames"]]:
    """Of u = zoom x - roll y, v = zoom y + roll x the least squares, without what moves by itself.

    After a first fit the half of the places that fit it worst are left out.
    """
    x, y = _places(size)
    outward, around, apart = x * u + y * v, x * v - y * u, x * x + y * y
    zoom, roll = (each.sum(axis=1, keepdims=True) / apart.sum() for each in (outward, around))
    off = (u - zoom * x + roll * y) ** 2 + (v - zoom * y - roll * x) ** 2
    kept = off <= _median(off)[:, None]
    weight = np.maximum((kept * apart).sum(axis=1), 1e-9)
    return (kept * outward).sum(axis=1) / weight, (kept * around).sum(axis=1) / weight


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


def _median(values: Float[np.ndarray, "frames n"]) -> Float[np.ndarray, " frames"]:
    """The upper one of two, several times as fast as NumPy's own for a few hundred values."""
    middle = values.shape[1] // 2
    return np.partition(values, middle, axis=1)[:, middle]


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
