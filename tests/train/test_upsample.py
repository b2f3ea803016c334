"""An upsampler's training: windows of frames and their twins, what it refuses, the card of its release."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kinoflow.configs.errors import UserError
from kinoflow.configs.schema import load
from kinoflow.data.latents import contents
from kinoflow.data.latents.sets import LatentSets
from kinoflow.sample.card import ReleaseConfig
from kinoflow.train.plan.config import PlanConfig
from kinoflow.train.plan.workload import DiTWorkload
from kinoflow.train.run.config import RunConfig
from kinoflow.train.tasks.export import _of_upsampler
from kinoflow.train.tasks.flow import flow_loss
from kinoflow.train.tasks.flow_task import FlowTask
from kinoflow.train.tasks.held_out import HeldOut
from kinoflow.train.tasks.precompute import PrecomputeConfig, precompute
from tests.train.tiny import tiny_encoders

SHAPE = (
    "model=dit", "dit.width=16", "dit.depth=1", "dit.heads=2", "dit.ffn=24", "dit.text_widths=[2,3]",
    "dit.latent_channels=2", "dit.max_tokens=[4,2,2]", "data.batch_size=3",
)  # fmt: skip
UPSAMPLER = ("dit.known=true", "known.upsample=1", "known.window=4")
MINI = Path(__file__).parents[2] / "sample" / "mini"
BUCKETS = "buckets=[8x32x32@16,1x32x32@16]"


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Folders of the same clips: with twins, and as ever."""
    place = tmp_path_factory.mktemp("latents")
    common = ("source=world", f"release={MINI}", BUCKETS, "clips=8", "workers=0", "batch_size=4")
    for name, more in (("twins", ["upsample=2"]), ("plain", [])):
        precompute(load(PrecomputeConfig, [*common, *more, f"out={place / name}"]), tiny_encoders())
    return place


def task(folder, *more):
    return FlowTask(load(RunConfig, [*SHAPE, f"data.latents={folder}", *more]))


def test_a_step_takes_windows_of_clips_and_the_same_of_their_twins(latents):
    data = task(latents / "twins", *UPSAMPLER).data
    stored = LatentSets([str(latents / "twins")])
    starts, pictures = set(), 0
    for step in range(12):
        batch = data.batch(step, 0, 1)
        assert batch.known is not None and batch.known.shown.all() and not batch.known.kept.any()
        assert batch.noise.shape == batch.latent.shape == batch.known.latent.shape
        if batch.latent.shape[2] == 1:
            pictures += 1
            continue
        assert batch.latent.shape[2] == 4
        draw = data.sampler.draw(step, 0, 1)
        whole = stored.get(stored.buckets[draw.bucket], draw.indices, np.zeros(3, int))
        for i in range(3):
            found = [s for s in range(5) if torch.equal(whole.latent[i, :, s : s + 4], batch.latent[i])]
            twins = [torch.equal(whole.smaller[i, :, s : s + 4], batch.known.latent[i]) for s in found]
            assert any(twins)
            starts |= set(found[:1])
    assert len(starts) > 2 and pictures


def test_the_loss_is_over_all_places_and_reaches_what_reads_the_twin(latents):
    made = task(latents / "twins", *UPSAMPLER)
    made.model.to_empty(device="cpu")
    made.model.init_weights()
    batch = made.data.batch(0, 0, 1)
    loss = flow_loss(made.model, batch, made.config.flow)
    want = (batch.latent - (1 - 1e-5) * batch.noise).square().flatten(1).mean(1)
    assert torch.allclose(loss, want, rtol=1e-4), "of a model that says nothing yet"
    torch.nn.init.ones_(made.model.head.weight)
    flow_loss(made.model, batch, made.config.flow).mean().backward()
    assert made.model.known.weight.grad.abs().sum() > 0


def test_latents_with_and_without_twins_are_told_apart(latents):
    with pytest.raises(UserError, match=r"known\.upsample: .*plain holds no smaller twins; precompute it"):
        _ = task(latents / "plain", *UPSAMPLER).data.latents
    with pytest.raises(UserError, match=r"twins holds frames one by one, for an upsampler; set dit\.known"):
        _ = task(latents / "twins").data.latents
    with pytest.raises(UserError, match="made with another upsample"):
        LatentSets([str(latents / "twins"), str(latents / "plain")])
    with pytest.raises(UserError, match="holds frames one by one"):
        contents.export(latents / "twins", latents / "a.kino", 0)
    with pytest.raises(UserError, match="an upsampler makes none"):
        task(latents / "twins", *UPSAMPLER, "preview_every=5", "release=x").previews.check()


def test_held_out_clips_have_their_twins(latents):
    held = HeldOut(latents / "twins", clips=4, batch_size=4)
    assert all(held[i].known is not None for i in range(len(held)))
    made = held.latents.index.made_from
    with pytest.raises(UserError, match="made with upsample=2, and it with upsample=0"):
        held.require(made, (), "it")
    held.require(made, (), "it", 2)


def test_the_card_says_what_it_takes_and_how(latents):
    config = load(RunConfig, [*SHAPE, f"data.latents={latents / 'twins'}", *UPSAMPLER])
    card = _of_upsampler(ReleaseConfig(name="x"), config, LatentSets(config.data.latents).index)
    assert card.buckets == ("4x32x32@16", "1x32x32@16") and card.default_bucket == "4x32x32@16"
    assert (card.upsample.factor, card.upsample.overlap) == (2, 1)
    assert (card.sampling.num_steps, card.sampling.guidance_scale) == (20, 1)
    near = load(
        RunConfig, [*SHAPE, f"data.latents={latents / 'twins'}", *UPSAMPLER, "dit.shown_variance=0.01"]
    )
    card = _of_upsampler(ReleaseConfig(name="x", best_of=3), near, LatentSets(near.data.latents).index)
    assert (card.sampling.num_steps, card.best_of) == (4, 1)


def test_the_plan_counts_a_latent_for_each_frame_of_a_window():
    shape = ["data.buckets=[8x32x32@16,2x32x32@16]", *SHAPE, *UPSAMPLER]
    work = DiTWorkload(load(PlanConfig, shape), [4, 4])
    assert [clip.grid for clip in work.clips] == [(4, 2, 2), (2, 2, 2)]
    plain = DiTWorkload(load(PlanConfig, shape[:-3]), [4, 4])
    assert [clip.grid for clip in plain.clips] == [(1, 2, 2), (1, 2, 2)]
