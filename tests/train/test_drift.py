"""A decoder that learns from latents as a sampler ends with them."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from kinoflow.configs.errors import UserError
from kinoflow.configs.schema import load
from kinoflow.sample.generate import Sampling, carried, noise_stream, sample_latent
from kinoflow.sample.release import DEFAULT_RELEASE, Release
from kinoflow.tae import TAE
from kinoflow.train.run.config import RunConfig
from kinoflow.train.run.processes import Processes
from kinoflow.train.run.spread import Spread
from kinoflow.train.tasks.tae import TAETask

SOURCES = [
    f"init_from={DEFAULT_RELEASE}",
    f"drift.release={DEFAULT_RELEASE}",
    "freeze_encoder=true",
    "drift.share=1",
    "drift.steps=2",
    "drift.every=4",
    "data.workers=0",
    "data.world_share=1",
    "data.buckets=['16x64x64@16']",
    "data.batch_size=2",
    "data.crop=32",
    "loss.outlier=0",
]


def task(folder: Path, *more: str, ready: bool = True) -> TAETask:
    made = TAETask(load(RunConfig, [*SOURCES, f"run={folder}", *more]))
    if ready:
        processes = Processes(rank=0, size=1, device=torch.device("cpu"))
        made.prepare(Spread(config=made.config, processes=processes))
    return made


def batch_of(made: TAETask, step: int, index: int = 0, slices: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips and latents."""
    batch = made.batch(step, index, slices)
    assert batch.latent is not None and batch.noise is None
    return batch.video, batch.latent


def test_carried_from_noise_is_the_sampler() -> None:
    release = Release.load()
    backbone, encoder = release.backbone(), release.encoder()
    told, null = encoder(["a red star moves left"], Fraction(16)), encoder.null()
    sampling, shape = Sampling(num_steps=3, guidance_scale=3.0), release.latent_shape(8, 64, 64)
    expected = sample_latent(backbone, told, null, shape, seed=5, sampling=sampling)
    noise = noise_stream(shape, 5)()
    cached = replace(sampling, cache=0.5)  # is not used: each step is computed
    assert torch.equal(
        carried(backbone, told, null, noise, times=sampling.times(), sampling=cached), expected
    )


def test_a_pair_is_a_clip_and_a_latent_of_the_same_place(tmp_path: Path) -> None:
    """At the end of the flow the latent is the clip's own, and decodes to what was cut."""
    made = task(tmp_path, "drift.begin=[0.99,0.99]")
    assert made.drift is not None and isinstance(made.model, TAE)
    for step in (0, 4):
        video, latent = batch_of(made, step)
        assert video.shape == (2, 3, 16, 32, 32) and latent.shape == (2, 16, 2, 4, 4)
        with torch.no_grad():
            error = (made.model.decode(latent, 16) - video).square().mean((1, 2, 3, 4))
        spread = video.var(dim=(1, 2, 3, 4))
        assert (error < 0.15 * spread + 2e-3).all()


def test_earlier_begins_drift_further(tmp_path: Path) -> None:
    clip, own = batch_of(task(tmp_path, "drift.begin=[0.99,0.99]", "data.crop=null"), 0)
    errors = []
    for begin in (0.6, 0.1):
        video, latent = batch_of(task(tmp_path, f"drift.begin=[{begin},{begin}]", "data.crop=null"), 0)
        assert torch.equal(video, clip)
        errors.append((latent - own).square().mean())
    assert 0 < errors[0] < errors[1]


def test_steps_share_clips_cut_at_the_same_places_whoever_makes_them(tmp_path: Path) -> None:
    """A run that goes on in the middle, and two processes, see what one uninterrupted process sees."""
    made = task(tmp_path)
    assert made.names(0, 0, 1) == made.names(3, 0, 1) != made.names(4, 0, 1)
    first, _ = batch_of(made, 0)
    video, latent = batch_of(made, 3)
    assert not torch.equal(first, video)
    for same, other in zip((video, latent), batch_of(task(tmp_path), 3), strict=True):
        assert torch.equal(same, other)
    halves = [batch_of(made, 3, index, 2) for index in range(2)]
    assert torch.equal(torch.cat([clips for clips, _ in halves]), video)
    torch.testing.assert_close(torch.cat([latents for _, latents in halves]), latent, atol=1e-4, rtol=1e-4)


def test_the_share_of_the_steps_that_take_them(tmp_path: Path) -> None:
    made = task(tmp_path, "drift.share=0.3", ready=False)
    assert made.drift is not None
    taken = [made.drift.takes(step) for step in range(2000)]
    assert 0.25 < sum(taken) / len(taken) < 0.35


def test_their_loss_trains_the_decoder_and_has_no_posterior(tmp_path: Path) -> None:
    made = task(tmp_path)
    batch = made.batch(0, 0, 1)
    loss = made.loss(made.model, batch, 0)
    assert loss.parts.keys() == {"l1", "l2"}
    expected = (made.model(batch.video, latent=batch.latent).video - batch.video).abs().mean()
    torch.testing.assert_close(loss.parts["l1"], expected)
    loss.total.backward()
    trained = {name.partition(".")[0] for name, p in made.model.named_parameters() if p.grad is not None}
    assert trained == {"decoder", "to_pixels"}
    assert made.tokens(batch) == 2 * 2 * 4 * 4


def test_a_release_of_another_encoder_is_refused(tmp_path: Path) -> None:
    model = TAE.from_pretrained(DEFAULT_RELEASE / "tae")
    with torch.no_grad():
        model.encoder.conv_out.temporal.bias.add_(0.5)  # pyright: ignore[reportOptionalMemberAccess]
    model.save_pretrained(tmp_path / "other" / "tae")
    with pytest.raises(UserError, match=r"^drift\.release: the latents of .* init_from's encoder"):
        task(tmp_path, f"init_from={tmp_path / 'other'}")


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("freeze_encoder=false", r"^drift\.release: .* freeze_encoder=true"),
        ("drift.share=1.5", r"^drift\.share: 1\.5"),
        ("drift.begin=[0.5,0.2]", r"^drift\.begin: \[0\.5, 0\.2\]"),
        ("drift.steps=0", r"^drift\.steps: 0 is too small"),
    ],
)
def test_settings_that_make_no_sense_are_refused(setting: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        load(RunConfig, [*SOURCES, setting])
