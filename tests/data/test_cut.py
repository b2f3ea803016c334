"""Windows of footage and of pictures: where they lie, what they hold, and what is refused."""

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from kinoflow.configs.errors import UserError
from kinoflow.data import video
from kinoflow.data.__main__ import main
from kinoflow.data.clips import manifest
from kinoflow.data.clips.cut import CutConfig, cut, windows

CONFIG = CutConfig(frames=8, side=32, per_minute=600.0, per_picture=3)


def footage(path, frames=40):
    """Frame i has the grey level 5 i on the left and 255 - 5 i on the right."""
    clip = np.empty((frames, 64, 96, 3), np.uint8)
    clip[:, :, :48] = (5 * np.arange(frames))[:, None, None, None]
    clip[:, :, 48:] = (255 - 5 * np.arange(frames))[:, None, None, None]
    video.write(path, clip, fps=Fraction(24), crf=1)
    return path


def test_windows_lie_inside_and_come_in_order():
    found = windows(CONFIG, frames=240, height=64, width=96, fps=Fraction(24))
    assert len(found) == 100
    assert [w.start for w in found] == sorted(w.start for w in found)
    assert all(w.start + 8 <= 240 and w.top + w.size <= 64 and w.left + w.size <= 96 for w in found)
    assert {w.size for w in found} - {32}, "some windows are larger than the clips"
    assert windows(CONFIG, frames=7, height=64, width=96, fps=Fraction(24)) == []


def test_clips_hold_the_windows(tmp_path):
    source = footage(tmp_path / "a.mp4")
    entries = list(cut(source, tmp_path, CONFIG))
    expected = windows(CONFIG, frames=40, height=64, width=96, fps=Fraction(24))
    assert len(entries) == len(expected) > 3
    for entry, window in zip(entries, expected, strict=True):
        clip = video.read(tmp_path / entry.path)
        assert clip.shape == (8, 32, 32, 3)
        level = 5 * (window.start + np.arange(8))
        if window.left + window.size <= 48:
            assert np.abs(clip.mean(axis=(1, 2, 3)) - level).max() < 4
        elif window.left >= 48:
            assert np.abs(clip.mean(axis=(1, 2, 3)) - (255 - level)).max() < 4


def test_a_picture_drifts(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    Image.fromarray(noise).resize((192, 144), Image.Resampling.BICUBIC).save(tmp_path / "a.png")
    entries = list(cut(tmp_path / "a.png", tmp_path, CONFIG))
    assert [entry.fps for entry in entries] == [Fraction(24)] * 3
    clip = video.read(tmp_path / entries[0].path).astype(float)
    steps = np.abs(np.diff(clip, axis=0)).mean(axis=(1, 2, 3))
    assert (steps > 0.5).all(), "every frame moves"
    assert np.abs(clip[-1] - clip[0]).mean() > 2 * steps.mean(), "and moves on"


def test_the_same_seed_gives_the_same_clips(tmp_path):
    source = footage(tmp_path / "a.mp4")
    first, second = (
        [video.read(tmp_path / name / e.path) for e in cut(source, tmp_path / name, CONFIG)] for name in "ab"
    )
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_command_lists_what_was_cut_and_what_could_not_be(tmp_path, capsys):
    good, bad = footage(tmp_path / "good.mp4"), tmp_path / "bad.mp4"
    bad.write_bytes(b"no clip")
    out = tmp_path / "out"
    arguments = [
        "cut",
        str(good),
        str(bad),
        str(out),
        "--frames",
        "8",
        "--side",
        "32",
        "--fps",
        "16",
        "--json",
    ]
    assert main(arguments) == 1
    assert "bad.mp4" in capsys.readouterr().err
    entries = manifest.read(out / "manifest.jsonl").entries
    assert len(entries) == 8
    assert {entry.fps for entry in entries} == {Fraction(16)}
    assert video.probe(out / entries[0].path).fps == 16


def test_what_makes_no_sense_is_refused(tmp_path):
    with pytest.raises(UserError, match="--side"):
        windows(CONFIG, frames=40, height=16, width=96, fps=Fraction(24))
    for wrong in ({"frames": 0}, {"side": 33}, {"per_minute": 0.0}):
        with pytest.raises(UserError, match=f"--{next(iter(wrong)).replace('_', '-')}"):
            CutConfig(**wrong)


def test_two_sources_of_one_name_are_refused(tmp_path, capsys):
    assert main(["cut", "a/x.mp4", "b/x.mp4", str(tmp_path / "out")]) == 2
    assert "x: two sources" in capsys.readouterr().err
