"""Solvers of the flow ODE dx/dt = u(x, t): pure functions of a velocity, a start and a time grid."""

from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

VelocityFn = Callable[[Tensor, Tensor], Tensor]
"""(x, time) -> velocity of the shape of x; `time` is a scalar tensor of x's dtype and device."""


def euler(
    velocity_fn: VelocityFn, x: Float[Tensor, "..."], times: Float[Tensor, " points"]
) -> Float[Tensor, "..."]:
    """First order, one evaluation a step; `x` at times[0] is carried to times[-1]."""
    for start, stop in _intervals(times):
        x = x + (stop - start) * velocity_fn(x, x.new_tensor(start))
    return x


def midpoint(
    velocity_fn: VelocityFn, x: Float[Tensor, "..."], times: Float[Tensor, " points"]
) -> Float[Tensor, "..."]:
    """Second order, two evaluations a step: the slope halfway carries the whole step."""
    for start, stop in _intervals(times):
        step = stop - start
        half = x + 0.5 * step * velocity_fn(x, x.new_tensor(start))
        x = x + step * velocity_fn(half, x.new_tensor(start + 0.5 * step))
    return x


def heun(
    velocity_fn: VelocityFn, x: Float[Tensor, "..."], times: Float[Tensor, " points"]
) -> Float[Tensor, "..."]:
    """Second order, two evaluations a step: the mean of the slopes at both ends."""
    for start, stop in _intervals(times):
        step = stop - start
        first = velocity_fn(x, x.new_tensor(start))
        second = velocity_fn(x + step * first, x.new_tensor(stop))
        x = x + 0.5 * step * (first + second)
    return x


def _intervals(times: Tensor) -> list[tuple[float, float]]:
    # Python floats: step sizes keep float64 accuracy whatever the dtype of x.
    points: list[float] = times.to(torch.float64).tolist()
    return list(pairwise(points))
