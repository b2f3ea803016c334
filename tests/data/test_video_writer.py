"""What is written: exact rates, true colours, the same bytes every time, and nothing half done."""

import errno
import os
import resource
from fractions import Fraction

import av
import numpy as np
import pytest

from kinoflow.configs.errors import UserError
from kinoflow.data import video
from kinoflow.data.video import VideoWriter
from tests.data.making import NTSC, gradient, to_rgb


def flat(color: tuple[int, int, int], height: int = 48, width: int = 64) -> np.ndarray:
    return np.full((1, height, width, 3), color, np.uint8)


@pytest.mark.parametrize(
    "color",
    [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 30, 120), (17, 99, 240)],
)
def test_written_pixels_really_are_bt709(tmp_path, color):
    """The YCbCr in the file gives the colour by the BT.709 formulas, not only by way of our reader."""
    path = tmp_path / "a.mp4"
    video.write(path, flat(color), fps=Fraction(25), crf=1)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    assert frame.format.name == "yuv420p"
    values = tuple(
        int(np.frombuffer(memoryview(plane), np.uint8)[plane.line_size * 10 + 10]) for plane in frame.planes
    )
    assert np.abs(to_rgb(values, "bt709", False, 8) - color).max() <= 3
    assert np.abs(video.read(path)[0, 20, 20].astype(int) - color).max() <= 3
    tags = video.probe(path).color
    assert (tags.matrix, tags.range, tags.primaries, tags.transfer) == ("bt709", "limited", "bt709", "bt709")


@pytest.mark.parametrize(
    "fps", [NTSC, Fraction(24000, 1001), Fraction(16), Fraction(25), Fraction(1, 2), Fraction(60)]
)
@pytest.mark.parametrize("frames", [1, 2, 7])
def test_rate_stays_exact(tmp_path, fps, frames):
    video.write(tmp_path / "a.mp4", gradient(frames), fps=fps)
    info = video.probe(tmp_path / "a.mp4")
    assert (info.fps, info.frames, info.duration) == (fps, frames, frames / fps)
    assert not info.variable_frame_rate


def test_written_file_is_what_players_want(tmp_path):
    video.write(tmp_path / "a.mp4", gradient(5), fps=NTSC)
    info = video.probe(tmp_path / "a.mp4")
    assert (info.codec, info.pixel_format, info.bit_depth, info.rotation) == ("h264", "yuv420p", 8, 0)
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # faststart


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5), (47, 64), (48, 63), (49, 65), (2, 2)])
def test_odd_sizes_come_back(tmp_path, height, width):
    clip = gradient(3, height, width)[..., :1].repeat(3, axis=3)  # grey: colour has half the resolution
    video.write(tmp_path / "a.mp4", clip, fps=NTSC, crf=1)
    shown = video.read(tmp_path / "a.mp4")
    assert shown.shape == clip.shape
    assert np.abs(shown.astype(int) - clip).mean() < 4
    with av.open(str(tmp_path / "a.mp4")) as container:
        stored = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert stored.shape[:2] == (height + height % 2, width + width % 2)
    if width % 2:
        assert np.abs(stored[:, -1].astype(int) - stored[:, -2]).mean() < 4  # repeated, not black


@pytest.mark.parametrize(("height", "width"), [(48, 64), (128, 128), (37, 50)])
def test_same_frames_same_bytes(tmp_path, height, width):
    """However they are handed over, and however often; encoder threads and vector code must not show."""
    clip, files = gradient(40, height, width), set()
    for size in (1, 7, 40, 40, 40):
        path = tmp_path / "a.mp4"
        with VideoWriter(path, fps=NTSC, width=width, height=height, metadata={"seed": "1"}) as writer:
            for start in range(0, 40, size):
                writer.write(clip[start : start + size])
        files.add(path.read_bytes())
    assert len(files) == 1


def test_lower_crf_is_closer_and_larger(tmp_path):
    clip = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 1), np.uint8).repeat(3, axis=3)
    errors, sizes = [], []
    for crf in (0, 20, 45):
        video.write(tmp_path / "a.mp4", clip, fps=NTSC, crf=crf)
        errors.append(np.abs(video.read(tmp_path / "a.mp4").astype(int) - clip).mean())
        sizes.append((tmp_path / "a.mp4").stat().st_size)
    assert errors == sorted(errors)
    assert sizes == sorted(sizes, reverse=True)


def test_metadata_survives(tmp_path):
    metadata = {"title": "a ★", "comment": "two\nlines", "seed": "7", "prompt": "long " * 2000}
    video.write(tmp_path / "a.mp4", gradient(1), fps=NTSC, metadata=metadata)
    found = video.probe(tmp_path / "a.mp4").metadata
    assert {key: found.get(key) for key in metadata} == metadata


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fps", Fraction(0)),
        ("fps", Fraction(1_000_001)),
        ("crf", 52),
        ("crf", -1),
        ("width", 0),
        ("height", 20000),
    ],
)
def test_writer_names_the_wrong_argument(tmp_path, key, value):
    arguments = {"fps": NTSC, "width": 64, "height": 48, key: value}
    with pytest.raises(UserError, match=key if key in {"fps", "crf"} else "size"):
        VideoWriter(tmp_path / "a.mp4", **arguments)


def test_writer_refuses_what_it_cannot_write(tmp_path):
    with pytest.raises(UserError, match=r"end the name in \.mp4"):
        video.write(tmp_path / "a.gif", gradient(1), fps=NTSC)
    with pytest.raises(UserError, match="NUL"):
        video.write(tmp_path / "a.mp4", gradient(1), fps=NTSC, metadata={"a": "b\0"})
    with pytest.raises(UserError, match="no frames"):
        video.write(tmp_path / "a.mp4", gradient(0), fps=NTSC)
    with (
        pytest.raises(UserError, match=r"\(frames, 48, 60, 3\)"),
        VideoWriter(tmp_path / "a.mp4", fps=NTSC, width=60, height=48) as writer,
    ):
        writer.write(gradient(1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", [RuntimeError("mine"), KeyboardInterrupt()])
def test_failure_leaves_the_old_file_and_nothing_else(tmp_path, fault):
    path = tmp_path / "a.mp4"
    video.write(path, gradient(3), fps=NTSC)
    before = path.read_bytes()
    with pytest.raises(type(fault)), VideoWriter(path, fps=NTSC, width=64, height=48) as writer:
        writer.write(gradient(100))
        assert len(list(tmp_path.iterdir())) == 2  # the hidden one
        raise fault
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_file_that_cannot_grow(tmp_path):
    """A real failing write below FFmpeg: the process may not make files larger than 4 KiB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = np.random.default_rng(0).integers(0, 256, (60, 64, 64, 3), np.uint8)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(UserError, match=r"a\.mp4: the file would exceed the size limit"):
            video.write(tmp_path / "a.mp4", noise, fps=NTSC)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_full_disk(tmp_path, monkeypatch):
    def full(self, packets):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = VideoWriter(tmp_path / "a.mp4", fps=NTSC, width=64, height=48)
    monkeypatch.setattr(VideoWriter, "_encodable", full)
    with pytest.raises(UserError, match=r"a\.mp4: the disk is full; free some space"), writer:
        writer.write(gradient(2))
    assert list(tmp_path.iterdir()) == []


def test_output_that_is_a_folder_or_below_a_file(tmp_path):
    (tmp_path / "a.mp4").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        video.write(tmp_path / "a.mp4", gradient(1), fps=NTSC)
    (tmp_path / "b").write_text("x")
    with pytest.raises(UserError, match=str(tmp_path / "b")):
        video.write(tmp_path / "b" / "c.mp4", gradient(1), fps=NTSC)
    video.write(tmp_path / "new" / "folder" / "c.mp4", gradient(1), fps=NTSC)
