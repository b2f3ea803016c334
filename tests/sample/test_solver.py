import math
from itertools import pairwise

import pytest
import torch

from kinoflow.dit_video.flow.paths import cond_ot, cosine
from kinoflow.sample.schedule import linear, linear_quadratic
from kinoflow.sample.solver import euler, euler_maruyama, fading, heun, midpoint
from tests.dit_video.mixture import Mixture

ORDERS = [(euler, 1), (midpoint, 2), (heun, 2)]


def gaussian_velocity(mean, std):
    """u(x, t) that carries N(0, 1) to N(mean, std²) along x_t = t x_1 + (1 - t) x_0."""

    def velocity(x, t):
        variance = t**2 * std**2 + (1 - t) ** 2
        return mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)

    return velocity


@pytest.mark.parametrize(("solve", "order"), ORDERS)
def test_order_of_convergence_on_a_linear_ode(solve, order):
    # dx/dt = x cos t has x(1) = x(0) exp(sin 1).
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    exact = start * math.exp(math.sin(1.0))
    errors = [
        (solve(lambda x, t: x * torch.cos(t), start, linear(steps)) - exact).abs().max().item()
        for steps in (64, 128)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize(("solve", "order"), ORDERS)
@pytest.mark.parametrize("grid", [linear, linear_quadratic])
def test_gaussian_flow_maps_noise_to_mean_plus_std_noise(solve, order, grid):
    noise = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, std = 3.0, 0.5
    result = solve(gaussian_velocity(mean, std), noise, grid(200))
    tolerance = 0.02 if order == 1 else 1e-3
    torch.testing.assert_close(result, mean + std * noise, rtol=0, atol=tolerance)


@pytest.mark.parametrize("solve", [euler, midpoint, heun])
def test_constant_velocity_is_exact_in_one_step_and_times_have_the_dtype_of_x(solve):
    seen = []

    def velocity(x, t):
        seen.append(t.dtype)
        return torch.full_like(x, 2.0)

    x = torch.zeros(3)
    assert solve(velocity, x, linear(1)).tolist() == [2.0, 2.0, 2.0]
    assert set(seen) == {torch.float32}
    assert x.tolist() == [0.0, 0.0, 0.0]


def test_splitting_a_grid_changes_nothing():
    velocity, grid = gaussian_velocity(1.0, 2.0), linear_quadratic(10)
    x = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    half = midpoint(velocity, x, grid[:5])
    assert torch.equal(midpoint(velocity, half, grid[4:]), midpoint(velocity, x, grid))


def marginal_velocity(path, mixture=Mixture()):  # noqa: B008 - frozen
    """The closed-form velocity of the mixture as a solver asks for it."""
    return lambda x, t: mixture.velocity(x, t.expand(len(x)), path)


def quantiles(count):
    """Standard normal noise without chance: one point in the middle of each of `count` equal shares."""
    return torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)


@pytest.mark.parametrize("path", [cond_ot, cosine])
@pytest.mark.parametrize(
    ("solve", "steps", "off"), [(euler, 1000, 4e-3), (midpoint, 100, 2e-3), (heun, 100, 2e-3)]
)
def test_the_ode_carries_every_quantile_of_the_noise_to_that_of_the_mixture(path, solve, steps, off):
    """In one dimension a flow keeps the order of points: each quantile ends at the same quantile."""
    noise = quantiles(200)
    result = solve(marginal_velocity(path), noise, linear(steps))
    torch.testing.assert_close(Mixture().distribution(result), torch.special.ndtr(noise), rtol=0, atol=off)


@pytest.mark.parametrize("path", [cond_ot, cosine])
@pytest.mark.parametrize("diffusion", [0.3, 1.0, 2.0])
def test_the_sde_carries_noise_to_the_mixture(path, diffusion):
    generator = torch.Generator().manual_seed(0)
    count, times = 5_000, linear(120)

    def draw():
        return torch.randn(count, dtype=torch.float64, generator=generator)

    result = euler_maruyama(
        marginal_velocity(path), draw(), times, path=path, diffusion_fn=fading(path, diffusion), noise_fn=draw
    )
    levels = Mixture().distribution(result).sort().values
    even = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    assert float((levels - even).abs().max()) < 0.03  # Kolmogorov-Smirnov: 0.019 in 1 of 20 by chance
    data, _ = Mixture().sample(200_000, generator)
    assert float(result.mean()) == pytest.approx(float(data.mean()), abs=0.06)
    assert float(result.std()) == pytest.approx(float(data.std()), abs=0.05)


def test_a_plain_euler_sde_without_the_score_term_misses_the_mixture():
    """The test above can fail: noise without the term that balances it widens the result."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5_000, dtype=torch.float64, generator=generator)
    velocity, times = marginal_velocity(cond_ot), linear(120)
    for start, stop in pairwise(times):
        noise = torch.randn(len(x), dtype=torch.float64, generator=generator)
        x = x + (stop - start) * velocity(x, start) + ((1 - stop) * (stop - start)).sqrt() * noise
    levels = Mixture().distribution(x).sort().values
    even = (torch.arange(len(x), dtype=torch.float64) + 0.5) / len(x)
    assert float((levels - even).abs().max()) > 0.04


@pytest.mark.parametrize("path", [cond_ot, cosine])
def test_the_sde_converges_strongly_in_first_order(path):
    """On one Brownian path, steps twice as short halve the error against the finest."""
    finest, count = 512, 200
    generator = torch.Generator().manual_seed(1)
    increments = torch.randn(finest, count, dtype=torch.float64, generator=generator)
    start, one = quantiles(count), Mixture((1.0,), (0.5,), (0.4,))

    def run(steps):
        sums = increments.view(steps, finest // steps, count).sum(1) / math.sqrt(finest // steps)
        noise, times = iter(sums), 0.9 * linear(steps)
        return euler_maruyama(
            marginal_velocity(path, one), start, times,
            path=path, diffusion_fn=fading(path, 1.0), noise_fn=lambda: next(noise),
        )  # fmt: skip

    exact = run(finest)
    errors = [float((run(steps) - exact).square().mean().sqrt()) for steps in (16, 32, 64)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize(("solve", "order"), ORDERS)
def test_order_of_convergence_on_the_mixture(solve, order):
    start, times = quantiles(50), [0.9 * linear(steps) for steps in (640, 32, 64)]
    exact, *results = (solve(marginal_velocity(cosine), start, grid) for grid in times)
    errors = [float((result - exact).abs().mean()) for result in results]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


def test_without_diffusion_the_sde_is_euler():
    noise = quantiles(20)
    plain = euler(marginal_velocity(cosine), noise, linear(30))
    same = euler_maruyama(
        marginal_velocity(cosine), noise, linear(30),
        path=cosine, diffusion_fn=lambda _: 0.0, noise_fn=noise.clone,
    )  # fmt: skip
    assert torch.equal(same, plain)
