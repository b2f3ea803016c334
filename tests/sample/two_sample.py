"""Whether two samples come from one distribution: the Kolmogorov-Smirnov test."""

import math

import torch
from torch import Tensor

LEVEL = 1e-3
"""How often the test says that two samples of one distribution differ."""


def distance(one: Tensor, other: Tensor) -> float:
    """The largest gap between the two empirical distribution functions."""
    one, other = one.double().sort().values, other.double().sort().values
    both = torch.cat((one, other))
    gaps = [torch.searchsorted(sample, both, right=True) / len(sample) for sample in (one, other)]
    return float((gaps[0] - gaps[1]).abs().max())


def critical(one: int, other: int, level: float = LEVEL) -> float:
    """The distance that samples of these sizes exceed with probability `level`, by Kolmogorov's limit."""
    return math.sqrt(-math.log(level / 2) / 2 * (one + other) / (one * other))


def differ(one: Tensor, other: Tensor, level: float = LEVEL) -> bool:
    """Whether the test tells them apart."""
    return distance(one, other) > critical(len(one), len(other), level)
