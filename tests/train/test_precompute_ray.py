"""From raw video to latents on a Ray cluster by one command: the shards are those of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kinoflow.train.tasks import precompute
from tests.data.making import real_clip
from tests.train.tiny import BUCKET, write_release

pytest.importorskip("cv2")
pytest.importorskip("ray")
pytestmark = pytest.mark.slow  # a node that starts on busy cores may be given up by Ray
ROOT = Path(__file__).parents[2]
KEYS = ["scan.text=none", "select.shake=null", "select.sharpness=null", "select.motion=null"]


def run(*words: str, cwd: Path) -> tuple[int, str]:
    """Status, and all that is said."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    done = subprocess.run(
        [sys.executable, "-m", "kinoflow", *words], cwd=cwd, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_actors_make_the_same_shards(tmp_path: Path) -> None:
    """Paths are those of the folder in which the command is given."""
    (tmp_path / "videos").mkdir()
    for name in ("bikes.mp4", "bigbuckbunny.mp4"):
        (tmp_path / "videos" / name).symlink_to(real_clip(name))
    write_release(tmp_path / "release")
    latents = [f"buckets=[{BUCKET},1x16x16@16]", "shard_size=2", "workers=0", "threads=1"]
    status, said = run("data", "curate", "videos", "out", "--ray", "local", "--workers", "2", "--latents",
                       "release=release", "out=actors", "actors=2", *latents,
                       "--config", *KEYS, cwd=tmp_path)  # fmt: skip
    assert status == 0 and "shards to make" in said, said
    listing = "out/manifest.jsonl"
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        assert precompute.main([f"source={listing}", "release=release", "out=alone", *latents]) == 0
    finally:
        os.chdir(before)
    alone, actors = files(tmp_path / "alone"), files(tmp_path / "actors")
    assert len(alone) > 10 and actors == alone


def test_what_an_actor_cannot_open_is_told_in_one_line(tmp_path: Path) -> None:
    words = ["source=world", "clips=2", f"buckets=[{BUCKET}]", "out=latents", "release=gone", "ray=local"]
    status, said = run("train", "precompute", *words, cwd=tmp_path)
    assert status == 2 and "gone" in said and said.strip().count("\n") == 0, said
