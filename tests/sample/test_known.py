"""Sampling with something known of the clip, and in windows."""

from dataclasses import replace

import pytest
import torch

from kinoflow.dit_video.flow.known import begun, keep, nothing, show, span, velocity_near
from kinoflow.dit_video.flow.paths import cond_ot, cosine
from kinoflow.sample.generate import Sampling, sample_latent
from kinoflow.sample.known import Reader, Windows, held
from kinoflow.tae.model.config import LatentShape

SHAPE = LatentShape(channels=2, frames=6, height=2, width=3)


class Model:
    """A velocity that tells places and times apart, and writes down what it was shown."""

    def __init__(self):
        self.seen = []

    def encode_condition(self, condition):
        return condition

    def __call__(self, latent, time, condition, known=None):
        self.seen.append((latent.shape[2], known))
        velocity = torch.sin(3 * latent) + time[0]
        return velocity if known is None else velocity + known.latent + 0.1 * known.shown


def clip(seed=0, frames=6):
    return torch.randn(1, 2, frames, 2, 3, generator=torch.Generator().manual_seed(seed))


def sample(model, **keys):
    sampling = replace(
        Sampling(num_steps=8, schedule="linear", guidance_scale=1.0), **keys.pop("sampling", {})
    )
    return sample_latent(model, (), (), SHAPE, seed=3, sampling=sampling, **keys)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "sde"])
@pytest.mark.parametrize("path", ["cond_ot", "cosine"])
def test_kept_places_come_out_as_they_went_in(solver, path):
    known = keep(clip(1), span(clip(), 0, 2))
    made = sample(Model(), known=known, sampling={"solver": solver, "path": path})
    assert torch.equal(made[:, :, :2], clip(1)[:, :, :2])
    assert made.isfinite().all() and not torch.equal(made[:, :, 2:], clip(1)[:, :, 2:])


def test_the_model_sees_kept_places_where_training_has_them():
    known, noise, path = keep(clip(1), span(clip(), 2, 6)), clip(2), cond_ot
    seen = []

    def velocity(x, time):
        seen.append((x, time))
        return torch.zeros_like(x)

    got = held(velocity, known, noise, path)(clip(5), torch.tensor(0.25))
    at = path(torch.tensor(0.25))
    want = at.alpha * clip(1) + at.beta * noise
    assert torch.equal(seen[0][0][:, :, 2:], want[:, :, 2:]) and torch.equal(
        seen[0][0][:, :, :2], clip(5)[:, :, :2]
    )
    slope = at.alpha_dot * clip(1) + at.beta_dot * noise
    assert torch.equal(got[:, :, 2:], slope[:, :, 2:]) and not got[:, :, :2].any()


def test_what_is_shown_reaches_each_call_and_is_not_put_back():
    known, model = show(nothing(clip()), 0, clip(4)[:, :, 0]), Model()
    made = sample(model, known=known)
    assert len(model.seen) == 8 and all(given is not None for _, given in model.seen)
    assert not torch.equal(made[:, :, :1], known.latent[:, :, :1])
    assert not torch.equal(made, sample(Model()))


@pytest.mark.parametrize("path", [cond_ot, cosine])
def test_shown_places_lean_on_their_picture_and_at_the_end_no_more(path):
    picture, x = clip(4)[:, :, 0], clip(5)
    alone, behind = show(nothing(clip()), 0, picture), begun(clip(1), 1, picture)
    for known, most, frame in ((alone, 0.9, 0), (behind, 0.6, 1)):
        for time in (0.0, 0.3, 0.9, 1.0):
            times = torch.tensor([time])
            share = min(most, 2 * float(path(times).beta))
            got = held(lambda x, _: torch.ones_like(x), known, clip(2), path)(x, times[0])
            want = 1 + share * (velocity_near(known.latent, x, times.expand(len(x)), path, 0.05) - 1)
            assert torch.allclose(got[:, :, frame], want[:, :, frame], atol=1e-4)
            assert (got[:, :, frame + 1 :] == 1).all(), "to the bit"


def test_what_leans_ends_near_its_picture():
    """Of a model that knows nothing of the picture, the place it shows comes near it and no other."""
    known = show(nothing(clip()), 0, clip(4)[:, :, 0])
    made, plain = sample(Model(), known=known), sample(Model())
    away = [(each - known.latent)[:, :, 0].abs().mean() for each in (made, plain)]
    assert away[0] < 0.5 * away[1]


def test_without_anything_known_nothing_changes():
    model = Model()
    assert torch.equal(sample(model), sample(Model(), windows=Windows(length=6, overlap=2)))
    assert all(given is None for _, given in model.seen)


def test_both_halves_of_the_guidance_know_the_same():
    known, model = keep(clip(1), span(clip(), 0, 1)), Model()
    reader = Reader(model, known)
    reader(torch.cat((clip(), clip())), torch.zeros(2), ())
    _, given = model.seen[0]
    assert len(given.latent) == 2 and torch.equal(given.latent[0], given.latent[1])


@pytest.mark.parametrize(
    ("frames", "length", "overlap", "spans"),
    [
        (3, 4, 2, [(0, 3)]),
        (4, 4, 2, [(0, 4)]),
        (6, 4, 2, [(0, 4), (2, 6)]),
        (7, 4, 2, [(0, 4), (2, 6), (3, 7)]),
        (9, 4, 0, [(0, 4), (4, 8), (5, 9)]),
    ],
)
def test_windows_cover_the_clip(frames, length, overlap, spans):
    assert Windows(length=length, overlap=overlap).spans(frames) == spans


def test_windows_whose_overlap_is_too_long():
    with pytest.raises(ValueError, match="overlap of 4"):
        Windows(length=4, overlap=4)


def test_windows_average_what_each_says():
    """Against the sum written out: window i says i, with weights 1 2 2 1."""
    calls = iter([1.0, 2.0])

    class Counting(Model):
        def __call__(self, latent, time, condition, known=None):
            return torch.full_like(latent, next(calls))

    got = Reader(Counting(), None, Windows(length=4, overlap=2))(clip(), torch.zeros(1), ())
    shared = [(2 * 1 + 1 * 2) / 3, (1 * 1 + 2 * 2) / 3]
    assert got[0, 0, :, 0, 0].tolist() == pytest.approx([1, 1, *shared, 2, 2])


def test_each_window_knows_its_own_part():
    known, model = keep(clip(1), span(clip(), 0, 3)), Model()
    Reader(model, known, Windows(length=4, overlap=2))(clip(), torch.zeros(1), ())
    assert [length for length, _ in model.seen] == [4, 4]
    assert torch.equal(model.seen[1][1].latent, known.latent[:, :, 2:6])


def test_a_model_without_memory_of_places_is_the_same_in_windows():
    """One whose velocity is a function of each value alone: windows change nothing but rounding."""
    whole = sample(Model())
    assert torch.allclose(sample(Model(), windows=Windows(length=4, overlap=2)), whole, atol=1e-5)


def test_where_all_is_kept_nothing_is_made():
    assert torch.equal(sample(Model(), known=keep(clip(1), span(clip(), 0, 6))), clip(1))
