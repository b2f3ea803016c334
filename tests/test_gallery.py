"""README's pictures: what `make gallery` writes, and that the pages show it."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from kinoflow.data.world import caption, sample_scene
from kinoflow.sample.picture import read_frames, read_metadata
from kinoflow.sample.pipeline import Pipeline
from kinoflow.sample.release import Release
from tests.sample.conftest import tiny_release, tiny_release_folder

__all__ = ["tiny_release", "tiny_release_folder"]
DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def gallery():
    spec = importlib.util.spec_from_file_location("gallery", DOCS / "gallery.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_shows_first_seeds_of_fixed_prompts(gallery, tiny_release, tmp_path, capsys):
    asked = ["--out", str(tmp_path), "--weights", str(tiny_release.folder), "--steps", "1"]
    assert gallery.main(asked) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'samples.gif'}\n{tmp_path / 'samples.png'}\n"
    pipeline = Pipeline(tiny_release)
    moving, sheet = read_frames(tmp_path / "samples.gif"), read_frames(tmp_path / "samples.png")[0]
    assert moving.shape == (16, 2 * 36 - 4, 3 * 36 - 4, 3)
    last = pipeline(gallery.PROMPTS[-1], steps=1).frames
    assert np.abs(moving[:, -32:, -32:].astype(int) - last).mean() < 8  # 256 colours
    scene = caption(sample_scene(11, split="heldout"), 11, complete=True)
    assert np.array_equal(sheet[-32:, -32:], pipeline(scene, seed=11, steps=1).frames[-1])
    for path in tmp_path.iterdir():
        assert read_metadata(path) == {"release": "tiny", "weights": tiny_release.weights_hash}


def test_its_prompts_are_words_of_the_shipped_release(gallery):
    known = Release.load().vocabulary
    assert not [advice for advice in map(known.advice, gallery.PROMPTS) if advice]


def test_the_moving_picture_of_the_pages_is_of_the_shipped_weights():
    assert read_metadata(DOCS / "samples.gif")["weights"] == Release.load().weights_hash
