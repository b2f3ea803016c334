"""Gaussian probability paths p_t(x|z) = N(α_t z, β_t² I): x = α_t z + β_t ε, from noise ε to data z.

A path is any function of the time that gives α, β, α̇ and β̇; the two here are those that training knows by
name. Along it the velocity is u = α̇ z + β̇ ε and the score ∇ log p_t = −ε / β: conditionally, with z and ε
themselves, and marginally, with their expectations at x (lecture notes, section 1.1).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

SIGMA_MIN = 1e-5


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """α, β and their time derivatives at some times, in the shape of those times."""

    alpha: Float[Tensor, "*b"]
    beta: Float[Tensor, "*b"]
    alpha_dot: Float[Tensor, "*b"]
    beta_dot: Float[Tensor, "*b"]


GaussianPath = Callable[[Tensor], Coefficients]
"""time in [0, 1] -> coefficients; α rises from 0 to 1, β falls from 1 to 0 (or to a small rest)."""


def cond_ot(time: Float[Tensor, "*b"], sigma_min: float = SIGMA_MIN) -> Coefficients:
    """Straight lines, Movie Gen's path: α = t, β = 1 − (1 − σ_min) t (section 3.1.2, equations 1 and 2).

    The notes' CondOT (1.3.2) has σ_min = 0.
    """
    slope = torch.full_like(time, -(1 - sigma_min))
    return Coefficients(
        alpha=time, beta=1 - (1 - sigma_min) * time, alpha_dot=torch.ones_like(time), beta_dot=slope
    )


def cosine(time: Float[Tensor, "*b"]) -> Coefficients:
    """A quarter circle: α = sin(πt/2), β = cos(πt/2). Variance preserving, α² + β² = 1, at even speed."""
    angle = (0.5 * math.pi) * time
    sine, cos = torch.sin(angle), torch.cos(angle)
    return Coefficients(alpha=sine, beta=cos, alpha_dot=0.5 * math.pi * cos, beta_dot=-0.5 * math.pi * sine)


def coefficients(path: GaussianPath, time: Float[Tensor, " b"], like: Float[Tensor, "b ..."]) -> Coefficients:
    """The path at these times in the dtype of `like`, shaped (b, 1, …, 1) to stand beside it."""
    return path(time.to(like).view(-1, *(1,) * (like.ndim - 1)))
