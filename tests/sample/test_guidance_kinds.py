"""Formulas of the guidance that is not plain, in float64 against closed forms."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from kinoflow.configs.errors import UserError
from kinoflow.dit_video.flow.paths import cond_ot, cosine
from kinoflow.sample.guidance import (
    Guidance,
    Projected,
    guide,
    guide_zero_star,
    guided_velocity,
    rescaled,
)
from kinoflow.sample.objective import as_velocity
from tests.sample.test_generate import GaussianFlow, GaussianScore, text_of
from tests.sample.test_guidance import MeanText, embedding

SHAPE = (3, 2, 2, 3, 4)


def drawn(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, dtype=torch.float64, generator=generator) for _ in range(count)]


def rows(x):
    return [row.flatten() for row in x]


def test_zero_star_puts_the_nearest_point_on_the_line_of_the_unconditional_velocity():
    u, c = drawn(2)
    guided = guide_zero_star(u, c, 4.0)
    for u_row, c_row, row in zip(rows(u), rows(c), rows(guided), strict=True):
        share = (row - 4 * c_row) / (-3 * u_row)  # (v - w c) / (1 - w) is s u
        s = share[0]
        torch.testing.assert_close(share, s.expand_as(share))
        assert float((c_row - s * u_row) @ u_row) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(guide_zero_star(2.5 * u, c, 4.0), guided)  # the length of u says nothing


def test_zero_star_is_plain_where_the_scale_is_one_already_and_where_there_is_nothing_to_scale():
    u, other = drawn(2)
    across = (
        other
        - (other * u).flatten(1).sum(1).view(-1, 1, 1, 1, 1)
        / (u * u).flatten(1).sum(1).view(-1, 1, 1, 1, 1)
        * u
    )
    torch.testing.assert_close(guide_zero_star(u, u + across, 7.0), guide(u, u + across, 7.0))
    assert torch.equal(guide_zero_star(torch.zeros_like(u), other, 7.0), 7 * other)


def test_rescale_gives_back_the_spread_of_the_conditional_velocity():
    u, c = drawn(2)
    guided = guide(u, c, 6.0)
    whole = rescaled(guided, c, 1.0)
    for row, c_row, guided_row in zip(rows(whole), rows(c), rows(guided), strict=True):
        assert float(row.std()) == pytest.approx(float(c_row.std()))
        ratio = row / guided_row
        torch.testing.assert_close(ratio, ratio[0].expand_as(ratio))
    torch.testing.assert_close(rescaled(guided, c, 0.7), 0.7 * whole + 0.3 * guided)
    assert torch.equal(rescaled(guided, c, 0.0), guided)


@pytest.mark.parametrize("path", [cond_ot, cosine])
def test_apg_with_everything_off_is_plain_guidance(path):
    plain = Guidance(kind="apg", momentum=0.0, threshold=0.0, parallel=1.0)
    combine = Projected(4.0, plain, path)
    for time in (0.0, 0.3, 0.9, 1.0):
        u, c, x = drawn(3, seed=int(10 * time))
        at = torch.tensor(time, dtype=torch.float64)
        torch.testing.assert_close(combine(u, c, x, at), guide(u, c, 4.0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", [cond_ot, cosine])
def test_apg_moves_the_denoised_prediction_across_itself(path):
    """What is added to where the velocity leads is orthogonal to it, and as long as the threshold says."""
    combine = Projected(4.0, Guidance(kind="apg", momentum=0.0, threshold=0.0), path)
    short = Projected(4.0, Guidance(kind="apg", momentum=0.0, threshold=0.01, parallel=1.0), path)
    u, c, x = drawn(3)
    time = torch.tensor(0.4, dtype=torch.float64)
    before, after = denoised(c, x, time, path), denoised(combine(u, c, x, time), x, time, path)
    shortened = denoised(short(u, c, x, time), x, time, path)
    full = 3 * (before - denoised(u, x, time, path))
    for z, moved, limited, whole in zip(*map(rows, (before, after, shortened, full)), strict=True):
        assert float((moved - z) @ z) == pytest.approx(0, abs=1e-9)
        torch.testing.assert_close(moved - z, whole - (whole @ z) / (z @ z) * z)
        step = (limited - z) / 3
        assert float(step.square().mean().sqrt()) == pytest.approx(0.01)
        torch.testing.assert_close(step / step.norm(), whole / whole.norm())


def denoised(velocity, x, time, path):
    """ẑ of x = α ẑ + β ε̂ and v = α̇ ẑ + β̇ ε̂, by a solver for two equations."""
    at = path(time)
    matrix = torch.stack((torch.stack((at.alpha, at.beta)), torch.stack((at.alpha_dot, at.beta_dot))))
    return torch.linalg.solve(matrix, torch.stack((x, velocity)).flatten(1))[0].view_as(x)


def test_the_momentum_of_apg_adds_earlier_updates_up():
    combine = Projected(2.0, Guidance(kind="apg", momentum=-0.5, threshold=0.0, parallel=1.0), cond_ot)
    average = 0.0
    for step, time in enumerate((0.0, 0.2, 0.5)):
        u, c, x = drawn(3, seed=step)
        beta = 1 - (1 - 1e-5) * time
        average = beta * (c - u) - 0.5 * average
        guided = combine(u, c, x, torch.tensor(time, dtype=torch.float64))
        torch.testing.assert_close(guided, c + average / beta)
    u, c, x = drawn(3, seed=9)  # at the data they would be divided by nothing
    torch.testing.assert_close(combine(u, c, x, torch.tensor(1.0, dtype=torch.float64)), guide(u, c, 2.0))


class Told(MeanText):
    """Its velocity is the mean of the text times the latent."""

    def __call__(self, latent, time, text):
        return super().__call__(latent, time, text) * latent


def guided(model, scale, guidance):
    return guided_velocity(model, (embedding(1, 2, 5.0),), (embedding(1, 3, 2.0),), scale, guidance)


def test_outside_of_the_interval_there_is_one_pass_and_no_guidance():
    model, x = Told(), torch.ones(1, 1, 1, 2, 2)
    velocity = guided(model, 4.0, Guidance(interval=(0.2, 0.7)))
    found = {
        time: float(velocity(x, torch.tensor(time)).mean()) for time in (0.0, 0.199, 0.2, 0.7, 0.701, 1.0)
    }
    assert found == {0.0: 5.0, 0.199: 5.0, 0.2: 14.0, 0.7: 14.0, 0.701: 5.0, 1.0: 5.0}
    assert model.batches == [1, 1, 2, 2, 1, 1]


@pytest.mark.parametrize(
    "guidance",
    [Guidance(kind="zero-star"), Guidance(kind="apg"), Guidance(rescale=0.5), Guidance(interval=(0.1, 0.5))],
)
def test_scale_1_is_the_plain_model_in_one_pass_whatever_the_kind(guidance):
    model, x = Told(), torch.randn(1, 1, 1, 2, 2)
    velocity = guided(model, 1.0, guidance)
    assert torch.equal(velocity(x, torch.tensor(0.3)), 5 * x)
    assert model.batches == [1]


@pytest.mark.parametrize(
    "guidance", [Guidance(kind="zero-star"), Guidance(kind="apg"), Guidance(rescale=0.5), Guidance()]
)
def test_outputs_of_a_score_model_are_velocities_before_they_are_combined(guidance):
    """CFG-Zero* of the scores themselves would be another thing."""
    path, time = partial(cond_ot, sigma_min=0.0), torch.tensor(0.4, dtype=torch.float64)
    x = torch.randn(1, 2, 2, 3, 4, dtype=torch.float64)
    told = text_of(2.0), text_of(-1.0), 4.0, guidance
    flow = guided_velocity(GaussianFlow(), *told, path=path)
    score = guided_velocity(
        GaussianScore(), *told, path=path, convert=lambda output: as_velocity(output, "score", path)
    )
    torch.testing.assert_close(score(x, time), flow(x, time), rtol=1e-6, atol=1e-6)


def test_the_defaults_are_plain_guidance_to_the_bit():
    x = torch.randn(1, 1, 1, 2, 2)
    for written in (Guidance(), Guidance(interval=(0.0, 1.0), rescale=0.0, kind="cfg")):
        velocity = guided(Told(), 4.3, written)
        assert torch.equal(velocity(x, torch.tensor(0.3)), guide(2 * x, 5 * x, 4.3))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"interval": (0.5, 0.5)}, "guidance_interval: 0.5:0.5 is not two rising times in 0..1"),
        ({"interval": (-0.1, 0.5)}, "guidance_interval: -0.1:0.5 is not"),
        ({"interval": (0.1, math.nan)}, "guidance_interval: 0.1:nan is not"),
        ({"rescale": 1.5}, "guidance_rescale: 1.5 is not in 0..1"),
        ({"rescale": math.nan}, "guidance_rescale: nan"),
        ({"momentum": 1.0}, "guidance.momentum: 1.0"),
        ({"threshold": math.nan}, "guidance.threshold: nan"),
        ({"parallel": -1.0}, "guidance.parallel: -1.0"),
        ({"zero_steps": -1}, "guidance.zero_steps: -1"),
    ],
)
def test_bad_values_are_one_line(settings, line):
    with pytest.raises(UserError) as error:
        Guidance(**settings)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_an_unknown_kind_is_one_line():
    with pytest.raises(UserError, match="guidance_kind: 'best' is none; use one of cfg, zero-star, apg"):
        Guidance.__post_init__(SimpleNamespace(kind="best"))  # types are checked in tests, not at a user's
