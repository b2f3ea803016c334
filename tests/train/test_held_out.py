"""The loss of held-out clips: the same noise and times always, and the mean that it claims to be."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kinoflow.configs.errors import UserError
from kinoflow.configs.schema import load
from kinoflow.dit_video.flow.matching import FlowConfig, perturb
from kinoflow.train.run.config import RunConfig
from kinoflow.train.run.processes import Processes
from kinoflow.train.tasks import held_out as module
from kinoflow.train.tasks.flow_task import FlowTask
from kinoflow.train.tasks.held_out import HeldOut, held_out_loss

ALONE = Processes(rank=0, size=1, device=torch.device("cpu"))


def zero(x_t, time, texts):
    return torch.zeros_like(x_t)


def velocities(batches):
    """Of every batch: times, and the mean square of the velocity."""
    every = [batches[i] for i in range(len(batches))]
    found = [(b.time, perturb(b.latent, b.noise, b.time).velocity.double()) for b in every]
    return torch.cat([time for time, _ in found]), torch.cat(
        [u.square().flatten(1).mean(1) for _, u in found]
    )


def test_it_is_the_mean_square_of_what_is_missing(held_out):
    batches = HeldOut(held_out, 64, 3)
    time, squares = velocities(batches)
    assert len(time) == 8 * 8, "eight clips at eight times each"
    found = held_out_loss(zero, batches, FlowConfig(), ALONE)
    assert found["validation_loss"] == pytest.approx(float(squares.mean()), rel=1e-6)
    for quarter in range(4):
        inside = (time >= quarter / 4) & (time < (quarter + 1) / 4)
        assert int(inside.sum()) == 16
        key = f"validation_loss_{25 * quarter}_{25 * quarter + 25}"
        assert found[key] == pytest.approx(float(squares[inside].mean()), rel=1e-6)


def test_a_model_that_knows_the_velocity_has_none(held_out):
    batches = HeldOut(held_out, 4, 5)
    every = [batches[i] for i in range(len(batches))]
    known = iter([perturb(b.latent, b.noise, b.time).velocity for b in every])
    found = held_out_loss(lambda *_: next(known), batches, FlowConfig(), ALONE)
    assert set(found.values()) == {0.0}


def test_noise_and_times_depend_on_the_clip_alone(held_out):
    whole, pieces = HeldOut(held_out, 64, 64)[0], HeldOut(held_out, 64, 5)
    for name in ("latent", "noise", "time"):
        joined = torch.cat([getattr(pieces[i], name) for i in range(len(pieces))])
        assert torch.equal(joined, getattr(whole, name)), name
    assert len(torch.unique(whole.noise.flatten(1), dim=0)) == 64
    assert whole.time[:8].tolist() == [(i + 0.5) / 8 for i in range(8)]


@pytest.mark.parametrize("clips", [1, 3, 8])
def test_clips_are_taken_evenly_over_the_folder(held_out, clips):
    batches = HeldOut(held_out, clips, 8)
    assert len(batches) == clips
    data = batches.latents
    every = data.get(data.buckets[0], np.arange(8), np.zeros(8, int)).latent
    places = [next(i for i in range(8) if torch.equal(every[i], batches[j].latent[0])) for j in range(clips)]
    assert places == [[0], [0, 4, 7], [*range(8)]][(1, 3, 8).index(clips)]


def test_replicas_share_the_batches_out(held_out, monkeypatch):
    """Three of them: of eleven batches the last round has one too many."""
    batches = HeldOut(held_out, 64, 6)
    assert len(batches) == 11
    own = []
    monkeypatch.setattr(module, "from_all", lambda value, _: own.append(value) or [value])
    for rank in range(3):
        held_out_loss(zero, batches, FlowConfig(), Processes(rank=rank, size=3, device=torch.device("cpu")))
    monkeypatch.setattr(module, "from_all", lambda *_: own)
    found = held_out_loss(zero, batches, FlowConfig(), ALONE)
    assert found["validation_loss"] == pytest.approx(float(velocities(batches)[1].mean()), rel=1e-6)


BACKBONE = ["model=dit", "dit.width=16", "dit.depth=1", "dit.heads=2", "dit.ffn=24", "dit.latent_channels=2",
            "dit.text_widths=[2,3]", "dit.max_tokens=[4,8,8]", "log_every=2"]  # fmt: skip


def test_clips_that_are_learned_from_are_refused(latents):
    words = [*BACKBONE, f"data.latents={latents}", f"validation.latents={latents}", "validation.every=2"]
    with pytest.raises(UserError, match=r"validation.latents: .* holds the clips of data.latents"):
        _ = FlowTask(load(RunConfig, words)).held_out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["validation.every=2"], "validation: give both latents and every"),
        (["validation.latents=here"], "validation: give both latents and every"),
        (
            ["validation.latents=here", "validation.every=3"],
            "validation.every: 3 is no multiple of log_every=2",
        ),
        (
            ["model=tae", "validation.latents=here", "validation.every=2"],
            "only model: dit, unet, mmdit are validated",
        ),
    ],
)
def test_what_cannot_be_validated_is_refused(words, said):
    with pytest.raises(UserError, match=said):
        load(RunConfig, [*BACKBONE, *words])


def test_every_bucket_has_its_share(monkeypatch):
    """No batch has clips of two of them."""
    counts = {"1x16x16@16": 4, "4x16x16@16": 12}
    fake = SimpleNamespace(buckets=tuple(counts), num_clips=counts.__getitem__)
    monkeypatch.setattr(module, "LatentDataset", lambda _: fake)
    batches = HeldOut("nowhere", 8, 10)._batches
    taken = {
        name: sorted({clip for bucket, items in batches if bucket == name for clip, _ in items})
        for name in counts
    }
    assert taken == {"1x16x16@16": [0, 2], "4x16x16@16": [0, 2, 5, 7, 9, 11]}
    assert all(len(items) <= 10 for _, items in batches)
    assert sum(len(items) for _, items in batches) == 8 * 8
