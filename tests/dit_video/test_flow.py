"""Flow matching against closed forms in float64."""

import math

import pytest
import torch
from torch import Tensor

from dit_video.flow import (
    SIGMA_MIN,
    FlowConfig,
    perturb,
    score_from_velocity,
    time_quantile,
    velocity_from_score,
)

F64 = torch.float64


def test_path_ends_at_noise_and_at_data() -> None:
    data, noise = torch.randn(3, 2, 2, dtype=F64), torch.randn(3, 2, 2, dtype=F64)
    torch.testing.assert_close(perturb(data, noise, torch.zeros(3, dtype=F64)).x_t, noise)
    torch.testing.assert_close(perturb(data, noise, torch.ones(3, dtype=F64)).x_t, data + SIGMA_MIN * noise)


def test_velocity_is_the_time_derivative_of_the_path() -> None:
    data, noise = torch.randn(4, 3, dtype=F64), torch.randn(4, 3, dtype=F64)
    time = torch.rand(4, dtype=F64)
    step = 1e-4
    derivative = (perturb(data, noise, time + step).x_t - perturb(data, noise, time - step).x_t) / (2 * step)
    torch.testing.assert_close(perturb(data, noise, time).velocity, derivative)


def mixture(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Marginal velocity and score at (x, t) when the data are a mixture of three points."""
    points = torch.tensor([-1.5, 0.2, 2.0], dtype=F64)
    beta = 1 - (1 - SIGMA_MIN) * t[:, None]
    offset = x[:, None] - t[:, None] * points
    posterior = (-0.5 * (offset / beta) ** 2).softmax(dim=1)
    velocity = points - (1 - SIGMA_MIN) * offset / beta
    return (posterior * velocity).sum(1), (posterior * -offset / beta**2).sum(1)


def test_score_conversion_holds_for_marginals() -> None:
    """The conversion is linear in the velocity, so it holds for the mixture too."""
    time = torch.rand(200, dtype=F64) * 0.9 + 0.05
    x = torch.randn(200, dtype=F64)
    velocity, score = mixture(x, time)
    torch.testing.assert_close(score_from_velocity(velocity, x, time), score)
    torch.testing.assert_close(velocity_from_score(score, x, time), velocity)


def test_least_squares_regression_on_samples_finds_the_marginal_velocity() -> None:
    """The mean of the conditional velocity over samples near x is the marginal velocity ."""
    generator = torch.Generator().manual_seed(0)
    points = torch.tensor([-1.5, 0.2, 2.0], dtype=F64)
    count = 400_000
    data = points[torch.randint(3, (count,), generator=generator)]
    noise = torch.randn(count, generator=generator, dtype=F64)
    sample = perturb(data, noise, torch.full((count,), 0.5, dtype=F64))
    for centre in (-0.5, 0.3, 1.0):
        near = (sample.x_t - centre).abs() < 0.02
        expected, _ = mixture(torch.tensor([centre], dtype=F64), torch.tensor([0.5], dtype=F64))
        assert sample.velocity[near].mean() == pytest.approx(float(expected), abs=0.05)


def test_logit_normal_times_have_its_distribution() -> None:
    level = (torch.arange(20_000, dtype=F64) + 0.5) / 20_000
    logits = torch.logit(time_quantile(level, FlowConfig(time_mean=0.3, time_std=1.2)))
    assert float(logits.mean()) == pytest.approx(0.3, abs=1e-3)
    assert float(logits.std()) == pytest.approx(1.2, abs=2e-3)
    assert math.isclose(float(time_quantile(torch.tensor([0.5]), FlowConfig())), 0.5)
    assert torch.equal(time_quantile(level, FlowConfig(time="uniform")), level)


@pytest.mark.parametrize("key", ["drop_all", "drop_each"])
def test_a_probability_above_one_is_named(key: str) -> None:
    with pytest.raises(ValueError, match=key):
        FlowConfig(**{key: 1.5})
