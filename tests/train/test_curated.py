"""What the data engine lists is trained on as it is: latents of pieces of videos, and steps on the clips."""

from pathlib import Path

import numpy as np
import pytest

from kinoflow.configs.schema import load
from kinoflow.data import video
from kinoflow.data.__main__ import main
from kinoflow.data.clips import manifest
from kinoflow.data.clips.fit import fit
from kinoflow.data.latents.shards import LatentDataset
from kinoflow.train.run.config import DataConfig
from kinoflow.train.tasks.clips import ClipSource
from kinoflow.train.tasks.precompute import PrecomputeConfig, precompute
from tests.data.engine.planting import shot
from tests.train.tiny import BUCKET, tiny_encoders

pytest.importorskip("cv2")


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shots in one video, the second begins at frame 50."""
    folder = tmp_path_factory.mktemp("raw")
    both = np.concatenate([shot("street"), shot("rabbit")])
    video.write(folder / "a.mp4", both, fps=25)
    out = folder / "curated"
    words = ["curate", str(folder / "a.mp4"), str(out), "--workers", "0", "--config", "scan.text=none"]
    assert main([*words, "select.shake=:8", "select.sharpness=null"]) == 0
    assert [entry.piece for entry in manifest.read(out / "manifest.jsonl").entries] == [
        range(50),
        range(50, 110),
    ]
    return out / "manifest.jsonl"


def test_latents_are_made_of_the_pieces(curated: Path, tmp_path: Path) -> None:
    keys = [f"source={curated}", f"out={tmp_path}", f"buckets=[{BUCKET}]", "release=unused", "workers=0"]
    precompute(load(PrecomputeConfig, keys), tiny_encoders())
    assert LatentDataset(tmp_path).num_clips(BUCKET) == 2


def test_steps_see_one_shot_at_a_time(curated: Path, tmp_path: Path) -> None:
    config = DataConfig(buckets=("16x16x28@25",), batch_size=2, manifest=(str(curated),), workers=0)
    source = ClipSource(config, 0, tmp_path / "quarantine.jsonl")
    whole = fit(video.read(curated.parent.parent / "a.mp4"), 16, 28)
    for step in range(4):
        for clip in source.batch(step, 0, 1):
            frames = ((clip.permute(1, 2, 3, 0) + 1) * 127.5).numpy()
            first = int(np.argmin(np.abs(whole - frames[0]).mean((1, 2, 3))))
            np.testing.assert_allclose(frames, whole[first : first + 16], atol=1)
            assert first + 16 <= 50 or first >= 50
