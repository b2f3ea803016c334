"""Small pictures of frames: those of the stream, averaged, in any pieces."""

import numpy as np
import pytest

from kinoflow.configs.errors import UserError
from kinoflow.data import video
from tests.data.making import encode, gradient, real_clip, rgb_frames
from tests.data.test_kinds import of_two_sizes


def small(path, span, side=64, detail=128, every=5):
    return list(video.thumbnails(path, span, side=side, detail=detail, every=every))


@pytest.fixture(scope="module")
def bikes():
    return real_clip("bikes.mp4")


def test_they_are_the_frames_averaged(bikes):
    found = small(bikes, range(20, 32))
    assert [each.index for each in found] == list(range(20, 32))
    assert [each.index for each in found if each.large is not None] == [20, 25, 30]
    assert {each.small.shape for each in found} == {(27, 64, 3)}
    for each, frame in zip(found, video.read(bikes, 20, 32), strict=True):
        # 640x272 in blocks of 10x10; 272 / 27 is nearly 10.
        want = frame[:270].reshape(27, 10, 64, 10, 3).mean((1, 3))
        assert np.abs(each.small - want).mean() < 3
        if each.large is not None:
            assert each.large.shape == (54, 128, 3)


def test_every_pixel_counts(tmp_path):
    """Of grey noise, a pixel for each 5x5 is their mean: a fifth of the deviation is left."""
    noise = np.random.default_rng(1).integers(0, 256, (1, 120, 160, 1), np.uint8).repeat(3, axis=3)
    video.write(tmp_path / "a.mp4", noise, fps=25, crf=1)
    (found,) = small(tmp_path / "a.mp4", range(1), side=32)
    want = video.read(tmp_path / "a.mp4")[0].reshape(24, 5, 32, 5, 3).mean((1, 3))
    assert 10 < want.std() < 20
    assert np.abs(found.small - want).max() < 6


def test_pieces_make_the_whole(bikes):
    whole = small(bikes, range(250))
    parts = small(bikes, range(101)) + small(bikes, range(101, 102)) + small(bikes, range(102, 250))
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(one.small, other.small)
        assert (one.large is None) == (other.large is None)


def test_they_are_upright_and_never_larger_than_the_clip(tmp_path):
    path = encode(tmp_path / "a.mp4", rgb_frames(gradient(3)), "libx264", rotation=90)
    (first, *_) = small(path, range(3), side=32)
    assert first.small.shape == (32, 24, 3) and first.large.shape == (64, 48, 3)
    want = video.read(path)[0].reshape(32, 2, 24, 2, 3).mean((1, 3))
    assert np.abs(first.small - want).max() < 6


def test_damage_and_another_shape_end_them(tmp_path):
    path = of_two_sizes(tmp_path / "a.webm", (96, 64), (32, 64))
    with pytest.raises(UserError, match="frame 5 has 32x64 pixels"):
        small(path, range(8))
    clip = np.random.default_rng(0).integers(0, 256, (60, 48, 64, 3), np.uint8)
    video.write(tmp_path / "b.mp4", clip, fps=25)
    data = (tmp_path / "b.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(UserError, match=r"b\.mp4: frame \d+ does not decode"):
        small(tmp_path / "b.mp4", range(60))
    with pytest.raises(UserError, match="choose a range inside"):
        small(tmp_path / "b.mp4", range(50, 61))
