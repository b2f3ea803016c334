"""Gaussian paths and the score along them, in float64 on a mixture with known fields."""

from functools import partial

import pytest
import torch
from torch import Tensor

from kinoflow.dit_video.flow.matching import (
    perturb,
    score_from_velocity,
    velocity_from_scaled_score,
    velocity_from_score,
)
from kinoflow.dit_video.flow.paths import Coefficients, coefficients, cond_ot, cosine
from tests.dit_video.mixture import F64, Mixture


def ddpm(time: Tensor) -> Coefficients:
    """Song et al. 2020, equation 33, as a path: some data is left at t = 0, nothing is constant."""
    s = 1 - time
    rate, exponent = 0.1 + 19.9 * s, 0.25 * 19.9 * s**2 + 0.05 * s
    alpha, beta = torch.exp(-exponent), torch.sqrt(-torch.expm1(-2 * exponent))
    alpha_dot = 0.5 * alpha * rate
    return Coefficients(alpha=alpha, beta=beta, alpha_dot=alpha_dot, beta_dot=-alpha * alpha_dot / beta)


PATHS = {"cond_ot": cond_ot, "sigma_min 0.1": partial(cond_ot, sigma_min=0.1), "cosine": cosine, "ddpm": ddpm}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def points(count: int = 400) -> tuple[Tensor, Tensor]:
    """Fresh points and times away from both ends."""
    return 2 * torch.randn(count, dtype=F64), torch.rand(count, dtype=F64) * 0.9 + 0.05


def slope(function, t: Tensor, step: float = 1e-5) -> Tensor:
    return (function(t + step) - function(t - step)) / (2 * step)


@every_path
def test_derivatives_are_those_of_the_coefficients(path):
    _, t = points()
    at = path(t)
    torch.testing.assert_close(at.alpha_dot, slope(lambda t: path(t).alpha, t), atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(at.beta_dot, slope(lambda t: path(t).beta, t), atol=1e-8, rtol=1e-6)
    assert (at.alpha_dot > 0).all() and (at.beta_dot < 0).all()


@pytest.mark.parametrize("path", [cond_ot, partial(cond_ot, sigma_min=0.1), cosine])
def test_paths_go_from_noise_to_data(path):
    ends = path(torch.tensor([0.0, 1.0], dtype=F64))
    rest = getattr(path, "keywords", {"sigma_min": 1e-5})["sigma_min"]
    torch.testing.assert_close(ends.alpha, torch.tensor([0.0, 1.0], dtype=F64))
    torch.testing.assert_close(ends.beta, torch.tensor([1.0, rest if path is not cosine else 0.0], dtype=F64))


def test_cosine_preserves_the_variance_of_normal_data():
    _, t = points()
    at = cosine(t)
    torch.testing.assert_close(at.alpha**2 + at.beta**2, torch.ones_like(t))


@every_path
def test_the_mixture_obeys_the_continuity_equation(path):
    """∂p/∂t + ∂(p u)/∂x = 0: the closed forms below are tested before they test anything."""
    mixture, (x, t) = Mixture(), points()
    x.requires_grad_()
    t.requires_grad_()
    density = mixture.log_density(x, t, path).exp()
    (change,) = torch.autograd.grad(density.sum(), t, retain_graph=True)
    (outflow,) = torch.autograd.grad((density * mixture.velocity(x, t, path)).sum(), x)
    torch.testing.assert_close(change, -outflow, atol=1e-10, rtol=1e-8)


@every_path
def test_the_velocity_gives_the_score(path):
    mixture, (x, t) = Mixture(), points()
    found = score_from_velocity(mixture.velocity(x, t, path), x, t, path)
    torch.testing.assert_close(found, mixture.score(x, t, path), atol=1e-9, rtol=1e-7)


@every_path
def test_the_score_gives_the_velocity(path):
    mixture, (x, t) = Mixture(), points()
    score, velocity = mixture.score(x, t, path), mixture.velocity(x, t, path)
    torch.testing.assert_close(velocity_from_score(score, x, t, path), velocity, atol=1e-8, rtol=1e-7)
    scaled = velocity_from_scaled_score(path(t).beta * score, x, t, path)
    torch.testing.assert_close(scaled, velocity, atol=1e-8, rtol=1e-7)


@every_path
def test_p_t_of_the_mixture_is_a_mixture(path):
    x, _ = points()
    t = torch.full_like(x, 0.3)
    again = Mixture().at(0.3, path).log_density(x, torch.ones_like(x), partial(cond_ot, sigma_min=0.0))
    torch.testing.assert_close(again, Mixture().log_density(x, t, path))


@every_path
def test_the_conversion_is_proposition_1_as_printed(path):
    """u = (β²α̇/α − ββ̇) score + (α̇/α) x, and equations 1.3 and 1.4."""
    x, t = points()
    at, score = path(t), torch.randn(len(t), dtype=F64)
    printed = (at.beta**2 * at.alpha_dot / at.alpha - at.beta * at.beta_dot) * score
    printed = printed + at.alpha_dot / at.alpha * x
    torch.testing.assert_close(score_from_velocity(printed, x, t, path), score, atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(velocity_from_score(score, x, t, path), printed, atol=1e-9, rtol=1e-7)


@every_path
def test_a_conditional_velocity_gives_the_conditional_score(path):
    """−ε / β, equation 1.13, and back."""
    data, noise = torch.randn(6, 2, 3, dtype=F64), torch.randn(6, 2, 3, dtype=F64)
    t = torch.rand(6, dtype=F64) * 0.9 + 0.05
    sample = perturb(data, noise, t, path)
    found = score_from_velocity(sample.velocity, sample.x_t, t, path)
    torch.testing.assert_close(found, -noise / coefficients(path, t, noise).beta)
    torch.testing.assert_close(sample.scaled_score, -noise)
    velocity = velocity_from_scaled_score(sample.scaled_score, sample.x_t, t, path)
    torch.testing.assert_close(velocity, sample.velocity, atol=1e-9, rtol=1e-7)


@every_path
def test_the_velocity_is_the_time_derivative_of_the_path(path):
    data, noise = torch.randn(4, 3, dtype=F64), torch.randn(4, 3, dtype=F64)
    t = torch.rand(4, dtype=F64) * 0.9 + 0.05
    derivative = slope(lambda t: perturb(data, noise, t, path).x_t, t)
    torch.testing.assert_close(perturb(data, noise, t, path).velocity, derivative, atol=1e-8, rtol=1e-6)


def test_the_score_where_sampling_starts_is_that_of_the_noise():
    x, velocity = torch.randn(2, 5, dtype=F64), torch.randn(2, 5, dtype=F64)
    torch.testing.assert_close(score_from_velocity(velocity, x, torch.zeros(2, dtype=F64), cosine), -x)


def test_at_the_ends_the_conversions_are_what_their_docstrings_say():
    x, field = torch.randn(2, 5, dtype=F64), torch.randn(2, 5, dtype=F64)
    start, end, exact = torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64), partial(cond_ot, sigma_min=0.0)
    assert not velocity_from_score(field, x, start, exact).isfinite().any()
    assert velocity_from_score(-x, x, start, exact).isnan().all(), "the score of the noise, whatever the data"
    torch.testing.assert_close(velocity_from_score(field, x, end, exact), x)
    torch.testing.assert_close(velocity_from_scaled_score(field, x, end, exact), x + field)
    assert not score_from_velocity(field, x, end, exact).isfinite().any()
