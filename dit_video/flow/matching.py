"""Flow and score matching (Movie Gen, section 3.1.2; lecture notes, section 1.1). t = 0 is noise, t = 1 data.

The paths themselves are in `dit_video.flow.paths`. The default is CondOT: a straight line, α = t and
β = 1 − (1 − σ_min) t. What a model of the score gives is β ∇ log p_t, which stays of the size of the noise.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kinoflow.dit_video.flow.paths import SIGMA_MIN, GaussianPath, coefficients, cond_ot, cosine

Objective = Literal["velocity", "score"]
"""What a model is trained to give: u_t (lecture notes, 1.9), or β_t ∇ log p_t (1.16)."""


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """The objective, the path, how times are drawn, and how conditions are dropped in training.

    A release says in its kinoflow.yaml what it was trained on (`sampling.objective`, `sampling.path`).
    """

    objective: Objective = "velocity"
    """What the model gives: the velocity, or the score times β."""

    path: Literal["cond_ot", "cosine"] = "cond_ot"
    """Straight, or the quarter circle."""
    time: Literal["logit_normal", "uniform"] = "logit_normal"
    """How times are drawn on (0, 1)."""
    time_mean: float = 0.0
    """Mean of the times' logits; above 0 nearer to the data."""
    time_std: float = 1.0
    """Standard deviation of the times' logits."""
    sigma_min: float = SIGMA_MIN
    """Noise that cond_ot leaves at t = 1."""
    drop_all: float = 0.1
    """Probability that a clip has no text: η of classifier-free guidance."""
    drop_each: float = 0.1
    """Probability that one encoder's text is left out."""

    def __post_init__(self) -> None:
        for key in ("drop_all", "drop_each", "sigma_min"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"flow.{key}: a probability lies in [0, 1], got {getattr(self, key)}")
        if self.time_std <= 0:
            raise ValueError(f"flow.time_std: must be positive, got {self.time_std}")

    @property
    def gaussian_path(self) -> GaussianPath:
        """The path that the keys describe."""
        return cosine if self.path == "cosine" else partial(cond_ot, sigma_min=self.sigma_min)


@dataclass(frozen=True, kw_only=True)
class FlowSample:
    """A point on the path, and the conditional fields there: what the model sees and what it must say.

    Conditional is given the data z; given the condition y a field is called guided (lecture notes, Remark 1).
    """

    x_t: Float[Tensor, "b ..."]
    velocity: Float[Tensor, "b ..."]
    noise: Float[Tensor, "b ..."]

    @property
    def scaled_score(self) -> Float[Tensor, "b ..."]:
        """β ∇ log p_t(x|z)."""
        return -self.noise

    def target(self, objective: Objective) -> Float[Tensor, "b ..."]:
        """What a model of this objective is compared with: conditional fields, u_t(x|z) or β ∇ log p_t(x|z).

        In the lecture notes, (1.13) and (1.16), the score itself is compared. Its square error grows as d/β²
        near the data, and the integral of that over the times is infinite; times β² it is the error of the
        noise, and the model that has the least of it at each time is the same.
        """
        return self.velocity if objective == "velocity" else self.scaled_score


def time_quantile(level: Float[Tensor, " b"], config: FlowConfig) -> Float[Tensor, " b"]:
    """Times in (0, 1) from levels in (0, 1), by the inverse of the distribution function.

    Random levels give random times; stratified levels (i + u) / b cover the distribution evenly in each
    batch, which leaves the expected loss as it is and takes the noise of the times out of it.
    """
    if config.time == "uniform":
        return level
    return torch.sigmoid(config.time_mean + config.time_std * torch.special.ndtri(level))


def dropped_texts(
    all_level: Float[Tensor, "b 1"], each_level: Float[Tensor, "b encoders"], config: FlowConfig
) -> Bool[Tensor, "b encoders"]:
    """Which texts become ∅ (lecture notes, 1.7, 1.10, 1.14, 1.17: y ← ∅ with η), from uniform levels.

    One level a row drops all encoders of the row together, with η = `drop_all`; one a text drops it alone.
    """
    return (all_level < config.drop_all) | (each_level < config.drop_each)


def perturb(
    data: Float[Tensor, "b ..."],
    noise: Float[Tensor, "b ..."],
    time: Float[Tensor, " b"],
    path: GaussianPath = cond_ot,
) -> FlowSample:
    """x_t = α z + β ε, u_t(x|z) = α̇ z + β̇ ε and β ∇ log p_t(x|z) = −ε (Movie Gen, 1 and 2, for CondOT).

    Regressing a model of (x_t, time, condition) onto the velocity is (1.1) and (1.2) of the lecture notes,
    onto the score (1.11) and (1.12). With conditions dropped by `dropped_texts` it is (1.6), (1.9) and
    Algorithm 1, which prints α̇ and β̇ the other way round; of the score, (1.13) and (1.16).
    """
    at = coefficients(path, time, data)
    return FlowSample(
        x_t=at.alpha * data + at.beta * noise,
        velocity=at.alpha_dot * data + at.beta_dot * noise,
        noise=noise,
    )


def velocity_from_data(
    data: Float[Tensor, "..."],
    x_t: Float[Tensor, "..."],
    time: Float[Tensor, "..."],
    sigma_min: float = SIGMA_MIN,
    least: float = 0.05,
) -> Float[Tensor, "..."]:
    """CondOT's u = (z − (1 − σ_min) x) / β with β = 1 − (1 − σ_min) t, kept at `least` or more near the data.

    `time` broadcasts against `x_t`. Near t = 1 a small error of the data would become a large one of the
    velocity (Li and He 2025, arXiv:2511.13720, section 4, whose bound this is).
    """
    exact = torch.promote_types(x_t.dtype, torch.float32)  # a flow time in bf16 would have two digits
    beta = (1 - (1 - sigma_min) * time.to(exact)).clamp(min=least).to(x_t.dtype)
    return (data - (1 - sigma_min) * x_t) / beta


def data_from_velocity(
    velocity: Float[Tensor, "b ..."],
    x_t: Float[Tensor, "b ..."],
    time: Float[Tensor, " b"],
    path: GaussianPath = cond_ot,
) -> Float[Tensor, "b ..."]:
    """E[z|x_t], where the flow seems to lead: x = α z + β ε and u = α̇ z + β̇ ε, solved for z.

    The determinant is that of `score_from_velocity`, 1 all along CondOT; where β = 0 it is x itself.
    """
    at = coefficients(path, time, x_t)
    determinant = at.alpha_dot * at.beta - at.alpha * at.beta_dot
    return (at.beta * velocity - at.beta_dot * x_t) / determinant


def score_from_velocity(
    velocity: Float[Tensor, "b ..."],
    x_t: Float[Tensor, "b ..."],
    time: Float[Tensor, " b"],
    path: GaussianPath = cond_ot,
) -> Float[Tensor, "b ..."]:
    """∇ log p_t(x) from the velocity (lecture notes, Proposition 1).

    u = (β²α̇/α − ββ̇) score + (α̇/α) x, solved for the score by way of the noise: x = α z + β ε, u = α̇ z + β̇ ε,
    whose determinant α̇ β − α β̇ is 1 all along CondOT. It is affine in u with weights that do not depend on
    the text, so the score of a guided velocity is the guided score (1.15).

    Where α = 0 it is −x whatever the velocity. Where β = 0 no score exists: the result is infinite or NaN.
    """
    at = coefficients(path, time, x_t)
    determinant = at.alpha_dot * at.beta - at.alpha * at.beta_dot
    noise = (at.alpha_dot * x_t - at.alpha * velocity) / determinant
    return -noise / at.beta


def velocity_from_score(
    score: Float[Tensor, "b ..."],
    x_t: Float[Tensor, "b ..."],
    time: Float[Tensor, " b"],
    path: GaussianPath = cond_ot,
) -> Float[Tensor, "b ..."]:
    """u = a x + b ∇ log p_t(x), (a, b) = (α̇/α, (α̇ β² − β̇ β α)/α): Proposition 1 as (1.3) and (1.4) have it.

    Where α = 0 the score is −x for any data and says nothing of where they lie: the result is infinite or
    NaN. Where β = 0 it is (α̇/α) x of any finite score.
    """
    beta = coefficients(path, time, x_t).beta
    return velocity_from_scaled_score(beta * score, x_t, time, path)


def velocity_from_scaled_score(
    scaled_score: Float[Tensor, "b ..."],
    x_t: Float[Tensor, "b ..."],
    time: Float[Tensor, " b"],
    path: GaussianPath = cond_ot,
) -> Float[Tensor, "b ..."]:
    """The velocity from β ∇ log p_t = −E[ε|x], as `velocity_from_score`, but exact to where β = 0.

    The data are E[z|x] = (x − β E[ε|x]) / α, and u = α̇ E[z|x] + β̇ E[ε|x].
    """
    at = coefficients(path, time, x_t)
    data = (x_t + at.beta * scaled_score) / at.alpha
    return at.alpha_dot * data - at.beta_dot * scaled_score
