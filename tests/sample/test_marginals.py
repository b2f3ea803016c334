"""Samples of the ODE and of the SDE have the marginals p_t, by two-sample tests, with exact fields."""

import pytest
import torch

from kinoflow.dit_video.flow.paths import cond_ot, cosine
from kinoflow.sample.objective import EARLIEST, as_velocity
from kinoflow.sample.schedule import linear
from kinoflow.sample.solver import euler_maruyama, fading, heun, midpoint
from tests.dit_video.mixture import F64, Mixture
from tests.sample.test_solver import ORDERS, marginal_velocity, quantiles
from tests.sample.two_sample import LEVEL, critical, differ, distance

COUNT = 4000
PATHS = pytest.mark.parametrize("path", [cond_ot, cosine])
STOPS = (40, 80, 120, 160, 190)
"""Of 200 steps."""


def exact_score(path):
    """∇ log p_t, by differentiating the density."""
    return lambda x, t: Mixture().score(x, t.expand(len(x)), path)


def score_model(path):
    """What a model of the score gives once it has learnt all: β ∇ log p_t."""
    return lambda x, t: path(t).beta * exact_score(path)(x, t)


def normal(seed):
    """Standard normal draws, a new one at each call."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(COUNT, dtype=F64, generator=generator)


def truth(t, path, seed=1):
    """As many draws of p_t."""
    return Mixture().at(t, path).sample(COUNT, torch.Generator().manual_seed(seed))[0]


def networks(kind, path):
    """The velocity, and the score of a second network."""
    if kind == "score":
        return as_velocity(score_model(path), "score", path), None
    return marginal_velocity(path), exact_score(path) if kind == "two" else None


@PATHS
@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["velocity", "score", "two"])
def test_every_marginal_is_the_truth_for_every_constant_sigma(path, sigma, kind):
    """σ_t = 0, 0.5 and 1, the score from the velocity, the velocity from the score, or both from two."""
    velocity, score = networks(kind, path)
    draw = normal(0)
    x, begin = draw(), 0
    for stop in STOPS:
        x = euler_maruyama(
            velocity, x, linear(200)[begin : stop + 1], path=path, diffusion_fn=lambda _: sigma,
            noise_fn=draw, score_fn=score,
        )  # fmt: skip
        assert not differ(x, truth(stop / 200, path)), (stop, LEVEL)
        begin = stop


@PATHS
@pytest.mark.parametrize("diffusion", [0.5, 1.0])
@pytest.mark.parametrize("kind", ["velocity", "score", "two"])
def test_fading_noise_reaches_the_data(path, diffusion, kind):
    """σ_t = 0.5 √β and √β, as sampling uses them, to t = 1."""
    (velocity, score), draw = networks(kind, path), normal(0)
    x = euler_maruyama(
        velocity, draw(), linear(200), path=path, diffusion_fn=fading(path, diffusion), noise_fn=draw,
        score_fn=score,
    )  # fmt: skip
    assert not differ(x, truth(1.0, path))


@PATHS
@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_noise_without_the_score_is_told_apart(path, sigma):
    """dX = u dt + σ dW of the notes' Key Idea 1, with the marginal velocity, has other marginals."""
    draw = normal(0)
    x = euler_maruyama(
        marginal_velocity(path), draw(), linear(200)[:191], path=path, diffusion_fn=lambda _: sigma,
        noise_fn=draw, score_fn=lambda x, _: torch.zeros_like(x),
    )  # fmt: skip
    assert differ(x, truth(0.95, path))


def test_the_two_sample_test_has_the_level_it_states():
    """Of samples of one distribution it tells 1 in 20 apart at level 0.05, and small shifts at any."""
    generator = torch.Generator().manual_seed(3)
    one, other = torch.randn(2, 400, 1000, dtype=F64, generator=generator)
    found = sum(differ(*pair, level=0.05) for pair in zip(one, other, strict=True))
    assert found / 400 == pytest.approx(0.05, abs=0.025)
    assert critical(COUNT, COUNT) == pytest.approx(0.0436, abs=1e-4)
    assert differ(truth(1.0, cond_ot, 1), truth(1.0, cond_ot, 2) + 0.1)
    assert distance(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.5, 4.0])) == pytest.approx(2 / 3)


@PATHS
@pytest.mark.parametrize(("solve", "order"), ORDERS)
def test_solvers_have_their_order_on_the_score_model(solve, order, path):
    """The velocity by way of the score, between the first time at which it is asked and 0.9."""
    velocity, start = as_velocity(score_model(path), "score", path), quantiles(50)
    times = [EARLIEST + (0.9 - EARLIEST) * linear(steps) for steps in (640, 32, 64)]
    exact = midpoint(marginal_velocity(path), start, times[0])
    errors = [float((solve(velocity, start, grid) - exact).abs().mean()) for grid in times[1:]]
    assert torch.tensor(errors[0] / errors[1]).log2().item() == pytest.approx(order, abs=0.2)


@PATHS
def test_standing_still_before_the_earliest_time_costs_next_to_nothing(path):
    """The field at `EARLIEST` instead of those before it: of the order of its square."""
    velocity, start = as_velocity(score_model(path), "score", path), quantiles(50)
    times = torch.cat((EARLIEST * linear(4)[:-1], EARLIEST + (1 - EARLIEST) * linear(200)))
    off = heun(velocity, start, times) - heun(marginal_velocity(path), start, times)
    assert 0 < float(off.abs().max()) < 10 * EARLIEST**2
