"""Flow matching (Movie Gen, section 3.1.2). t = 0 is noise and t = 1 is data, here and only here.

The path is CondOT: a straight line from noise to data, with α = t and β = 1 − (1 − σ_min) t.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

SIGMA_MIN = 1e-5


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """How times are drawn and conditions dropped in training.

    `time` is logit-normal(`time_mean`, `time_std`) or uniform on (0, 1). With probability `drop_all` every
    encoder's text is replaced by the null prompt (classifier-free guidance); each alone with `drop_each`.
    """

    time: Literal["logit_normal", "uniform"] = "logit_normal"
    time_mean: float = 0.0
    time_std: float = 1.0
    sigma_min: float = SIGMA_MIN
    drop_all: float = 0.1
    drop_each: float = 0.1

    def __post_init__(self) -> None:
        for key in ("drop_all", "drop_each", "sigma_min"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"flow.{key}: a probability lies in [0, 1], got {getattr(self, key)}")
        if self.time_std <= 0:
            raise ValueError(f"flow.time_std: must be positive, got {self.time_std}")


@dataclass(frozen=True, kw_only=True)
class FlowSample:
    """A point on the path and the velocity there: what the model sees and what it must say."""

    x_t: Float[Tensor, "b ..."]
    velocity: Float[Tensor, "b ..."]


def time_quantile(level: Float[Tensor, " b"], config: FlowConfig) -> Float[Tensor, " b"]:
    """Times in (0, 1) from levels in (0, 1), by the inverse of the distribution function.

    Random levels give random times; stratified levels (i + u) / b cover the distribution evenly in each
    batch, which leaves the expected loss as it is and takes the noise of the times out of it.
    """
    if config.time == "uniform":
        return level
    return torch.sigmoid(config.time_mean + config.time_std * torch.special.ndtri(level))


def perturb(
    data: Float[Tensor, "b ..."],
    noise: Float[Tensor, "b ..."],
    time: Float[Tensor, " b"],
    sigma_min: float = SIGMA_MIN,
) -> FlowSample:
    """X_t = t X_1 + (1 − (1 − σ_min) t) X_0 and V = X_1 − (1 − σ_min) X_0 (Movie Gen, equations 1 and 2)."""
    t = _expand(time, data)
    return FlowSample(
        x_t=t * data + (1 - (1 - sigma_min) * t) * noise, velocity=data - (1 - sigma_min) * noise
    )


def velocity_from_data(
    data: Float[Tensor, "b ..."],
    x_t: Float[Tensor, "b ..."],
    time: Float[Tensor, " b"],
    sigma_min: float = SIGMA_MIN,
    least: float = 0.05,
) -> Float[Tensor, "b ..."]:
    """u = (X_1 − (1 − σ_min) x) / β with β = 1 − (1 − σ_min) t, kept at `least` or more near the data.

    Near t = 1 a small error of the data would become a large one of the velocity (Li and He 2025,
    arXiv:2511.13720, section 4, whose bound this is).
    """
    beta = (1 - (1 - sigma_min) * _expand(time, x_t)).clamp(min=least)
    return (data - (1 - sigma_min) * x_t) / beta


def score_from_velocity(
    velocity: Float[Tensor, "b ..."],
    x_t: Float[Tensor, "b ..."],
    time: Float[Tensor, " b"],
    sigma_min: float = SIGMA_MIN,
) -> Float[Tensor, "b ..."]:
    """∇ log p_t(x) from the velocity; the conversion of Gaussian paths, for CondOT.

    With α = t and β = 1 − (1 − σ_min) t: u = (β²α̇/α − ββ̇) score + (α̇/α) x, that is
    score = (α u − α̇ x) / (β (α̇ β − α β̇)). Singular only where β = 0.
    """
    alpha = _expand(time, x_t)
    beta = 1 - (1 - sigma_min) * alpha
    return (alpha * velocity - x_t) / (beta * (beta + alpha * (1 - sigma_min)))


def velocity_from_score(
    score: Float[Tensor, "b ..."],
    x_t: Float[Tensor, "b ..."],
    time: Float[Tensor, " b"],
    sigma_min: float = SIGMA_MIN,
) -> Float[Tensor, "b ..."]:
    """Inverse of `score_from_velocity`; singular at t = 0, where α = 0."""
    alpha = _expand(time, x_t)
    beta = 1 - (1 - sigma_min) * alpha
    return (beta * (beta + alpha * (1 - sigma_min)) * score + x_t) / alpha


def _expand(time: Tensor, like: Tensor) -> Tensor:
    return time.to(like).view(-1, *(1,) * (like.ndim - 1))
