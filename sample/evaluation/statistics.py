"""What numbers of clips say: shares with their intervals, and the distance of two sets of features."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share of `count` clips with its Wilson 95 % interval, and the same share on real renders."""

    share: float
    low: float
    high: float
    count: int
    real: float

    @classmethod
    def of(cls, hits: int, count: int, *, real: int) -> "Share":
        """`hits` of `count` generated clips, and `real` of as many real ones."""
        low, high = wilson(hits, count)
        return cls(share=hits / count, low=low, high=high, count=count, real=real / count)


def wilson(hits: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Score interval of a binomial share (Wilson 1927), 95 % by default."""
    share, square = hits / count, z * z
    centre = (share + square / (2 * count)) / (1 + square / count)
    spread = math.sqrt(share * (1 - share) / count + square / (4 * count * count)) * z / (1 + square / count)
    return max(0.0, centre - spread), min(1.0, centre + spread)


def frechet_distance(first: Float[np.ndarray, "n d"], second: Float[np.ndarray, "m d"]) -> float:
    """Distance of the Gaussians fitted to two sets of features (Heusel et al. 2017, eq. 6), float64.

    |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁^½ Σ₂ Σ₁^½)^½)
    """
    first, second = first.astype(np.float64), second.astype(np.float64)
    shift = first.mean(axis=0) - second.mean(axis=0)
    cov1, cov2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    # The eigenvalues of a product of covariances are not negative; rounding makes some so.
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov2 @ root).clip(min=0)).sum()
    return float(shift @ shift + np.trace(cov1) + np.trace(cov2) - 2 * cross)
