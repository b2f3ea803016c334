"""Where shots begin and end: hard cuts as PySceneDetect finds them; dissolves are in neither shot."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float, Int64, UInt8

from kinoflow.data.engine import transnet
from kinoflow.data.engine.config import ShotConfig
from kinoflow.data.engine.dissolves import Dissolve, dissolves


class Changes:
    """The change from each frame to the next: content_val of PySceneDetect's ContentDetector.

    That class finds edges as well when it is asked for its values, which takes five times as long.
    """

    def __init__(self) -> None:
        self._before: UInt8[np.ndarray, "h w 3"] | None = None

    def __call__(self, picture: UInt8[np.ndarray, "h w 3"]) -> float:
        """Mean difference of hue, saturation and brightness from the picture before; nan for the first."""
        import cv2

        before, self._before = self._before, cv2.cvtColor(picture, cv2.COLOR_RGB2HSV)
        return float("nan") if before is None else cv2.norm(self._before, before, cv2.NORM_L1) / before.size


def cuts(change: Float[np.ndarray, " frames"], config: ShotConfig) -> Int64[np.ndarray, " cuts"]:
    """The frames that begin a new shot, of the change that leads to each frame.

    The adaptive detector's rule is that of PySceneDetect: a change of `least_change` or more that is at least
    `adaptive` times the mean of the `window` changes on each side. Near the ends those that are there count.
    """
    change = np.nan_to_num(change)
    if config.detector == "content":
        found = change >= config.content
    else:
        around = _mean_around(change, config.window)
        found = (change >= config.least_change) & (change >= config.adaptive * around)
    found[:1] = False
    return np.flatnonzero(found)


def _mean_around(values: Float[np.ndarray, " n"], window: int) -> Float[np.ndarray, " n"]:
    kernel = np.ones(2 * window + 1)
    kernel[window] = 0
    totals = np.convolve(np.pad(values, window), kernel, "valid")
    counts = np.convolve(np.pad(np.ones(len(values)), window), kernel, "valid")
    return totals / np.maximum(counts, 1)


def boundaries(values: Mapping[str, np.ndarray], config: ShotConfig) -> tuple[list[int], list[Dissolve]]:
    """The frames that begin a new shot, and the dissolves; what changes within a dissolve is no cut.

    `values` are those of `parts.FLOATS`. A fade to or from black counts as a dissolve.
    """
    if config.detector == "transnetv2":
        return transnet.boundaries(values["transnet"], values["transnet_all"])
    found = dissolves(values["dissolve"], values["dissolve_half"], config.dissolve)
    cut = cuts(values["change"], config).tolist()
    return [at for at in cut if not any(each.first <= at <= each.last + 1 for each in found)], found


def shots(
    known: Bool[np.ndarray, " frames"], cut: Sequence[int], dissolves: Sequence[Dissolve], margin: int
) -> list[range]:
    """The frames between cuts and outside of dissolves that are known: those that did not decode are not.

    `margin` frames beside each end are left out, but for those of the video, and a last one of the shot.
    """
    within, begins = known.copy(), np.zeros(len(known) + 1, bool)
    begins[list(cut)] = True
    for each in dissolves:
        within[each.first : each.last + 1] = False
    found, start = [], None
    for index in range(len(known) + 1):
        inside = index < len(known) and bool(within[index])
        if start is not None and (not inside or begins[index]):
            found.append(_trimmed(range(start, index), len(known), margin))
            start = None
        if inside and start is None:
            start = index
    return found


def pieces(shot: range, longest: int) -> list[range]:
    """A shot split evenly into as few pieces as have at most `longest` frames."""
    count = -(-len(shot) // max(1, longest))
    at = [shot.start + len(shot) * i // count for i in range(count + 1)]
    return [range(start, stop) for start, stop in pairwise(at)]


def _trimmed(shot: range, frames: int, margin: int) -> range:
    start = shot.start + (margin if shot.start > 0 else 0)
    stop = shot.stop - (margin if shot.stop < frames else 0)
    return range(start, stop) if stop > start else range(shot.start, shot.start + 1)
