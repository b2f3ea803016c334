"""Clips and frames as pictures: PNG of a frame, contact sheet of a clip, GIF and WebP that move.

All of them hold the clip's metadata, which `read_metadata` gives back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from kinoflow.configs.errors import UserError, one_line, os_error_line
from kinoflow.configs.files import replacing
from kinoflow.data.video import contact_sheet

SUFFIXES = (".png", ".gif", ".webp")
_SHEET_FRAMES = 8
_TICKS = {".gif": 10, ".webp": 1}  # milliseconds in which a format counts the time of a frame
_DESCRIPTION = 0x010E  # of EXIF: ImageDescription


def write_picture(
    path: Path, frames: UInt8[np.ndarray, "frames height width 3"], fps: Fraction, metadata: Mapping[str, str]
) -> None:
    """Write a file of one of `SUFFIXES`, whole or not at all.

    A PNG of more than one frame is a contact sheet of `_SHEET_FRAMES` of them. A GIF has 256 colours a frame;
    PNG and WebP lose nothing.

    Raises:
        UserError: it cannot be written.
    """
    kind = path.suffix.lower()
    if kind == ".png":
        info = PngInfo()
        for key, value in metadata.items():
            info.add_itxt(key, value)
        if len(frames) > 1:
            contact_sheet(path, [frames], columns=_SHEET_FRAMES, info=info)
            return
        settings = {"format": "PNG", "pnginfo": info}
    else:
        settings = {"save_all": True, "duration": _durations(len(frames), fps, _TICKS[kind]), "loop": 0}
        text = json.dumps(dict(metadata))
        if kind == ".gif":
            settings |= {"format": "GIF", "comment": text.encode()}
        else:
            exif = Image.Exif()
            exif[_DESCRIPTION] = text
            settings |= {"format": "WEBP", "lossless": True, "exif": exif.tobytes()}
    first, *others = (Image.fromarray(np.ascontiguousarray(frame)) for frame in frames)
    if others:
        settings["append_images"] = others
    try:
        with replacing(path) as aside:
            first.save(aside, **settings)
    except OSError as error:
        raise UserError(os_error_line(path, error)) from error


def _durations(count: int, fps: Fraction, tick: int) -> list[int]:
    """Milliseconds of each frame, multiples of `tick` that never drift from the rate."""
    ends = [round(1000 * i / fps / tick) * tick for i in range(count + 1)]
    return [end - start for start, end in pairwise(ends)]


def read_metadata(path: Path) -> dict[str, str]:
    """What `write_picture` was given; nothing where the picture holds none of ours.

    Raises:
        UserError: no picture that can be read.
    """
    try:
        with Image.open(path) as image:
            image.load()
            if image.format == "PNG":
                return {str(key): str(value) for key, value in image.info.items()}
            comment = image.info.get("comment", b"")
            text = comment.decode() if image.format == "GIF" else image.getexif().get(_DESCRIPTION, "")
        found = json.loads(text)
    except OSError as error:
        raise UserError(f"{path}: no picture that can be read ({one_line(error)})") from None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def read_frames(path: Path) -> UInt8[np.ndarray, "frames height width 3"]:
    """All frames of a picture, as it shows them."""
    with Image.open(path) as image:
        frames = []
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            frames.append(np.asarray(image.convert("RGB")))
    return np.stack(frames)
