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
ScoreFn = Callable[[Tensor, Tensor], Tensor]
"""(x, time) -> ∇ log p_t(x), as a VelocityFn gives the velocity."""
DiffusionFn = Callable[[float], float]
"""time -> σ_t, how much noise the SDE adds there."""


def euler(
    velocity_fn: VelocityFn, x: Float[Tensor, "..."], times: Float[Tensor, " points"]
) -> Float[Tensor, "..."]:
    """First order, one evaluation a step; `x` at times[0] is carried to times[-1] (lecture notes, 1.3.1)."""
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


def fading(path: GaussianPath, diffusion: float) -> DiffusionFn:
    """σ_t = `diffusion` √β_t: the noise ends where the score, which balances it, becomes singular."""
    return lambda time: diffusion * float(path(torch.tensor(time, dtype=torch.float64)).beta) ** 0.5


def euler_maruyama(
    velocity_fn: VelocityFn,
    x: Float[Tensor, "b ..."],
    times: Float[Tensor, " points"],
    *,
    path: GaussianPath,
    diffusion_fn: DiffusionFn,
    noise_fn: Callable[[], Tensor],
    score_fn: ScoreFn | None = None,
) -> Float[Tensor, "b ..."]:
    """The SDE dX = [u + σ²/2 ∇ log p_t] dt + σ dW (lecture notes, section 1.1.2 and Summary 2).

    It has the marginals of the ODE for every σ_t, and its noise forgets earlier errors. First order, one
    evaluation a step. The score is that of a second network, `score_fn`, or follows from the velocity on the
    `path` it was trained on (Proposition 1), guided or not. `noise_fn` gives standard normal noise shaped
    like x, fresh at each step. With σ_t = 0 it is `euler`.

    Steps h with h σ² > 4 β² are unstable: end before β = 0, shorten them there, or let σ fade (`fading`).
    """
    for start, stop in _intervals(times):
        step, time = stop - start, x.new_tensor(start)
        # σ at the end of the interval: where it fades, none is added that no later step would remove.
        variance = diffusion_fn(stop) ** 2
        velocity = velocity_fn(x, time)
        if score_fn is None:
            score = score_from_velocity(velocity, x, time.expand(x.shape[0]), path)
        else:
            score = score_fn(x, time)
        x = x + step * (velocity + 0.5 * variance * score) + (variance * step) ** 0.5 * noise_fn()
    return x


def _intervals(times: Tensor) -> list[tuple[float, float]]:
    # Python floats: step sizes keep float64 accuracy whatever the dtype of x.
    points: list[float] = times.to(torch.float64).tolist()
    return list(pairwise(points))
