"""Dissolves and fades: pictures that lie on a straight line between two others, and stand still outside.

In a dissolve from A to B the picture is (1 - α) A + α B with α from 0 to 1. What moves in the pictures, or a
camera, bends that line; what fades slowly within a shot goes on behind its end.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

SIZE = (14, 24)  # height and width of the pictures that are compared
LONGEST = 1.2  # seconds on each side of the middle
_HALVES = (0.1, 0.16, 0.25, 0.4, 0.6, 0.85, 1.1)  # seconds from the middle to an end
_POINTS = np.arange(1, 8) / 8  # where on the line it is looked
_BENT = 0.04  # mean squared distance from the line, in squares of its length; of a hard cut it is above 0.08
_OUTSIDE = 0.5  # speed outside of it, in shares of that within


@dataclass(frozen=True, kw_only=True)
class Dissolve:
    """The first and the last frame that are mixed, and how far apart the ends are (levels of 255)."""

    first: int
    last: int
    distance: float


def tiny(picture: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, " values"]:
    """What of a picture is compared."""
    import cv2

    return cv2.resize(picture, SIZE[::-1], interpolation=cv2.INTER_AREA).reshape(-1).astype(np.float32)


def dissolve_signal(
    pictures: Float[np.ndarray, "frames values"], fps: float
) -> tuple[Float[np.ndarray, " frames"], Float[np.ndarray, " frames"]]:
    """For each frame as the middle of a dissolve: the distance of its ends, 0 where there is none, and half
    of its length in frames.

    Of the lengths that fit, the one whose line is the straightest.
    """
    count = len(pictures)
    distance, half, least = np.zeros(count, np.float32), np.zeros(count, np.float32), np.full(count, _BENT)
    for width in sorted({max(2, round(seconds * fps)) for seconds in _HALVES}):
        beyond = max(1, width // 2)
        if count <= 2 * (width + beyond):
            break
        middle = np.arange(width + beyond, count - width - beyond)
        bent, length, outside = _line(pictures, middle, width, beyond)
        better = (bent < least[middle]) & (outside < _OUTSIDE)
        chosen = middle[better]
        least[chosen], distance[chosen], half[chosen] = bent[better], length[better], width
    return distance, half


def _line(
    pictures: Float[np.ndarray, "frames values"], middle: np.ndarray, width: int, beyond: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each middle: how bent its line is, how long (RMS levels), and the speed outside against inside."""
    first, last = pictures[middle - width], pictures[middle + width]
    whole = last - first
    square = np.maximum((whole**2).mean(axis=1), 1e-6)
    bent = np.zeros(len(middle))
    for share in _POINTS:
        at = 2 * width * share  # frames from the first one, between two of them
        low = int(at)
        offset = middle - width + low
        between = pictures[offset] + (at - low) * (pictures[offset + 1] - pictures[offset])
        bent += ((between - first - share * whole) ** 2).mean(axis=1)
    speed = np.sqrt(square) / (2 * width)
    out = [np.sqrt(((pictures[middle + a] - pictures[middle + b]) ** 2).mean(axis=1)) / beyond
           for a, b in ((-width, -width - beyond), (width + beyond, width))]  # fmt: skip
    return bent / len(_POINTS) / square, np.sqrt(square), np.maximum(*out) / speed


def dissolves(
    distance: Float[np.ndarray, " frames"], half: Float[np.ndarray, " frames"], least: float
) -> list[Dissolve]:
    """Those whose ends are at least so far apart (levels of 255); of those that overlap the most different.

    None when `least` is 0.
    """
    found: list[Dissolve] = []
    if least <= 0:
        return found
    for middle in np.argsort(-distance, kind="stable"):
        if distance[middle] < least:
            break
        first, last = int(middle - half[middle]) + 1, int(middle + half[middle]) - 1
        if all(last < each.first or each.last < first for each in found):
            found.append(Dissolve(first=first, last=last, distance=float(distance[middle])))
    return sorted(found, key=lambda each: each.first)
