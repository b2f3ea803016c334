"""Solvers of the flow ODE dx/dt = u(x, t) and of its SDE: pure functions of a velocity, a start, a grid."""

from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from kinoflow.dit_video.flow.matching import score_from_velocity
from kinoflow.dit_video.flow.paths import GaussianPath

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


def euler_maruyama(
    velocity_fn: VelocityFn,
    x: Float[Tensor, "b ..."],
    times: Float[Tensor, " points"],
    *,
    path: GaussianPath,
    diffusion: float,
    noise_fn: Callable[[], Tensor],
) -> Float[Tensor, "b ..."]:
    """The SDE dX = [u + σ²/2 ∇ log p_t] dt + σ dW (lecture notes, section 1.1.2), with σ = `diffusion` √β.

    It has the marginals of the ODE for every σ, and its noise forgets earlier errors. First order, one
    evaluation a step: the score follows from the velocity on the `path` it was trained on, guided or not.
    `noise_fn` gives standard normal noise shaped like x, fresh at each step. `diffusion` 0 is `euler`.
    """
    for start, stop in _intervals(times):
        step, time = stop - start, x.new_tensor(start)
        # σ at the end of the interval: at t = 1, where β = 0, none is added that no later step would remove.
        variance = diffusion**2 * float(path(torch.tensor(stop, dtype=torch.float64)).beta)
        velocity = velocity_fn(x, time)
        score = score_from_velocity(velocity, x, time.expand(x.shape[0]), path)
        x = x + step * (velocity + 0.5 * variance * score) + (variance * step) ** 0.5 * noise_fn()
    return x


def _intervals(times: Tensor) -> list[tuple[float, float]]:
    # Python floats: step sizes keep float64 accuracy whatever the dtype of x.
    points: list[float] = times.to(torch.float64).tolist()
    return list(pairwise(points))
