import math

import pytest
import torch

from sample.schedule import linear, linear_quadratic
from sample.solver import euler, heun, midpoint

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
