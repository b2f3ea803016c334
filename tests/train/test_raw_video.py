"""From raw video to models in training: one command makes latent shards, two others take fifty steps each."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kinoflow.data import video
from kinoflow.data.__main__ import main
from kinoflow.data.clips import manifest
from kinoflow.data.latents.shards import LatentDataset
from tests.data.making import real_clip
from tests.train.tiny import BUCKET, DIT, write_release

pytest.importorskip("cv2")
pytest.importorskip("deepspeed")
ROOT, STEPS = Path(__file__).parents[2], 50
KEYS = ["scan.text=none", "select.shake=null", "select.sharpness=null", "select.motion=null"]
TAE = (
    "model=tae", "tae.channels=32", "tae.multipliers=[1,1]", "tae.strides=[[2,2,2]]",
    "tae.encoder_blocks=[1,1]", "tae.decoder_blocks=[1,1]", "tae.latent_channels=4",
    "loss.adversarial=0", "loss.perceptual=0", "data.buckets=['4x16x16@16']", "data.world_share=0",
)  # fmt: skip
RUN = (f"steps={STEPS}", "data.batch_size=2", "data.workers=0", "log_every=1", "checkpoint_every=50",
       "preview_every=0", "threads=1")  # fmt: skip


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a raw video of six shots, what was curated of it, its latents and its cut files."""
    desk = tmp_path_factory.mktemp("desk")
    (desk / "videos").mkdir()
    (desk / "videos" / "street.mp4").symlink_to(real_clip("bikes.mp4"))
    (desk / "videos" / "street.txt").write_text('a street, "TAXI" on a car\n', encoding="utf-8")
    release = write_release(desk / "release")
    latents = [f"out={desk / 'latents'}", f"release={release}", f"buckets=[{BUCKET}]", "workers=0"]
    words = ["curate", str(desk / "videos"), str(desk / "out"), "--workers", "0", "--config", *KEYS]
    assert main([*words, "--cut", str(desk / "files"), "--latents", *latents]) == 0
    return desk


def kept(desk: Path) -> list[manifest.ClipEntry]:
    return manifest.read(desk / "out" / "manifest.jsonl").entries


def test_one_command_makes_the_shards(desk: Path) -> None:
    assert len(kept(desk)) == 5, "six shots, of which one lasts 8 frames"
    assert LatentDataset(desk / "latents").num_clips(BUCKET) == 5


def test_the_files_are_the_shots(desk: Path) -> None:
    files = manifest.read(desk / "files" / "manifest.jsonl")
    assert list(manifest.check(files, decode=True)) == [None] * 5
    for entry, shot in zip(files.entries, kept(desk), strict=True):
        assert video.probe(desk / "files" / entry.path).frames == entry.frames == shot.frames
        assert (entry.first_frame, entry.caption) == (None, shot.caption)


@pytest.fixture(scope="module")
def trained(desk: Path) -> Path:
    """The folder in which both were trained."""
    data = {"tae": [*TAE, f"data.manifest={desk / 'out' / 'manifest.jsonl'}"],
            "dit": [*DIT, f"data.latents={desk / 'latents'}", f"data.buckets=[{BUCKET}]"]}  # fmt: skip
    lines = [["train", *words, *RUN, f"run={desk / model}"] for model, words in data.items()]
    (desk / "words").write_text("".join("\0".join(line) + "\0\n" for line in lines), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.forked", str(desk / "words")], cwd=desk, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return desk


@pytest.mark.parametrize("model", ["tae", "dit"])
def test_it_trains(model: str, trained: Path) -> None:
    lines = (trained / model / "log.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    assert len(losses) == STEPS and all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-10:]) < sum(losses[:10])
