"""Dissolves: pictures that lie on a straight line between two others which have nothing in common.

In a dissolve from A to B the picture is (1 - α) A + α B with α from 0 to 1. A camera that moves bends that
line before its ends are strangers to each other, and what only grows darker is no stranger to itself.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

SIZE = (14, 24)  # height and width of the pictures that are compared
_HALVES = (0.1, 0.16, 0.25, 0.4, 0.6, 0.85, 1.1)  # seconds from the middle to an end
_POINTS = np.arange(1, 6) / 6  # where on the line it is looked
_BENT = 0.05  # mean squared distance from the line, in squares of its length; of a hard cut it is 0.08
_BLOCK = 256  # frames that are looked at together, for the memory they take
_NEAREST = 8.0  # levels of 255 between its ends, at least
_ALIKE = 0.5  # correlation of its ends, at most


@dataclass(frozen=True, kw_only=True)
class Dissolve:
    """Its ends, beside the frames that are mixed or of them, and how far apart they are (levels of 255)."""

    first: int
    last: int
    distance: float


def tiny(picture: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, " values"]:
    """What of a picture is compared."""
    import cv2

    return cv2.resize(picture, SIZE[::-1], interpolation=cv2.INTER_AREA).reshape(-1).astype(np.float32)


def reach(fps: float) -> int:
    """How many frames on each side of one its signal depends on."""
    return _widths(fps)[-1]


def _widths(fps: float) -> list[int]:
    return sorted({max(2, round(seconds * fps)) for seconds in _HALVES})


def dissolve_signal(
    pictures: Float[np.ndarray, "frames values"], fps: float
) -> tuple[Float[np.ndarray, " frames"], Float[np.ndarray, " frames"]]:
    """For each frame as the middle of a dissolve: how far apart its ends are, and half its length in frames.

    Both are 0 where there is none; the first is in levels of 255 (RMS), and 8 or more.
    Of the lengths that fit, the one that leads the farthest and is the straightest.
    """
    count = len(pictures)
    distance, half, best = (np.zeros(count, np.float32) for _ in range(3))
    for width in _widths(fps):
        if count <= 2 * width:
            break
        for start in range(width, count - width, _BLOCK):
            middle = np.arange(start, min(start + _BLOCK, count - width))
            middle, length = _strangers(pictures, middle, width)
            worth = length * (1 - _bent(pictures, middle, width) / _BENT)
            better = worth > best[middle]
            chosen = middle[better]
            best[chosen], distance[chosen], half[chosen] = worth[better], length[better], width
    return distance, half


def _strangers(
    pictures: Float[np.ndarray, "frames values"], middle: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Those of the middles whose ends have nothing in common, and how far apart the ends are."""
    first, stop = middle[0], middle[-1] + 1  # neighbours: slices, not copies
    apart = pictures[first + width : stop + width] - pictures[first - width : stop - width]
    length = np.sqrt(np.einsum("ij,ij->i", apart, apart) / apart.shape[1])
    far = length >= _NEAREST  # what is slower to see is asked of these alone
    middle, length = middle[far], length[far]
    strange = _correlation(pictures[middle - width], pictures[middle + width]) < _ALIKE
    return middle[strange], length[strange]


def _bent(pictures: Float[np.ndarray, "frames values"], middle: np.ndarray, width: int) -> np.ndarray:
    """How far the pictures around each middle are from the line, in squares of its length.

    Infinite as soon as it is too far: most are at the first place, and the others are not looked at for them.
    """
    whole = pictures[middle + width] - pictures[middle - width]
    size = np.maximum((whole**2).mean(axis=1), 1e-6)
    bent, left = np.zeros(len(middle)), np.arange(len(middle))
    for share in _POINTS:
        at = 2 * width * share  # frames from the first one, between two of them
        low = int(at)
        first = middle[left] - width
        between = pictures[first + low]
        between += (at - low) * (pictures[first + low + 1] - between)
        between -= pictures[first]
        between -= share * whole[left]
        bent[left] += np.square(between, out=between).mean(axis=1)
        straight = bent[left] < _BENT * len(_POINTS) * size[left]
        bent[left[~straight]] = np.inf
        left = left[straight]
    return bent / len(_POINTS) / size


def _correlation(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Of the brightness and colour of places; 0 with a picture of one colour."""
    one, other = (each - each.mean(axis=1, keepdims=True) for each in (first, last))
    norms = np.sqrt((one**2).sum(axis=1) * (other**2).sum(axis=1))
    return (one * other).sum(axis=1) / np.maximum(norms, 1e-3 * one.shape[1])


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
        first, last = int(middle - half[middle]), int(middle + half[middle])
        if all(last < each.first or each.last < first for each in found):
            found.append(Dissolve(first=first, last=last, distance=float(distance[middle])))
    return sorted(found, key=lambda each: each.first)
