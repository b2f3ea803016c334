"""A folder of odd clips on its whole way: cut, listed, encoded, and one step of both trainings."""

import json
from fractions import Fraction

import numpy as np
import pytest

from kinoflow.data import video
from kinoflow.data.__main__ import main as data
from kinoflow.data.clips import manifest
from kinoflow.data.latents.shards import LatentDataset
from kinoflow.train.tasks import precompute
from tests.data.making import encode, gradient, rgb_frames, variable
from tests.train.tiny import tiny_encoders

TAE = ["model=tae", "tae.channels=32", "tae.multipliers=[1,1]", "tae.strides=[[2,2,2]]",
       "tae.encoder_blocks=[1,1]", "tae.decoder_blocks=[1,1]", "tae.latent_channels=4"]  # fmt: skip
DIT = ["model=dit", "dit.width=16", "dit.depth=1", "dit.heads=2", "dit.ffn=24", "dit.text_widths=[2,3]",
       "dit.latent_channels=2", "dit.max_tokens=[2,2,2]"]  # fmt: skip
ONE_STEP = ["steps=1", "data.batch_size=2", "data.workers=0", "deepspeed.precision=fp32"]


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A variable rate, odd sizes, a rate that is no integer, a turned clip, and three bad ones."""
    folder = tmp_path_factory.mktemp("odd")
    variable(folder / "variable.mp4", [*range(0, 1000, 17), *range(1200, 2600, 40)], 40)
    video.write(folder / "odd sizes.mp4", gradient(60, 45, 67), fps=Fraction(30000, 1001))
    encode(folder / "turned ①.mov", rgb_frames(gradient(60, 48, 64)), "libx264", rotation=90)
    (folder / "turned ①.txt").write_text("A turned clip.", encoding="utf-8")
    video.write(folder / "short.mp4", gradient(5), fps=25)
    video.write(folder / "small.mp4", gradient(60, 16, 64), fps=25)
    (folder / "broken.mp4").write_bytes((folder / "odd sizes.mp4").read_bytes()[:400])
    return folder


@pytest.fixture(scope="module")
def listing(odd, tmp_path_factory):
    """What cutting gives, and a row by hand that is no clip."""
    out = tmp_path_factory.mktemp("cut")
    sources = sorted(str(path) for path in odd.glob("*.m*"))
    assert data(["cut", *sources, str(out), "--side", "32", "--per-minute", "90"]) == 1
    path = out / "manifest.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + '{"path": "a\\u0000.mp4"}\n', encoding="utf-8")
    return path


def test_the_good_clips_are_cut_and_the_others_named(odd, tmp_path, capsys):
    sources = sorted(str(path) for path in odd.glob("*.m*"))
    arguments = ["cut", *sources, str(tmp_path), "--side", "32", "--per-minute", "90", "--json"]
    assert data(arguments) == 1
    figures = json.loads(capsys.readouterr().out)
    named = [line.partition(":")[0].rpartition("/")[2] for line in figures["bad"]]
    assert named == ["broken.mp4", "short.mp4", "small.mp4"]
    entries = manifest.read(tmp_path / "manifest.jsonl").entries
    assert {entry.extra["source"] for entry in entries} == {"variable.mp4", "odd sizes.mp4", "turned ①.mov"}
    assert {entry.caption for entry in entries} == {"", "A turned clip."}
    assert data(["check", str(tmp_path / "manifest.jsonl"), "--decode"]) == 0


def test_an_autoencoder_trains_on_them(listing, start_job, tmp_path):
    sources = [*TAE, *ONE_STEP, "data.buckets=['16x32x32@16','1x32x32@16']", f"data.manifest={listing}"]
    job = start_job("command", [*sources, f"run={tmp_path}"])
    assert job.wait() == [0], job.text()
    assert "1 of 12 rows are bad and left out; the first is row 12: path: 'a\\x00.mp4' has a" in job.text()
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert np.isfinite(json.loads(line)["loss"])


def test_a_transformer_trains_on_their_latents(listing, start_job, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(precompute, "load_encoders", lambda _: tiny_encoders())
    sources = [f"source={listing}", f"release={tmp_path}", "buckets=[16x16x16@16,1x16x16@16]"]
    assert precompute.main([*sources, f"out={tmp_path / 'latents'}"]) == 0
    assert "1 of 12 rows are bad" in capsys.readouterr().err
    latents = LatentDataset(tmp_path / "latents")
    assert [latents.num_clips(name) for name in latents.buckets] == [11, 11]
    job = start_job(
        "command", [*DIT, *ONE_STEP, f"data.latents={tmp_path / 'latents'}", f"run={tmp_path / 'run'}"]
    )
    assert job.wait() == [0], job.text()
    (line,) = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert np.isfinite(json.loads(line)["loss"])
