import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from kinoflow.configs.errors import UserError
from kinoflow.sample.schedule import EMULATED, linear, linear_quadratic, shifted, stable_diffusion_3


def test_linear_quadratic_of_50_steps_has_the_known_values():
    grid = linear_quadratic(50)
    assert grid.dtype == torch.float64
    for index, value in {24: 0.096, 26: 0.1053, 30: 0.152, 40: 0.448, 49: 0.9333}.items():
        assert grid[index].item() == pytest.approx(value, abs=5e-5)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, 20, 49, 50, 250])
def test_grids_rise_from_0_to_1(num_steps):
    moved = [make(num_steps, shift) for make in (shifted, stable_diffusion_3) for shift in (0.5, 3.0)]
    for grid in (linear(num_steps), linear_quadratic(num_steps), *moved):
        assert grid.shape == (num_steps + 1,)
        assert grid[0].item() == 0.0
        assert grid[-1].item() == 1.0
        assert (grid.diff() > 0).all()


def test_first_half_is_the_emulated_grid_and_the_rest_a_parabola_that_continues_its_slope():
    grid = linear_quadratic(50)
    torch.testing.assert_close(grid[:26], linear(250)[:26], rtol=0, atol=1e-15)
    curvature = grid.diff().diff()
    torch.testing.assert_close(curvature[:24], torch.zeros(24, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(curvature[25:], curvature[-1].expand(24), rtol=0, atol=1e-13)
    # C1: the first step of the parabola is the linear step and half a curvature.
    assert (grid[26] - grid[25] - 1 / 250).item() == pytest.approx(curvature[-1].item() / 2, abs=1e-13)


def test_emulating_as_many_steps_as_there_are_is_linear():
    torch.testing.assert_close(linear_quadratic(EMULATED), linear(EMULATED), rtol=0, atol=1e-14)


def test_a_shift_of_three_is_stable_diffusion_3s():
    """Its noise's share s goes to 3s / (1 + 2s): half noise is where a quarter of the data is in."""
    torch.testing.assert_close(shifted(4, 3.0), torch.tensor([0, 0.1, 0.25, 0.5, 1], dtype=torch.float64))
    for alpha in (0.5, 3.0, 7.5):
        noise = linear(50).flip(0)  # as they count: 1 is noise
        torch.testing.assert_close(1 - shifted(50, alpha), alpha * noise / (1 + (alpha - 1) * noise))


def test_no_shift_is_linear_and_shifts_multiply():
    torch.testing.assert_close(shifted(50, 1.0), linear(50), rtol=0, atol=1e-15)
    odds = [grid / (1 - grid) for grid in (shifted(50, 6.0)[:-1], linear(50)[:-1])]
    torch.testing.assert_close(6 * odds[0], odds[1])


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("num_steps", [1, 8, 28, 50])
def test_the_released_grid_is_that_of_diffusers(num_steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    theirs = 1 - scheduler.sigmas.double()
    torch.testing.assert_close(stable_diffusion_3(num_steps, shift), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: linear(0),
        lambda: linear_quadratic(-1),
        lambda: linear_quadratic(251),
        lambda: shifted(0, 3.0),
        lambda: stable_diffusion_3(0, 3.0),
    ],
)
def test_impossible_numbers_of_steps_name_the_key(make):
    with pytest.raises(UserError, match="num_steps"):
        make()
