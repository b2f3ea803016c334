"""Gaussian probability paths p_t(x|z) = N(α_t z, β_t² I): x = α_t z + β_t ε, from noise ε to data z.

What a model may predict, and how one prediction becomes another (lecture notes, section 1.1, Proposition 1).
With E[z|x] and E[ε|x] for the data and the noise behind a point x, every field is linear in the two:

    x = α z + β ε        u = α̇ z + β̇ ε        ∇ log p_t = −ε / β

conditionally (z and ε themselves) and, since expectations are linear, marginally. `Denoised` holds the two
and gives the rest; the four `from_…` functions find them from x and any one of the four fields. A path is
any function of the time that gives α, β, α̇ and β̇; the two here are those that training knows by name.
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
    """Straight lines, Movie Gen's path: α = t, β = 1 − (1 − σ_min) t (section 3.1.2, equations 1 and 2)."""
    slope = torch.full_like(time, -(1 - sigma_min))
    return Coefficients(
        alpha=time, beta=1 - (1 - sigma_min) * time, alpha_dot=torch.ones_like(time), beta_dot=slope
    )


def cosine(time: Float[Tensor, "*b"]) -> Coefficients:
    """A quarter circle: α = sin(πt/2), β = cos(πt/2). Variance preserving, α² + β² = 1, at even speed."""
    angle = (0.5 * math.pi) * time
    sine, cos = torch.sin(angle), torch.cos(angle)
    return Coefficients(alpha=sine, beta=cos, alpha_dot=0.5 * math.pi * cos, beta_dot=-0.5 * math.pi * sine)


@dataclass(frozen=True, kw_only=True)
class Denoised:
    """The data and the noise that a point x stands for, E[z|x] and E[ε|x], and what follows from them."""

    data: Float[Tensor, "b ..."]
    noise: Float[Tensor, "b ..."]
    at: Coefficients

    @property
    def velocity(self) -> Float[Tensor, "b ..."]:
        """u = α̇ E[z|x] + β̇ E[ε|x]."""
        return self.at.alpha_dot * self.data + self.at.beta_dot * self.noise

    @property
    def score(self) -> Float[Tensor, "b ..."]:
        """∇ log p_t(x) = −E[ε|x] / β; singular where β = 0."""
        return -self.noise / self.at.beta


def from_velocity(
    velocity: Float[Tensor, "b ..."],
    x_t: Float[Tensor, "b ..."],
    time: Float[Tensor, " b"],
    path: GaussianPath = cond_ot,
) -> Denoised:
    """Solve x = α z + β ε, u = α̇ z + β̇ ε. The determinant α̇ β − α β̇ is 1 all along CondOT."""
    at = coefficients(path, time, x_t)
    determinant = at.alpha_dot * at.beta - at.alpha * at.beta_dot
    data = (at.beta * velocity - at.beta_dot * x_t) / determinant
    noise = (at.alpha_dot * x_t - at.alpha * velocity) / determinant
    return Denoised(data=data, noise=noise, at=at)


def from_data(
    data: Float[Tensor, "b ..."],
    x_t: Float[Tensor, "b ..."],
    time: Float[Tensor, " b"],
    path: GaussianPath = cond_ot,
) -> Denoised:
    """From a prediction of the data; singular where β = 0."""
    at = coefficients(path, time, x_t)
    return Denoised(data=data, noise=(x_t - at.alpha * data) / at.beta, at=at)


def from_noise(
    noise: Float[Tensor, "b ..."],
    x_t: Float[Tensor, "b ..."],
    time: Float[Tensor, " b"],
    path: GaussianPath = cond_ot,
) -> Denoised:
    """From a prediction of the noise; singular where α = 0."""
    at = coefficients(path, time, x_t)
    return Denoised(data=(x_t - at.beta * noise) / at.alpha, noise=noise, at=at)


def from_score(
    score: Float[Tensor, "b ..."],
    x_t: Float[Tensor, "b ..."],
    time: Float[Tensor, " b"],
    path: GaussianPath = cond_ot,
) -> Denoised:
    """From ∇ log p_t; singular where α = 0."""
    return from_noise(-coefficients(path, time, x_t).beta * score, x_t, time, path)


def coefficients(path: GaussianPath, time: Float[Tensor, " b"], like: Float[Tensor, "b ..."]) -> Coefficients:
    """The path at these times in the dtype of `like`, shaped (b, 1, …, 1) to stand beside it."""
    return path(time.to(like).view(-1, *(1,) * (like.ndim - 1)))
