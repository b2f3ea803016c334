"""Letter and pillar boxes: rows and columns at the edges that show nothing, all through a shot."""

import numpy as np
from jaxtyping import Float, UInt8

_BLACK = 26  # levels of 255; black of a film is 0 to 20 after compression
_HARDLY = 0.98  # share of the pixels of a black line that are black, at least
_FLAT = 2.0  # standard deviation of a line that shows nothing, in levels
_SAME = 3.0  # levels by which such lines differ
SIDES = ("top", "bottom", "left", "right")


def borders(gray: UInt8[np.ndarray, "h w"]) -> dict[str, float]:
    """How much of the height or width shows nothing at each side, as shares.

    Black counts at any side; of other colours only as much as there is at the opposite side too: sky and
    walls are flat as well.
    """
    step = max(1, max(gray.shape) // 320)  # every second pixel of a large picture tells as much
    gray = np.ascontiguousarray(gray[::step, ::step])
    rows, columns = _lines(gray, 1), _lines(gray, 0)
    (top, dark_top), (bottom, dark_bottom) = _depth(rows), _depth(rows[::-1])
    (left, dark_left), (right, dark_right) = _depth(columns), _depth(columns[::-1])
    return {
        "top": max(min(top, bottom), dark_top), "bottom": max(min(top, bottom), dark_bottom),
        "left": max(min(left, right), dark_left), "right": max(min(left, right), dark_right),
    }  # fmt: skip


def share(depths: Float[np.ndarray, "pictures 4"]) -> float:
    """The share of the picture outside of what is seen in any of the pictures of a shot."""
    if len(depths) == 0:
        return 0.0
    top, bottom, left, right = depths.min(axis=0)
    return float(1 - max(0.0, 1 - top - bottom) * max(0.0, 1 - left - right))


def _lines(gray: UInt8[np.ndarray, "h w"], along: int) -> Float[np.ndarray, "lines 3"]:
    """Of each line along an axis: its mean, its deviation, and whether hardly a pixel of it is not black."""
    import cv2

    def total(picture: np.ndarray, what: int = cv2.REDUCE_SUM) -> np.ndarray:
        return cv2.reduce(picture, along, what, dtype=cv2.CV_64F).reshape(-1)

    length = gray.shape[along]
    mean = total(gray) / length
    variance = np.maximum(total(gray, cv2.REDUCE_SUM2) / length - mean**2, 0)
    dark = total((gray < _BLACK).view(np.uint8))
    return np.stack([mean, np.sqrt(variance), dark > int(_HARDLY * (length - 1))], axis=1)


def _depth(lines: Float[np.ndarray, "h 3"]) -> tuple[float, float]:
    """Shares of the lines from the first one on: flat ones of one colour, and black ones."""
    flat = (lines[:, 1] < _FLAT) & (np.abs(lines[:, 0] - lines[0, 0]) < _SAME)
    return _run(flat), _run(lines[:, 2] > 0)


def _run(true: np.ndarray) -> float:
    """How far a row of booleans is true from its start, as a share."""
    return float(np.argmin(true) if not true.all() else len(true)) / len(true)
