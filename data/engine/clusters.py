"""Clusters of like shots, of which the large ones are thinned: the share that stays goes by 1/sqrt(size).

So that what there is much of does not crowd out the rest (Movie Gen, data curation; Mahajan et al. 2018).
Clusters are found by k-means on what the model makes of the pictures; a shot belongs to the nearest centre.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int64

from kinoflow.configs.errors import UserError

_POINTS = 256  # for each centre: more do not move it, and take as long again
_ROUNDS, _ATTEMPTS, _MOVES = 50, 3, 1e-4
_BLOCK = 4096  # shots that are compared with all centres at once, for the memory they take


def centres(points: Float[np.ndarray, "shots d"], count: int, seed: int = 0) -> Float[np.ndarray, "count d"]:
    """The centres of `count` clusters of directions, by k-means++ and Lloyd's algorithm, through OpenCV.

    The same for the same shots in the same order.

    Raises:
        UserError: there are fewer shots than clusters.
    """
    import cv2

    if len(points) < count:
        raise UserError(f"clip.clusters: {count} of {len(points)} shots; use fewer, or look at more shots")
    points = _unit(points)
    if len(points) > _POINTS * count:
        chosen = np.random.default_rng(seed).choice(len(points), _POINTS * count, replace=False)
        points = points[np.sort(chosen)]
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    cv2.setRNGSeed(seed)
    stop = (cv2.TERM_CRITERIA_MAX_ITER + cv2.TERM_CRITERIA_EPS, _ROUNDS, _MOVES)
    labels = np.empty((len(points), 1), np.int32)
    try:
        _, _, found = cv2.kmeans(points, count, labels, stop, _ATTEMPTS, cv2.KMEANS_PP_CENTERS)
    finally:
        cv2.setNumThreads(threads)
    return found


def nearest(
    points: Float[np.ndarray, "shots d"], centres: Float[np.ndarray, "count d"]
) -> Int64[np.ndarray, " shots"]:
    """The cluster of each shot."""
    lengths = (centres**2).sum(axis=1)
    found = [
        (lengths - 2 * _unit(points[start : start + _BLOCK]) @ centres.T).argmin(axis=1)
        for start in range(0, len(points), _BLOCK)
    ]
    return np.concatenate(found) if found else np.empty(0, np.int64)


def thinned(
    cluster: Float[np.ndarray, " shots"],
    size: Float[np.ndarray, " shots"],
    draws: Float[np.ndarray, " shots"],
    whole: float,
) -> Mapping[int, float]:
    """The shots that go, and for each the largest draw of its cluster that stays.

    Of a cluster of `size` sqrt(whole / size) of the shots stay, those of the lowest draws and one at least;
    all of one of `whole` or fewer, and those without a cluster (nan).
    """
    found: dict[int, float] = {}
    for each in np.unique(cluster[~np.isnan(cluster)]):
        rows = np.flatnonzero(cluster == each)
        share = min(1.0, float(np.sqrt(whole / size[rows[0]])))
        order = rows[np.argsort(draws[rows], kind="stable")]
        stay = max(1, round(share * len(rows)))
        found |= dict.fromkeys(order[stay:].tolist(), float(draws[order[stay - 1]]))
    return found


def _unit(points: Float[np.ndarray, "shots d"]) -> Float[np.ndarray, "shots d"]:
    return np.ascontiguousarray(
        points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-9), np.float32
    )
