from fractions import Fraction

import pytest
import torch

from kinoflow.conditioning.embedding import TextEmbedding
from kinoflow.configs.errors import UserError
from kinoflow.sample.generate import (
    Sampling,
    decode_latent,
    decode_pieces,
    generate,
    noise_stream,
    sample_latent,
)
from kinoflow.tae.model.config import LatentShape

SIZE = {"frames": 16, "height": 32, "width": 32, "fps": Fraction(16), "num_steps": 3}
PROMPTS = ["a red star", "a blue ring that moves left on a gray background", "☂ déjà vu 🎉"]


class GaussianFlow:
    """The exact velocity from N(0, 1) to N(mean of the text, 0.5²)."""

    std = 0.5

    def encode_condition(self, text):
        return text[0].hidden[:, 0, 0]

    def __call__(self, latent, time, text):
        mean, t = text.view(-1, 1, 1, 1, 1), time.view(-1, 1, 1, 1, 1)
        slope = (t * self.std**2 - (1 - t)) / (t**2 * self.std**2 + (1 - t) ** 2)
        return mean + slope * (latent - t * mean)


class GaussianScore(GaussianFlow):
    """The exact score of the same marginals, as a model of it gives it: times β."""

    def __call__(self, latent, time, text):
        mean, t = text.view(-1, 1, 1, 1, 1), time.view(-1, 1, 1, 1, 1)
        return -(1 - t) * (latent - t * mean) / (t**2 * self.std**2 + (1 - t) ** 2)


def text_of(mean):
    return (TextEmbedding(hidden=torch.full((1, 1, 1), mean), mask=torch.ones(1, 1, dtype=torch.bool)),)


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun"])
@pytest.mark.parametrize(("model", "objective"), [(GaussianFlow(), "velocity"), (GaussianScore(), "score")])
def test_sampling_solves_the_gaussian_flow_and_guidance_moves_its_mean(scale, solver, model, objective):
    shape = LatentShape(channels=4, frames=2, height=4, width=4)
    sampling = Sampling(guidance_scale=scale, num_steps=200, solver=solver, objective=objective)
    result = sample_latent(model, text_of(2.0), text_of(-1.0), shape, seed=7, sampling=sampling)
    # Both fields have one slope, so the guided one is that of the mean (1 - w) (-1) + w 2.
    expected = (1 - scale) * -1.0 + scale * 2.0 + 0.5 * noise_stream(shape, 7)()
    torch.testing.assert_close(result, expected, rtol=0, atol=0.06)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize(("model", "objective"), [(GaussianFlow(), "velocity"), (GaussianScore(), "score")])
def test_the_sde_has_the_law_of_the_guided_gaussian_flow(scale, model, objective):
    shape = LatentShape(channels=4, frames=4, height=16, width=16)
    sampling = Sampling(guidance_scale=scale, num_steps=200, solver="sde", diffusion=1.5, objective=objective)
    result = sample_latent(model, text_of(2.0), text_of(-1.0), shape, seed=7, sampling=sampling)
    assert float(result.mean()) == pytest.approx((1 - scale) * -1.0 + scale * 2.0, abs=0.03)
    assert float(result.std()) == pytest.approx(0.5, abs=0.02)
    ode = noise_stream(shape, 7)()
    related = torch.corrcoef(torch.stack([result.flatten(), ode.flatten()]))[0, 1]
    assert float(related) < 0.9  # each step's noise is its own, not the start's again
    again = sample_latent(model, text_of(2.0), text_of(-1.0), shape, seed=7, sampling=sampling)
    assert torch.equal(result, again)


def test_a_prompt_and_seed_give_the_same_bytes_alone_in_a_list_and_in_another_order(tiny_release):
    parts = tiny_release.backbone(), tiny_release.tae(), tiny_release.encoder()
    together = generate(*parts, PROMPTS, seeds=[5, 6, 7], **SIZE)
    assert together.shape == (3, 16, 32, 32, 3)
    assert together.dtype == torch.uint8
    for index, prompt in enumerate(PROMPTS):
        alone = generate(*parts, [prompt], seeds=[5 + index], **SIZE)
        assert torch.equal(alone[0], together[index])
    backwards = generate(*parts, PROMPTS[::-1], seeds=[7, 6, 5], **SIZE)
    assert torch.equal(backwards.flip(0), together)


def test_seed_prompt_negative_and_guidance_each_change_the_frames(tiny_release):
    parts = tiny_release.backbone(), tiny_release.tae(), tiny_release.encoder()
    first = generate(*parts, PROMPTS[:1], seeds=[5], **SIZE)
    assert not torch.equal(first, generate(*parts, PROMPTS[:1], seeds=[6], **SIZE))
    assert not torch.equal(first, generate(*parts, PROMPTS[1:2], seeds=[5], **SIZE))
    assert not torch.equal(first, generate(*parts, PROMPTS[:1], seeds=[5], negative="blurry", **SIZE))
    assert not torch.equal(first, generate(*parts, PROMPTS[:1], seeds=[5], guidance_scale=1.0, **SIZE))


def test_progress_counts_velocities(tiny_release):
    calls = []
    parts = tiny_release.backbone(), tiny_release.tae(), tiny_release.encoder()
    generate(*parts, PROMPTS[:2], seeds=[0, 1], solver="midpoint", progress=lambda: calls.append(1), **SIZE)
    assert len(calls) == 2 * 3 * 2 == 2 * Sampling(num_steps=3, solver="midpoint").num_evaluations


def test_the_schedule_of_a_release_is_the_grid_that_is_walked():
    seen = []

    class Watching(GaussianFlow):
        def __call__(self, latent, time, text):
            seen.append(float(time[0]))
            return super().__call__(latent, time, text)

    shape = LatentShape(channels=1, frames=1, height=1, width=1)
    sampling = Sampling(num_steps=4, schedule="shifted", shift=3.0)
    sample_latent(Watching(), text_of(2.0), text_of(-1.0), shape, seed=0, sampling=sampling)
    assert seen == pytest.approx([0, 0.1, 0.25, 0.5])


@pytest.mark.parametrize("frames", [1, 16, 200])
def test_decoding_denormalizes_and_streams_long_clips(tiny_release, frames):
    """The bytes are those of the whole clip decoded at once."""
    tae = tiny_release.tae()
    latent = torch.randn(1, 4, -(-frames // 8), 4, 4, generator=torch.Generator().manual_seed(0))
    clip = decode_latent(tae, latent, frames)
    assert clip.shape == (1, frames, 32, 32, 3)
    with torch.no_grad():
        plain = tae.decode(tae.denormalize(latent), frames)
    plain = ((plain.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)
    assert torch.equal(clip, plain)
    pieces = list(decode_pieces(tae, latent, frames))
    assert all(1 <= piece.shape[1] <= 8 for piece in pieces)
    assert torch.equal(torch.cat(pieces, dim=1), clip)


def test_decoding_in_too_little_memory_is_refused(tiny_release):
    with pytest.raises(UserError, match="memory: 1MiB is too little for frames of 32x32"):
        decode_latent(tiny_release.tae(), torch.zeros(1, 4, 2, 4, 4), 16, memory=2**20)


def test_noise_is_standard_normal_and_follows_from_the_seed_alone():
    shape = LatentShape(channels=16, frames=4, height=32, width=32)
    noise = noise_stream(shape, 3)()
    torch.randn(10)
    assert torch.equal(noise, noise_stream(shape, 3)())
    assert not torch.equal(noise, noise_stream(shape, 4)())
    assert abs(noise.mean().item()) < 0.02
    assert noise.std().item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 300}, "num_steps"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"shift": 0.0}, "shift"),
        ({"shift": float("nan")}, "shift"),
    ],
)
def test_settings_out_of_range_name_their_key(settings, key):
    with pytest.raises(ValueError, match=key):
        Sampling(**settings)


def test_one_seed_for_each_prompt(tiny_release):
    parts = tiny_release.backbone(), tiny_release.tae(), tiny_release.encoder()
    with pytest.raises(UserError, match="seeds: 1 for 3 prompts"):
        generate(*parts, PROMPTS, seeds=[0], **SIZE)
    with pytest.raises(UserError, match="seed: -1"):
        generate(*parts, PROMPTS[:1], seeds=[-1], **SIZE)
