"""A piece of a clip as a file shows the frames of the piece; its packets are copied where that can be."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from kinoflow.data import video
from tests.data.making import gradient, real_clip, variable


def encoded(path: Path, **options: str) -> Path:
    """40 frames of which every tenth is a keyframe."""
    with av.open(str(path), "w") as container:
        track = container.add_stream("libx264", rate=25, options={"g": "10", "sc_threshold": "0", **options})
        track.width, track.height, track.pix_fmt = 64, 48, "yuv420p"
        for picture in gradient(40):
            container.mux(track.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(track.encode(None))
    return path


@pytest.mark.parametrize(
    ("span", "copied"),
    [(range(10, 30), True), (range(40), True), (range(11, 30), False), (range(10, 25), True)],
)
def test_packets_are_copied_from_keyframes(span: range, copied: bool, tmp_path: Path) -> None:
    clip = encoded(tmp_path / "a.mp4", bf="0")
    assert video.extract(clip, span, tmp_path / "b.mp4") is copied
    wanted, found = video.read(clip, span.start, span.stop), video.read(tmp_path / "b.mp4")
    assert video.probe(tmp_path / "b.mp4").fps == 25
    if copied:
        np.testing.assert_array_equal(found, wanted)
    else:
        assert np.abs(found.astype(int) - wanted).mean() < 2


def test_what_builds_on_later_frames_is_encoded_again(tmp_path: Path) -> None:
    """A B-frame before the end needs a frame behind it; an open group begins with what is before it."""
    clip = encoded(tmp_path / "a.mp4", bf="3", **{"b-adapt": "0", "x264-params": "open-gop=0"})
    kinds = {end: video.extract(clip, range(10, end), tmp_path / f"{end}.mp4") for end in range(20, 31)}
    assert True in kinds.values() and False in kinds.values()
    for end in kinds:
        found = video.read(tmp_path / f"{end}.mp4")
        assert found.shape[0] == end - 10
        assert np.abs(found.astype(int) - video.read(clip, 10, end)).mean() < 2


def test_real_footage_and_uneven_times(tmp_path: Path) -> None:
    for start in (0, 76, 137):
        video.extract(real_clip("bikes.mp4"), range(start, start + 20), tmp_path / "a.mp4")
        wanted = video.read(real_clip("bikes.mp4"), start, start + 20)
        assert np.abs(video.read(tmp_path / "a.mp4").astype(int) - wanted).mean() < 3
    clip = variable(tmp_path / "v.mp4", [0, 40, 100, 300, 340, 420], 80)
    video.extract(clip, range(2, 5), tmp_path / "w.mp4")
    times = video.presentation(tmp_path / "w.mp4")
    assert times is not None
    assert [times.time_of(at) for at in range(3)] == [0, Fraction(1, 5), Fraction(6, 25)]
