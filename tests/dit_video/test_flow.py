"""Flow matching: the objective and what minimises it, against closed forms in float64."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kinoflow.dit_video.flow.matching import (
    FlowConfig,
    dropped_texts,
    perturb,
    score_from_velocity,
    time_quantile,
    velocity_from_data,
)
from kinoflow.dit_video.flow.paths import SIGMA_MIN, GaussianPath, cond_ot, cosine
from kinoflow.sample.guidance import guide
from tests.dit_video.mixture import F64, Mixture

NULL = 3
"""The label ∅, beside those of the mixture's three components."""


def alone(component: int) -> Mixture:
    """The data of one label."""
    whole = Mixture()
    return Mixture((1.0,), (whole.means[component],), (whole.stds[component],))


def guided(x: Tensor, t: Tensor, label: int, path: GaussianPath) -> Tensor:
    """u(x|y), with u(x|∅) the marginal velocity of everything."""
    return (Mixture() if label == NULL else alone(label)).velocity(x, t, path)


def test_path_ends_at_noise_and_at_data() -> None:
    data, noise = torch.randn(3, 2, 2, dtype=F64), torch.randn(3, 2, 2, dtype=F64)
    torch.testing.assert_close(perturb(data, noise, torch.zeros(3, dtype=F64)).x_t, noise)
    torch.testing.assert_close(perturb(data, noise, torch.ones(3, dtype=F64)).x_t, data + SIGMA_MIN * noise)


def test_cond_ot_is_movie_gens_formula_bit_for_bit() -> None:
    """X_t = t X_1 + (1 − (1 − σ_min) t) X_0, V = X_1 − (1 − σ_min) X_0, as weights were trained on."""
    data, noise, time = torch.randn(5, 4, 2), torch.randn(5, 4, 2), torch.rand(5)
    sample, t = perturb(data, noise, time, FlowConfig().gaussian_path), time[:, None, None]
    assert torch.equal(sample.x_t, t * data + (1 - (1 - SIGMA_MIN) * t) * noise)
    assert torch.equal(sample.velocity, data - (1 - SIGMA_MIN) * noise)


def test_the_configuration_names_its_path() -> None:
    t = torch.rand(5, dtype=F64)
    assert torch.equal(FlowConfig(sigma_min=0.2).gaussian_path(t).beta, cond_ot(t, 0.2).beta)
    assert torch.equal(FlowConfig(path="cosine").gaussian_path(t).beta, cosine(t).beta)


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("path", [cond_ot, cosine])
def test_the_score_of_a_guided_velocity_is_the_guided_score(path, scale) -> None:
    """Equation 1.15 from equation 1.8."""
    x, t = torch.randn(50, dtype=F64), torch.rand(50, dtype=F64) * 0.9 + 0.05
    both = [guided(x, t, label, path) for label in (NULL, 1)]
    scores = [score_from_velocity(velocity, x, t, path) for velocity in both]
    velocity = (1 - scale) * both[0] + scale * both[1]
    expected = (1 - scale) * scores[0] + scale * scores[1]
    torch.testing.assert_close(score_from_velocity(velocity, x, t, path), expected)


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("path", [cond_ot, cosine])
def test_guidance_scales_the_gradient_of_the_classifier(path, scale) -> None:
    """u(x|∅) + w b ∇ log p_t(y|x), with b of equation 1.4 and the classifier of Remark 2 known."""
    x, t = torch.linspace(-2, 2, 50, dtype=F64, requires_grad=True), torch.rand(50, dtype=F64) * 0.9 + 0.05
    classifier = Mixture().responsibilities(x, t, path)[:, 1]
    (slope,) = torch.autograd.grad(classifier.log().sum(), x)
    x, at = x.detach(), path(t)
    b = (at.alpha_dot * at.beta**2 - at.beta_dot * at.beta * at.alpha) / at.alpha
    plain, own = (guided(x, t, label, path) for label in (NULL, 1))
    torch.testing.assert_close(guide(plain, own, scale), plain + scale * b * slope)


def expectation(times: list[float], order: int = 64) -> tuple[Tensor, ...]:
    """Every (z, ε, t, y) with its weight: Gauss-Hermite nodes of z and ε in each component, labels kept.

    Enough nodes that no small network can single them out; those of no weight are left out.
    """
    nodes, weights = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(order))
    weights = weights / weights.sum()
    mixture, rows = Mixture(), []
    for t in times:
        for y, (share, mean, std) in enumerate(
            zip(mixture.weights, mixture.means, mixture.stds, strict=True)
        ):
            z, noise = torch.meshgrid(mean + std * nodes, nodes, indexing="ij")
            weight = share * weights[:, None] * weights / len(times)
            rows.append(torch.stack([z, noise, torch.full_like(z, t), torch.full_like(z, y), weight]))
    nodes = torch.cat([row.flatten(1) for row in rows], dim=1)
    return tuple(nodes[:, nodes[-1] > 1e-9])


class Net(nn.Module):
    """u(x, t | y) with a few tanh units for each label."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(2, 24, dtype=F64)
        self.labels = nn.Embedding(NULL + 1, 24, dtype=F64)
        self.middle = nn.Linear(24, 24, dtype=F64)
        self.out = nn.Linear(24, 1, dtype=F64)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        hidden = torch.tanh(self.hidden(torch.stack([x, t], -1)) + self.labels(y))
        return self.out(torch.tanh(self.middle(hidden)))[:, 0]


@pytest.mark.parametrize("path", [cond_ot, cosine])
def test_training_on_the_guided_objective_finds_guided_and_marginal_velocity(path) -> None:
    """Equation 1.9 with η = 0.3, its expectation taken exactly; the loss sees conditional velocities only."""
    eta = 0.3
    z, noise, t, y, weight = expectation([0.3, 0.7])
    sample = perturb(z, noise, t, path)
    x, target = sample.x_t.repeat(2), sample.velocity.repeat(2)
    t, label = t.repeat(2), torch.cat([y.long(), torch.full_like(y, NULL).long()])
    weight = torch.cat([(1 - eta) * weight, eta * weight])
    net = Net()
    optimizer = torch.optim.LBFGS(
        net.parameters(), lr=1, max_iter=250, history_size=100, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (weight * (net(x, t, label) - target) ** 2).sum()
        value.backward()
        return value

    first = float(loss().detach())
    optimizer.step(loss)
    with torch.no_grad():
        truth = torch.stack([guided(x, t, one, path) for one in range(NULL + 1)])
        truth = truth.gather(0, label[None])[0]
        for one in range(NULL + 1):
            mine = label == one
            error = (weight * (net(x, t, label) - truth) ** 2)[mine].sum() / weight[mine].sum()
            assert math.sqrt(error) < 0.05, one
        # What is left is the variance of the conditional velocity, which no model can take away.
        least = float((weight * (target - truth) ** 2).sum())
    assert least * 0.999 < float(loss().detach()) < least + 0.01 * (first - least)


@pytest.mark.parametrize("field", ["velocity", "score"])
@pytest.mark.parametrize("path", [cond_ot, cosine])
def test_the_exact_minimiser_is_the_marginal_field(path, field) -> None:
    """Equations 1.2 and 1.11 by least squares, in a basis that holds the answer."""
    z, noise, t, _, weight = expectation([0.6])
    sample = perturb(z, noise, t, path)
    target = sample.velocity if field == "velocity" else -noise / path(t).beta

    def basis(x: Tensor, t: Tensor) -> Tensor:
        share = Mixture().responsibilities(x, t, path)
        return torch.cat([share, share * x[:, None]], dim=1)

    root = weight.sqrt()[:, None]
    found = torch.linalg.lstsq(root * basis(sample.x_t, t), root * target[:, None]).solution[:, 0]
    x, at = torch.linspace(-2.5, 3, 40, dtype=F64), torch.full((40,), 0.6, dtype=F64)
    expected = Mixture().velocity(x, at, path)
    if field == "score":
        expected = score_from_velocity(expected, x, at, path)
    torch.testing.assert_close(basis(x, at) @ found, expected, atol=1e-5, rtol=1e-5)


def test_samples_of_the_guided_objective_converge_to_the_fields() -> None:
    """As training draws them, labels dropped: 64 times the samples, an eighth of the error."""
    generator, config = torch.Generator().manual_seed(0), FlowConfig(drop_all=0.25, drop_each=0.0)
    x, t = torch.linspace(-2, 2, 30, dtype=F64), torch.full((30,), 0.5, dtype=F64)

    def error(count: int) -> float:
        z, y = Mixture().sample(count, generator)
        time = torch.full((count,), 0.5, dtype=F64)
        sample = perturb(z, torch.randn(count, generator=generator, dtype=F64), time, cond_ot)
        levels = torch.rand(2, count, 1, generator=generator)
        label = torch.where(dropped_texts(levels[0], levels[1], config)[:, 0], NULL, y)
        squares = []
        for one in range(NULL + 1):
            mixture = Mixture() if one == NULL else alone(one)

            def basis(x: Tensor, t: Tensor, mixture: Mixture = mixture) -> Tensor:
                share = mixture.responsibilities(x, t, cond_ot)
                return torch.cat([share, share * x[:, None]], dim=1)

            rows = basis(sample.x_t[label == one], time[label == one])
            found = torch.linalg.lstsq(rows, sample.velocity[label == one][:, None]).solution[:, 0]
            # Where this label has data; a fit says nothing elsewhere.
            likely = mixture.log_density(x, t, cond_ot).exp() > 0.05
            off = basis(x, t) @ found - guided(x, t, one, cond_ot)
            squares.append(off[likely].square().mean())
        return float(torch.stack(squares).mean().sqrt())

    coarse = float(np.mean([error(4_000) for _ in range(4)]))
    fine = float(np.mean([error(256_000) for _ in range(2)]))
    assert fine < 0.03
    assert 3 < coarse / fine < 20


def test_texts_are_dropped_at_the_rates_asked_for() -> None:
    """All together with η, each alone besides: 1 − (1 − 0.1)(1 − 0.2) of the texts of one encoder."""
    count, config = 200_000, FlowConfig(drop_all=0.1, drop_each=0.2)
    dropped = dropped_texts(torch.rand(count, 1), torch.rand(count, 3), config)
    assert dropped.double().mean(0).tolist() == pytest.approx([0.28] * 3, abs=0.004)
    together = 0.1 + 0.9 * 0.2**3
    assert float(dropped.all(1).double().mean()) == pytest.approx(together, abs=0.004)
    never = dropped_texts(torch.rand(9, 1), torch.rand(9, 3), FlowConfig(drop_all=0.0, drop_each=0.0))
    always = dropped_texts(torch.rand(9, 1), torch.rand(9, 3), FlowConfig(drop_all=1.0, drop_each=0.0))
    assert not never.any() and always.all()


def test_logit_normal_times_have_its_distribution() -> None:
    level = (torch.arange(20_000, dtype=F64) + 0.5) / 20_000
    time = time_quantile(level, FlowConfig(time_mean=0.3, time_std=1.2))
    logits = torch.logit(time)
    assert float(logits.mean()) == pytest.approx(0.3, abs=1e-3)
    assert float(logits.std()) == pytest.approx(1.2, abs=2e-3)
    torch.testing.assert_close(torch.special.ndtr((logits - 0.3) / 1.2), level)
    assert (time[1:] > time[:-1]).all() and 0 < float(time[0]) < float(time[-1]) < 1
    assert math.isclose(float(time_quantile(torch.tensor([0.5]), FlowConfig())), 0.5)
    assert torch.equal(time_quantile(level, FlowConfig(time="uniform")), level)


@pytest.mark.parametrize("key", ["drop_all", "drop_each"])
def test_a_probability_above_one_is_named(key: str) -> None:
    with pytest.raises(ValueError, match=key):
        FlowConfig(**{key: 1.5})


def test_velocity_follows_from_the_data():
    generator = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(6, 3, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    time = torch.linspace(0, 0.95, 6, dtype=torch.float64)
    sample = perturb(data, noise, time)
    found = velocity_from_data(data, sample.x_t, time[:, None, None])
    torch.testing.assert_close(found, sample.velocity)
    near = velocity_from_data(data, data + 1, torch.ones(1, dtype=torch.float64), least=0.05)
    assert near.abs().max() < 20.1, "bounded at the data"
