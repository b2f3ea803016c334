"""A model's output made a velocity, against the closed forms of a mixture."""

import pytest
import torch

from kinoflow.dit_video.flow.paths import cond_ot, cosine
from kinoflow.sample.guidance import guide
from kinoflow.sample.objective import EARLIEST, as_velocity
from tests.dit_video.mixture import F64, Mixture

PATHS = pytest.mark.parametrize("path", [cond_ot, cosine])
ONE = Mixture((1.0,), (0.3,), (0.2,))
X = torch.linspace(-2, 2, 9, dtype=F64)


def scaled_score(mixture, path):
    return lambda x, t: path(t).beta * mixture.score(x, t.expand(len(x)), path)


@PATHS
@pytest.mark.parametrize("t", [EARLIEST, 0.3, 0.99, 1 - 1e-9])
def test_the_velocity_of_a_score_model(path, t):
    time = torch.tensor(t, dtype=F64)
    found = as_velocity(scaled_score(Mixture(), path), "score", path)(X, time)
    torch.testing.assert_close(found, Mixture().velocity(X, time.expand(9), path), atol=1e-9, rtol=1e-7)


def test_a_velocity_model_is_left_as_it_is():
    def model(x, t):
        return x * t

    assert as_velocity(model, "velocity", cond_ot) is model


@PATHS
@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_guided_scores_give_the_guided_velocity(path, scale):
    """Equation 1.8 from equation 1.15."""
    time = torch.tensor(0.4, dtype=F64)

    def guided(x, t):
        return guide(scaled_score(Mixture(), path)(x, t), scaled_score(ONE, path)(x, t), scale)

    found = as_velocity(guided, "score", path)(X, time)
    own, everything = (each.velocity(X, time.expand(9), path) for each in (ONE, Mixture()))
    torch.testing.assert_close(found, guide(everything, own, scale), atol=1e-9, rtol=1e-7)


@PATHS
def test_before_the_earliest_time_the_field_stands_still(path):
    asked = []

    def model(x, t):
        asked.append(float(t))
        return scaled_score(ONE, path)(x, t)

    velocity = as_velocity(model, "score", path)
    early = [velocity(X, torch.tensor(t, dtype=F64)) for t in (0.0, EARLIEST / 2, EARLIEST)]
    assert asked == [EARLIEST] * 3
    assert torch.equal(early[0], early[2]) and torch.equal(early[1], early[2])
