"""Everything of a kind that the installed FFmpeg can write: sound codecs, pixel formats, colour tags."""

import functools
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
import pytest

from kinoflow.configs.errors import UserError
from kinoflow.data import video
from kinoflow.data.video import VideoWriter
from kinoflow.data.video.audio import sound
from kinoflow.data.video.soundtrack import extract
from tests.data.making import encode, gradient, onsets, planes, rgb_frames, to_rgb, tone

pytestmark = pytest.mark.slow

CONTAINERS = ("mkv", "mov", "mp4", "avi", "nut", "ts", "wmv", "mxf", "flv", "webm", "ogv", "3gp")
RATES = (48000, 44100, 32000, 22050, 16000, 8000)
BEEPS = [0.3, 0.8, 1.3]


def encoders(kind: str) -> list[str]:
    found = []
    for name in sorted(av.codecs_available):
        try:
            codec = av.Codec(name, "w")
        except (ValueError, av.error.FFmpegError):
            continue
        if codec.type == kind:
            found.append(name)
    return found


@functools.cache
def still_frames() -> list[av.VideoFrame]:
    return rgb_frames(gradient(50))


def recorded(path: Path, codec: str) -> Path | None:
    """Two seconds with beeps in a codec, at the first rate and layout that it takes; None without one."""
    picture = {"webm": "libvpx", "flv": "flv", "wmv": "wmv2", "ogv": "libvpx", "3gp": "h263"}
    for rate in RATES:
        for layout in ("mono", "stereo"):
            try:
                _record(path, codec, picture.get(path.suffix[1:], "mpeg4"), rate, layout)
            except (av.error.FFmpegError, ValueError, TypeError, RuntimeError):
                path.unlink(missing_ok=True)
                continue
            if path.stat().st_size:
                return path
    return None


def _record(path: Path, codec: str, picture: str, rate: int, layout: str) -> None:
    size = (176, 144) if picture == "h263" else (64, 48)
    with av.open(str(path), "w", options={"strict": "-2"}) as container:
        stream: Any = container.add_stream(picture, rate=25)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        track: Any = container.add_stream(codec, rate=rate, layout=layout, options={"strict": "-2"})
        form = track.codec_context.codec.audio_formats
        track.format = form[0].name if form else "s16"
        samples = np.stack([tone(2 * rate, rate, BEEPS)] * (1 if layout == "mono" else 2))
        heard = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
        heard.sample_rate, heard.pts = rate, 0
        for index, shown in enumerate(still_frames()):
            frame = shown.reformat(*size)
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        resampler = av.AudioResampler(
            format=track.format.name,
            layout=layout,
            rate=rate,
            frame_size=track.codec_context.frame_size or 1024,
        )
        for part in [*resampler.resample(heard), *resampler.resample(None)]:
            container.mux(track.encode(part))
        container.mux(track.encode(None))


def contradicts_itself(path: Path) -> bool:
    """Whether FFmpeg wrote stamps that its own samples disprove, as of FLAC in ASF; AVI has none to write."""
    with av.open(str(path)) as container:
        seconds = 0.0
        for frame in container.decode(audio=0):
            if frame.time is not None and abs(frame.time - seconds) > 0.3:
                return path.suffix != ".avi"
            seconds += frame.samples / frame.sample_rate
    return False


def plays(path: Path) -> bool:
    """Whether a plain decode hears the beeps: some codecs can't carry them, some containers lose them."""
    try:
        return onsets(path)[-len(BEEPS) :] == pytest.approx(BEEPS, abs=0.06)
    except (av.error.FFmpegError, ValueError, IndexError, StopIteration):
        return False


@pytest.mark.parametrize("codec", encoders("audio"))
def test_every_sound_in_every_container(tmp_path, codec):
    tried = 0
    for suffix in CONTAINERS:
        source = recorded(tmp_path / f"a.{suffix}", codec)
        if source is None or not plays(source) or contradicts_itself(source):
            continue
        tried += 1
        info = extract(source, tmp_path / "sound", video.origin(source))
        assert info is not None, suffix
        frames = np.zeros((50, 48, 64, 3), np.uint8)
        with (
            sound(tmp_path / "sound", origin=info.origin, start=Fraction(0), end=Fraction(2)) as heard,
            VideoWriter(tmp_path / "out.mp4", fps=25, width=64, height=48, sound=heard) as writer,
        ):
            writer.write(frames)
        assert onsets(tmp_path / "out.mp4")[-len(BEEPS) :] == pytest.approx(BEEPS, abs=0.07), suffix
    if not tried:
        pytest.skip("no container of this FFmpeg gives this sound back")


def flat_planes(pixel_format: str, gray: int) -> av.VideoFrame | None:
    frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), gray, np.uint8), format="rgb24")
    try:
        return frame.reformat(format=pixel_format, dst_color_range=1, dst_colorspace=5)
    except (av.error.FFmpegError, ValueError):
        return None


@pytest.mark.parametrize(
    ("codec", "name"),
    [
        (codec, form.name)
        for codec in ("ffv1", "png", "rawvideo", "libx264", "libx265", "tiff", "huffyuv", "prores_ks", "exr")
        if codec in av.codecs_available
        for form in (av.Codec(codec, "w").video_formats or [])
    ],
)
def test_every_pixel_format(tmp_path, codec, name):
    """Grey stays grey and keeps its level, whatever holds it."""
    frame = flat_planes(name, 150)
    if frame is None:
        pytest.skip("swscale does not write it")
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    container = "nut" if codec == "rawvideo" else "mkv"
    if codec in {"exr", "tiff", "png"}:
        container = codec
    try:
        said = {"color_range": 2 if name.startswith("gray") else 1}  # swscale writes grey in full range
        path = encode(tmp_path / f"a.{container}", [frame], codec, options=options, **said)
    except (av.error.FFmpegError, ValueError):
        pytest.skip("this FFmpeg does not write it")
    try:
        shown = video.read(path)
    except UserError as error:
        assert "not undone here" in str(error)
        return
    depth = min(component.bits for component in frame.format.components)
    expected = 150.0
    if codec == "exr":  # linear light
        expected = 255 * (1.055 * (150 / 255) ** (1 / 2.4) - 0.055)
    if depth == 1:  # dots
        assert np.abs(shown.mean() - expected) < 10
    else:
        assert np.abs(shown.astype(float) - expected).max() <= (4 if depth >= 8 else 256 / 2**depth)


@pytest.mark.parametrize("matrix", range(18))
@pytest.mark.parametrize("transfer", range(1, 19))
def test_every_matrix_and_transfer(tmp_path, matrix, transfer):
    """Undone by the formula of its standard, or refused in one line."""
    color = (145, 90, 180)
    frame = planes((48, 64, "yuv444p"), color)
    settings = {"colorspace": matrix, "color_range": 1, "color_trc": transfer}
    path = encode(tmp_path / "a.mkv", [frame], "ffv1", **settings)
    refused = matrix in {10, 11, 12, 13, 14, 15, 16, 17} or transfer in {9, 10, 17}
    with av.open(str(path)) as container:
        stored = next(container.decode(video=0))
    if (stored.colorspace, stored.color_trc) != (matrix, transfer):
        pytest.skip("this FFmpeg does not keep the tag")
    if refused:
        with pytest.raises(UserError, match="not undone here"):
            video.read(path)
        return
    if matrix == 8:
        luma, green, orange = ((145 - 16) / 219, (90 - 128) / 224, (180 - 128) / 224)
        expected = np.array([luma - green + orange, luma + green, luma - green - orange]) * 255
    else:
        names = {1: "bt709", 4: "fcc", 7: "smpte240m", 9: "bt2020"}
        expected = to_rgb(color, names.get(matrix, "bt601"), False, 8)
    if transfer == 8:
        light = np.clip(expected / 255, 0, 1)
        expected = 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    assert np.abs(video.read(path)[0, 20, 20] - np.clip(expected, 0, 255)).max() <= 2.5
