"""What is known of a clip: masks, the path of kept places, what training draws, and who reads it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kinoflow.conditioning.embedding import TextEmbedding
from kinoflow.dit_video import DiTConfig, VideoDiT
from kinoflow.dit_video.flow import known as module
from kinoflow.dit_video.flow.known import (
    KnownConfig,
    begun,
    draw,
    joined,
    keep,
    nothing,
    resting,
    show,
    shown_everywhere,
    span,
    velocity_near,
    went_on,
)
from kinoflow.dit_video.flow.matching import perturb
from kinoflow.dit_video.flow.paths import coefficients, cond_ot, cosine

CONFIG = DiTConfig(
    width=16, depth=2, heads=2, ffn=24, latent_channels=3, text_widths=(5,), max_tokens=(4, 4, 4)
)
TEXT = (TextEmbedding(hidden=torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1)),
                      mask=torch.ones(2, 3, dtype=torch.bool)),)  # fmt: skip


def clip(seed=0, frames=4, dtype=torch.float32):
    return torch.randn(2, 3, frames, 4, 6, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def model(**keys):
    torch.manual_seed(0)
    made = VideoDiT(replace(CONFIG, **keys))
    made.init_weights()
    for name, value in made.named_parameters():  # none is zero, but what reads the known
        if name != "known.weight":
            torch.nn.init.normal_(value, std=0.2, generator=torch.Generator().manual_seed(len(name)))
    return made.eval()


def test_nothing_known_is_the_model_without_the_channels_to_the_bit():
    plain, reading = model(), model(known=True)
    reading.load_state_dict(plain.state_dict(), strict=False)
    torch.nn.init.normal_(reading.known.weight)
    time = torch.tensor([0.2, 0.7])
    want = plain(clip(), time, TEXT)
    assert torch.equal(reading(clip(), time, TEXT), want)
    assert torch.equal(reading(clip(), time, TEXT, nothing(clip())), want), "zeros through a map without bias"


def test_it_starts_at_zero_and_learns():
    reading, time = model(known=True), torch.tensor([0.2, 0.7])
    assert not VideoDiT(CONFIG).state_dict().keys() & {"known.weight"}
    known = keep(clip(1), span(clip(), 0, 2))
    output = reading(clip(), time, TEXT, known)
    assert torch.equal(output, reading(clip(), time, TEXT))
    output.square().mean().backward()
    grad = reading.known.weight.grad
    assert grad is not None and grad.abs().sum() > 0


def test_each_channel_of_the_known_reaches_the_velocity():
    reading, time = model(known=True), torch.tensor([0.2, 0.7])
    torch.nn.init.normal_(reading.known.weight)
    empty = nothing(clip())
    before = reading(clip(), time, TEXT, empty)
    for changed in (replace(empty, latent=clip(1)), replace(empty, kept=empty.kept + 1),
                    replace(empty, shown=empty.shown + 1)):  # fmt: skip
        assert not torch.equal(reading(clip(), time, TEXT, changed), before)


def test_a_model_that_reads_none_refuses_it():
    with pytest.raises(ValueError, match=r"dit\.known"):
        model()(clip(), torch.tensor([0.2, 0.7]), TEXT, nothing(clip()))


@pytest.mark.parametrize("path", [cond_ot, cosine])
def test_kept_places_lie_on_the_path_that_training_draws(path):
    data, noise, time = clip(1, dtype=torch.float64), clip(2, dtype=torch.float64), torch.tensor([0.25, 0.8])
    known = keep(data, span(data, 1, 3))
    sample = perturb(data, noise, time.double(), path)
    inside = known.kept.bool().expand_as(data)
    x, u = clip(3, dtype=torch.float64), clip(4, dtype=torch.float64)
    held, velocity = known.hold(x, noise, time, path), known.velocity(u, noise, time, path)
    assert torch.equal(held[inside], sample.x_t[inside]) and torch.equal(held[~inside], x[~inside])
    assert torch.equal(velocity[inside], sample.velocity[inside])
    assert torch.equal(velocity[~inside], u[~inside])


def test_a_picture_is_shown_in_one_latent_frame():
    picture = clip(5)[:, :, 0]
    known = show(nothing(clip()), -1, picture)
    assert torch.equal(known.latent[:, :, 3], picture) and not known.latent[:, :, :3].any()
    assert known.shown[:, :, 3].all() and not known.shown[:, :, :3].any() and not known.kept.any()
    with pytest.raises(ValueError, match="latent frame 0 is kept"):
        show(keep(clip(), span(clip(), 0, 1)), 0, picture)


def test_modes_are_drawn_as_often_as_asked():
    config = KnownConfig(first=0.2, both=0.1, prefix=0.2, suffix=0.1, region=0.2)
    rng, one, count = np.random.default_rng(0), clip()[:1], 4000
    pictures = torch.randn(5, 3, 4, 6, generator=torch.Generator().manual_seed(6))
    found = {"nothing": 0, "first": 0, "both": 0, "prefix": 0, "suffix": 0, "region": 0}
    for _ in range(count):
        known = draw(config, rng, one, pictures)
        assert torch.equal(known.latent * known.kept, one * known.kept), "kept is the clip's own"
        found[name(known, pictures)] += 1
    for mode, share in {"nothing": 0.2, "first": 0.2, "both": 0.1, "prefix": 0.2, "suffix": 0.1,
                        "region": 0.2}.items():  # fmt: skip
        deviation = (share * (1 - share) / count) ** 0.5
        assert abs(found[mode] / count - share) < 5 * deviation, mode


def name(known, pictures):
    """The mode of what was drawn, by looking at it."""
    shown, kept = (mask[0, 0].flatten(1).any(1).tolist() for mask in (known.shown, known.kept))
    if any(shown) and not any(kept):
        assert torch.equal(known.latent[:, :, 0], pictures[:1])
        assert shown[3] == torch.equal(known.latent[:, :, 3], pictures[4:])
        return "both" if shown[3] else "first"
    if not any(kept):
        return "nothing"
    if all(kept):
        assert 0 < known.kept.mean() < 1
        return "region"
    count = sum(kept)
    if any(shown):
        assert shown == [place == count for place in range(4)], "behind the beginning its last frame"
        assert torch.equal(known.latent[0, :, count], pictures[count])
    assert any(shown) == kept[0]
    assert kept in ([True] * count + [False] * (4 - count), [False] * (4 - count) + [True] * count)
    return "prefix" if kept[0] else "suffix"


def test_an_upsampler_is_shown_the_smaller_twin_everywhere():
    rng, one, twin = np.random.default_rng(0), clip()[:1], clip(7)[:1]
    known = draw(KnownConfig(upsample=1.0), rng, one, None, twin)
    assert torch.equal(known.latent, twin) and known.shown.all() and not known.kept.any()
    still = draw(KnownConfig(upsample=1.0), rng, one[:, :, :1], None, twin[:, :, :1])
    assert torch.equal(still.latent, twin[:, :, :1]), "of pictures too"
    with pytest.raises(ValueError, match="latents are of single frames; the other shares must be 0"):
        KnownConfig(upsample=0.5, first=0.2)
    with pytest.raises(ValueError, match=r"known\.window: a number of frames, beside known\.upsample"):
        KnownConfig(window=4)


def test_a_picture_takes_no_modes_in_time():
    rng, still = np.random.default_rng(0), clip(frames=1)[:1]
    for mode in ("first", "both", "prefix", "suffix"):
        assert not draw(KnownConfig(**{mode: 1.0}), rng, still, None).channels.any()
    region = draw(KnownConfig(region=1.0), rng, still, None)
    assert 0 < region.kept.mean() < 1


def test_batches_are_joined_and_repeated():
    rng = np.random.default_rng(0)
    parts = [draw(KnownConfig(region=1.0), rng, clip(i)[:1], None) for i in range(3)]
    batch = joined(parts)
    assert torch.equal(batch.channels[1:2], parts[1].channels)
    assert torch.equal(batch.repeated(6).channels[4:5], parts[1].channels), "row i + 3 is row i"


@pytest.mark.parametrize("keys", [{"first": -0.1}, {"first": 0.6, "region": 0.6}])
def test_shares_that_are_none(keys):
    with pytest.raises(ValueError, match="sum to 1"):
        KnownConfig(**keys)


def test_regions_are_of_all_sizes_and_both_kinds():
    rng, one = np.random.default_rng(0), clip()[:1]
    shares = [float(draw(KnownConfig(region=1.0), rng, one, None).kept.mean()) for _ in range(200)]
    assert min(shares) < 0.2 and max(shares) > 0.8 and module.MASKS == 2


@pytest.mark.parametrize("path", [cond_ot, cosine])
@pytest.mark.parametrize("time", [0.0, 0.3, 0.9, 1.0])
def test_the_velocity_near_what_is_shown_is_a_gaussians(path, time):
    """By the expected data and noise that make up x."""
    x, k, times = clip(1).double(), clip(2).double(), torch.full((2,), time, dtype=torch.float64)
    at = coefficients(path, times, x)
    left = (x - at.alpha * k) / (at.alpha**2 * 0.3 + at.beta**2)
    data, noise = k + at.alpha * 0.3 * left, at.beta * left
    assert torch.allclose(at.alpha * data + at.beta * noise, x, atol=1e-12)
    found = velocity_near(k, x, times, path, 0.3)
    assert torch.allclose(found, at.alpha_dot * data + at.beta_dot * noise, atol=1e-12)


def test_a_head_adds_to_what_is_shown():
    """A head at zero gives the Gaussian's velocity where something is shown, and elsewhere zero."""
    reading, time = model(known=True, shown_variance=0.02), torch.tensor([0.2, 0.7])
    known = show(nothing(clip()), 1, clip(4)[:, :, 1])
    plain = model(known=True)
    near = velocity_near(known.latent, clip(), time, cond_ot, 0.02)
    got, own = (each(clip(), time, TEXT, known) for each in (reading, plain))
    assert torch.allclose(got[:, :, 1], (own + near)[:, :, 1], atol=1e-5)
    assert torch.equal(got[:, :, 2:], own[:, :, 2:])
    for value in (reading.head.weight, reading.head.bias):
        torch.nn.init.zeros_(value)
    got = reading(clip(), time, TEXT, shown_everywhere(clip(4)))
    assert torch.allclose(got, velocity_near(clip(4), clip(), time, cond_ot, 0.02))
    assert torch.equal(reading(clip(), time, TEXT), torch.zeros_like(clip()))


@pytest.mark.parametrize(
    "keys", [{"shown_variance": 0.1}, {"known": True, "shown_variance": -1.0},
             {"known": True, "shown_variance": 0.1, "predicts": "data"}],
)  # fmt: skip
def test_a_variance_of_nothing_is_refused(keys):
    with pytest.raises(ValueError, match=r"dit\.shown_variance: "):
        replace(CONFIG, **keys)


def test_what_rests_is_kept_a_latent_frame_longer():
    """Cells more than three away from one that moved; all else as training has it."""
    whole, last = torch.zeros(1, 3, 4, 9, 9), torch.randn(1, 3, 9, 9)
    picture = last + 0.02  # less than moves
    picture[:, :, 1, 1] += 1
    whole[:, :, :2] = torch.stack((torch.randn(1, 3, 9, 9), last), dim=2)
    known, trained = went_on(whole, 2, picture), begun(whole, 2, picture)
    moves = torch.zeros(9, 9)
    moves[:5, :5] = 1
    assert torch.equal(resting(last, picture)[0, 0], 1 - moves)
    assert torch.equal(known.latent, trained.latent) and torch.equal(known.latent[:, :, 2], picture)
    assert torch.equal(known.kept[0, 0, 2], 1 - moves) and torch.equal(known.shown[0, 0, 2], moves)
    for frame in (0, 1, 3):
        assert torch.equal(known.kept[:, :, frame], trained.kept[:, :, frame])
        assert torch.equal(known.shown[:, :, frame], trained.shown[:, :, frame])
    assert not resting(last, torch.randn(1, 3, 9, 9)).any()
