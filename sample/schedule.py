"""Time grids for sampling: t = 0 is noise, t = 1 is data (Movie Gen, section 3.4.2)."""

import torch
from jaxtyping import Float
from torch import Tensor

from kinoflow.configs.errors import UserError

EMULATED = 250
"""Steps of the linear grid whose beginning `linear_quadratic` has."""
TRAINED = 1000
"""Times that Stable Diffusion 3 was trained at."""


def linear(num_steps: int) -> Float[Tensor, " points"]:
    """`num_steps + 1` evenly spaced times from 0 to 1, float64."""
    _require_steps(num_steps)
    return torch.linspace(0.0, 1.0, num_steps + 1, dtype=torch.float64)


def linear_quadratic(num_steps: int) -> Float[Tensor, " points"]:
    """`num_steps + 1` times from 0 to 1, float64: short even steps first, then steps that grow.

    The first half are the first steps of a linear grid of `EMULATED` steps. The other half is the
    parabola that continues it with equal slope and ends at 1. With `EMULATED` steps the grid is linear.

    Raises:
        UserError: no step at all, or more than `EMULATED`.
    """
    _require_steps(num_steps)
    if num_steps > EMULATED:
        raise UserError(
            f"num_steps: {num_steps} is more than the {EMULATED} that a linear-quadratic schedule has; "
            f"use 1 to {EMULATED}"
        )
    if num_steps == 1:
        return linear(1)
    num_linear = num_steps // 2
    num_quadratic = num_steps - num_linear
    turn = num_linear / EMULATED
    excess = num_linear - turn * num_steps
    a = excess / (num_linear * num_quadratic**2)
    b = turn / num_linear - 2 * excess / num_quadratic**2
    c = a * num_linear**2
    i = torch.arange(num_steps + 1, dtype=torch.float64)
    grid = torch.where(i < num_linear, i * turn / num_linear, a * i**2 + b * i + c)
    grid[-1] = 1.0
    return grid


def shifted(num_steps: int, shift: float) -> Float[Tensor, " points"]:
    """`num_steps + 1` times from 0 to 1, float64: a linear grid, of which more lies in the noise.

    Stable Diffusion 3 (Esser et al. 2024, arXiv:2403.03206, section 5.3.2) turns the noise's share s of an
    even grid into αs / (1 + (α − 1)s), α = `shift`: 3 in its releases, 1 leaves the grid as it is. There 1 is
    noise (lecture notes, 1.3.1, footnote); here the noise's share at time t is 1 − t: the one place that
    turns it round.
    """
    return 1 - _moved(1 - linear(num_steps), shift)


def stable_diffusion_3(num_steps: int, shift: float) -> Float[Tensor, " points"]:
    """`num_steps + 1` times from 0 to 1, float64: what the released samplers of Stable Diffusion 3 take.

    They are those of its 50 steps (lecture notes, section 1.3.1). All but the last are even, and then
    `shifted`, from the noise to the last of `TRAINED` training times, which is shifted as well; one step goes
    from there to the data.
    """
    _require_steps(num_steps)
    last = float(_moved(torch.tensor(1 / TRAINED, dtype=torch.float64), shift))
    even = torch.linspace(1.0, last, num_steps, dtype=torch.float64)
    return torch.cat((1 - _moved(even, shift), even.new_ones(1)))


def _moved(noise_time: Tensor, shift: float) -> Tensor:
    return shift * noise_time / (1 + (shift - 1) * noise_time)


def _require_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise UserError(f"num_steps: {num_steps} is not a number of steps; use 1 or more")
