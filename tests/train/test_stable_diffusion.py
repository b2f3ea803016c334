"""Stable Diffusion 3, trained on: its texts precomputed, its transformer gone on from, and exported."""

import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from kinoflow.configs.errors import UserError
from kinoflow.configs.schema import load
from kinoflow.data.latents.shards import LatentDataset
from kinoflow.sample.pipeline import Pipeline
from kinoflow.sample.release import Release
from kinoflow.sample.stable_diffusion import StableDiffusion, open_release
from kinoflow.train.__main__ import main
from kinoflow.train.run.config import RunConfig
from kinoflow.train.tasks.flow_task import FlowTask
from kinoflow.train.tasks.precompute import PrecomputeConfig, load_encoders
from tests.sample.stable_diffusion import pipeline

SIDE = 16
BUCKET = f"1x{SIDE}x{SIDE}@16"
MODEL = [
    "model=mmdit", "mmdit.width=32", "mmdit.depth=3", "mmdit.heads=4", "mmdit.patch=2",
    "mmdit.text_widths=[40]", "mmdit.latent_channels=16", "mmdit.max_tokens=12", "mmdit.qk_norm=false",
    "data.batch_size=2", "data.workers=0", "deepspeed.precision=fp32", "preview_every=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd") / "tiny-sd3"
    pipeline("3", folder)
    return folder


@pytest.fixture(scope="module")
def latents(released, tmp_path_factory):
    out = tmp_path_factory.mktemp("sd") / "latents"
    assert main(["precompute", *words(released, out)]) == 0
    return out


def words(released, out):
    return [
        "source=world", f"release={released}", f"out={out}", f"buckets=[{BUCKET}]", "clips=5", "workers=0",
        "captions_per_clip=2", "shard_size=3", "batch_size=2", "seed=1",
    ]  # fmt: skip


def config(latents, released, *more):
    said = [f"data.latents={latents}", f"release={released}", *more]
    return load(RunConfig, [*MODEL, "mmdit.pooled_width=20", *said])


def test_states_and_pooled_text_are_those_of_its_encoders(latents, released):
    data, opened = LatentDataset(latents), open_release(released)
    assert isinstance(opened, StableDiffusion)
    encoder = opened.encoder()
    assert (data.index.widths, data.index.pooled) == ((40,), (20,))
    for clip in range(5):
        for choice in (0, 1, -1):
            batch = data.get(BUCKET, np.array([clip]), np.array([choice]))
            prompt = "" if choice < 0 else data.captions(BUCKET, clip)[choice]
            (want,) = encoder([prompt], Fraction(1))
            (found,) = batch.texts
            assert found.pooled is not None and want.pooled is not None
            torch.testing.assert_close(found.pooled, want.pooled, atol=2e-3, rtol=2e-3)
            torch.testing.assert_close(found.hidden, want.hidden, atol=2e-3, rtol=2e-3)
            assert found.mask.all() and found.mask.shape == (1, 333)


def test_its_latents_are_shifted_and_scaled_as_its_users_have_them(latents, released):
    data = LatentDataset(latents)
    found = data.get(BUCKET, np.arange(5), np.zeros(5, int)).latent
    stored = torch.from_numpy(np.stack([data.stored(BUCKET, clip) for clip in range(5)])).float()
    torch.testing.assert_close(found, (stored - 0.0609) * 1.5305, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def exported(start_job, latents, released, tmp_path_factory):
    """A release after two steps from the released weights."""
    folder = tmp_path_factory.mktemp("sd")
    run, target = folder / "run", folder / "release"
    said = [f"data.latents={latents}", f"release={released}", f"init_from={released}", f"run={run}"]
    job = start_job("command", [*MODEL, "mmdit.pooled_width=20", *said, "steps=2", "optimizer.lr=1e-3"])
    assert job.wait() == [0], job.text()
    assert main(["export", str(run), str(target)]) == 0
    return target


def test_what_is_exported_makes_pictures(exported, released):
    release = Release.load(exported)
    assert release.config.text.clip_t5 == str(released) and release.config.buckets == (BUCKET,)
    assert release.config.sampling.schedule == "stable-diffusion-3"
    made = Pipeline(release)("a red star", steps=2, seed=1).frames
    before = Pipeline(open_release(released))("a red star", steps=2, seed=1, height=SIDE, width=SIDE).frames
    assert made.shape == before.shape == (1, SIDE, SIDE, 3) and not np.array_equal(made, before)
    assert np.abs(made.astype(int) - before).mean() < 20, "two small steps away"


def test_it_begins_as_released(latents, released):
    task = FlowTask(config(latents, released, f"init_from={released}"))
    want = open_release(released).backbone().state_dict()
    assert task._earlier is not None and task._earlier.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(task._earlier[name], value), name


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["mmdit.pooled_width=0"], "mmdit.pooled_width: 0, but .* holds pooled text of width 20; set"),
        (["mmdit.pooled_width=24"], "24, but .* holds pooled text of width 20; set mmdit.pooled_width=20"),
    ],
)
def test_pooled_text_of_another_width_is_refused(latents, released, more, message):
    with pytest.raises(UserError, match=message):
        _ = FlowTask(config(latents, released, *more)).data.latents


def test_another_transformer_is_refused(latents, released):
    with pytest.raises(UserError, match=r"mmdit: .*transformer is another model"):
        FlowTask(config(latents, released, "mmdit.depth=4", f"init_from={released}"))


def test_a_cache_of_texts_is_refused(released, tmp_path):
    said = load(PrecomputeConfig, [*words(released, tmp_path), f"text_cache={tmp_path}"])
    with pytest.raises(UserError, match="cannot be kept"):
        load_encoders(said)


def test_a_release_whose_texts_are_gone_says_so(exported, released, tmp_path):
    target = Path(shutil.copytree(exported, tmp_path / "release"))
    card = (target / "kinoflow.yaml").read_text()
    (target / "kinoflow.yaml").write_text(card.replace(str(released), str(target / "mmdit")))
    with pytest.raises(UserError, match=r"text\.clip_t5: .* has no model_index\.json"):
        Release.load(target).encoder()
