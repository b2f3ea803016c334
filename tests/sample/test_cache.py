"""The step cache: what it computes, what it answers, and that it keeps to its clip."""

from dataclasses import replace

import pytest
import torch

from kinoflow.sample.cache import Passes, StepCache, counted
from kinoflow.sample.generate import Sampling, sample_latent
from kinoflow.sample.guidance import Guidance
from kinoflow.sample.pipeline import Pipeline
from kinoflow.sample.request import ClipRequest
from kinoflow.tae.model.config import LatentShape
from tests.sample.test_generate import GaussianFlow, text_of

SHAPE = LatentShape(channels=4, frames=2, height=4, width=4)


def sampled(sampling, passes=None, model=None):
    told = text_of(2.0), text_of(-1.0)
    return sample_latent(model or GaussianFlow(), *told, SHAPE, seed=7, sampling=sampling, passes=passes)


class Line:
    """A field that grows evenly in time; it counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, time):
        self.calls += 1
        return (2 + time) * torch.ones_like(x)


def test_it_answers_along_the_line_of_the_last_two_while_the_estimate_is_below_the_threshold():
    """A field of slope 1 in time, x moving by 0.1 a call: k = 1, and each call adds 0.1 / v."""
    line, passes = Line(), Passes()
    cache = StepCache(line, 0.1, passes)
    asked, estimate, expected = [], 0.0, 2
    for step in range(12):
        time = 0.1 * step
        x = torch.full((1, 2, 1, 2, 2), time, dtype=torch.float64)
        before = line.calls
        found = cache(x, torch.tensor(time, dtype=torch.float64))
        asked.append(line.calls > before)
        if step >= 2:
            estimate += 0.1 / expected
        if step < 2 or estimate >= 0.1:
            expected, estimate = 2 + time, 0.0
        assert asked[-1] == (step < 2 or estimate == 0.0)
        if asked[-1] or not asked[-2]:
            continue
        torch.testing.assert_close(found, torch.full_like(found, 2 + time))  # one step on, the line is exact
    assert asked[:3] == [True, True, False] and sum(asked) < 8
    assert (passes.computed, passes.reused) == (0, len(asked) - sum(asked))


def test_it_goes_no_farther_than_the_last_two_lie_apart():
    cache = StepCache(lambda x, time: x.clone(), 0.9, Passes())
    at = [torch.full((1, 1, 1, 1, 1), value) for value in (1.0, 1.1, 1.15, 1.2)]
    for x, time in zip(at[:2], (0.0, 0.1), strict=True):
        cache(x, torch.tensor(time))
    assert float(cache(at[2], torch.tensor(0.15))) == pytest.approx(1.15)
    assert float(cache(at[3], torch.tensor(0.9))) == pytest.approx(1.2)


def test_two_at_one_time_say_nothing_of_the_next():
    line, passes = Line(), Passes()
    cache = StepCache(line, 0.1, passes)
    for time, value in ((0.0, 1.0), (0.0, 1.1), (0.5, 1.2)):  # k would be 0 of the first two
        found = cache(torch.full((1, 1, 1, 1, 1), value), torch.tensor(time))
        assert float(found) == pytest.approx(2 + time)
    assert line.calls == 3


def test_rows_are_counted():
    passes = Passes()
    model = counted(lambda x, time: x, passes)
    for rows in (1, 2, 2):
        model(torch.zeros(rows, 1), torch.tensor(0.0))
    assert passes == Passes(computed=5, reused=0)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "sde"])
@pytest.mark.parametrize("guidance", [Guidance(), Guidance(interval=(0.1, 0.6)), Guidance(kind="apg")])
def test_no_threshold_is_no_cache_and_a_small_one_stays_near(solver, guidance):
    plain, few = Passes(), Passes()
    sampling = Sampling(num_steps=100, solver=solver, guidance=guidance)
    exact = sampled(sampling, plain)
    assert torch.equal(sampled(replace(sampling, cache=0.0)), exact)
    near = sampled(replace(sampling, cache=0.05), few)
    assert plain.reused == 0 and few.reused > plain.computed / 4
    assert float((near - exact).norm() / exact.norm()) < 0.01


def test_what_was_computed_is_forgotten_when_another_model_was_asked_in_between():
    line, passes = Line(), Passes()
    model = counted(line, passes)
    cache, other = StepCache(model, 0.9, passes), counted(lambda x, time: x, passes)
    for time in (0.0, 0.1, 0.2):
        cache(torch.full((1, 1, 1, 1, 1), time), torch.tensor(time))
    assert line.calls == 2
    other(torch.zeros(1, 1), torch.tensor(0.3))
    for time in (0.4, 0.5, 0.6):
        cache(torch.full((1, 1, 1, 1, 1), time), torch.tensor(time))
    assert line.calls == 4


def test_passes_of_kinds_of_guidance():
    times = Sampling(num_steps=50).times()[:-1]
    inside = int(((times >= 0.1) & (times <= 0.6)).sum())
    for sampling, expected in [
        (Sampling(num_steps=50), 100),
        (Sampling(num_steps=50, guidance_scale=1.0), 50),
        (Sampling(num_steps=50, guidance=Guidance(interval=(0.1, 0.6))), 50 + inside),
        (Sampling(num_steps=50, guidance=Guidance(kind="zero-star", zero_steps=2)), 96),
        (Sampling(num_steps=50, guidance=Guidance(kind="zero-star"), guidance_scale=1.0), 50),
        (Sampling(num_steps=5, guidance=Guidance(kind="zero-star"), solver="heun"), 16),
    ]:
        passes, calls = Passes(), []
        told = text_of(2.0), text_of(-1.0)
        sample_latent(GaussianFlow(), *told, SHAPE, seed=7, sampling=sampling, passes=passes,
                      progress=lambda calls=calls: calls.append(1))  # fmt: skip
        assert passes.computed == expected
        assert len(calls) == sampling.num_evaluations


def test_zero_init_stands_still_in_its_steps():
    """The start is the noise of the seed, carried from the second point of the grid."""
    from kinoflow.sample.generate import noise_stream

    seen = []

    class Watching(GaussianFlow):
        def __call__(self, latent, time, text):
            seen.append((float(time[0]), latent[:1].clone()))
            return super().__call__(latent, time, text)

    sampling = Sampling(num_steps=4, schedule="linear", guidance=Guidance(kind="zero-star"))
    sampled(sampling, model=Watching())
    assert [time for time, _ in seen] == [0.25, 0.5, 0.75]
    assert torch.equal(seen[0][1], noise_stream(SHAPE, 7)())


def test_clips_in_threads_have_a_cache_each(tiny_release):
    pipeline = Pipeline(tiny_release)
    requests = [ClipRequest(prompt=f"star {seed}", seed=seed, steps=6, cache=0.9) for seed in range(4)]
    alone = [pipeline.make(pipeline.plan(request)) for request in requests]
    together = list(pipeline.batch(requests, at_once=4))
    for one, other in zip(alone, together, strict=True):
        assert (one.frames == other.frames).all() and one.passes == other.passes
        assert one.passes.reused > 0
