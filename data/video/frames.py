"""A folder of pictures as a clip: one frame a picture, in the order of their names, numbers by value."""

import re
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from kinoflow.configs.errors import UserError, os_error_line
from kinoflow.data.video import reader
from kinoflow.data.video.info import VideoInfo

PICTURES = frozenset({
    ".avif", ".bmp", ".exr", ".jpeg", ".jpg", ".jp2", ".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff",
    ".webp",
})  # fmt: skip


def pictures(folder: Path) -> list[Path]:
    """The pictures of a folder, frame2 before frame10; hidden files and folders below it do not count.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        files = [file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")]
    except OSError as error:
        raise UserError(os_error_line(folder, error)) from error
    return sorted((file for file in files if file.suffix.lower() in PICTURES), key=_natural)


def probe(folder: Path, fps: Fraction) -> VideoInfo:
    """What the clip is: facts of the first picture, and as many frames as there are pictures.

    Raises:
        UserError: no picture in the folder, or a first one that does not decode.
    """
    files = pictures(folder)
    if not files:
        raise UserError(f"{folder}: holds no picture; give a clip, or a folder of PNG or JPEG frames")
    first = reader.probe(files[0])
    return replace(
        first, path=folder, frames=len(files), fps=fps, duration=len(files) / fps, audio=False, metadata={}
    )


def stream(folder: Path, chunk: int) -> Iterator[UInt8[np.ndarray, "frames height width 3"]]:
    """All frames in arrays of `chunk` frames (the last may be shorter).

    Raises:
        UserError: a picture that does not decode, or of another size than the first, when it is reached.
    """
    files = pictures(folder)
    first = reader.probe(files[0])
    for start in range(0, len(files), chunk):
        shown = []
        for file in files[start : start + chunk]:
            picture = reader.read(file, 0, 1)[0]
            if picture.shape[:2] != (first.height, first.width):
                raise UserError(
                    f"{file}: has {picture.shape[1]}x{picture.shape[0]} pixels, {files[0].name} has "
                    f"{first.width}x{first.height}; a clip has frames of one size"
                )
            shown.append(picture)
        yield np.stack(shown)


def _natural(file: Path) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", file.name)
    return [(1, int(part), part) if part.isdecimal() else (0, 0, part) for part in parts]
