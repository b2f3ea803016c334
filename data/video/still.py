"""AVIF and animated WebP, which FFmpeg reads in part (one tile, no transparency) or not at all, by Pillow."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from kinoflow.configs.errors import UserError, os_error_line
from kinoflow.data.video.color import over_black
from kinoflow.data.video.info import ColorTags, VideoInfo
from kinoflow.data.video.picture import exif_orientation
from kinoflow.data.video.timeline import Timeline

TICK = Fraction(1, 1000)

_RATE = Fraction(25)  # of a still picture, as FFmpeg has it
_WEBP_ANIMATION_BIT = 0x02  # WebP container specification, VP8X flags


def is_ours(path: Path) -> bool:
    """Whether a file is an AVIF or an animated WebP."""
    with path.open("rb") as file:
        head = file.read(32)
    if head[4:8] == b"ftyp":
        return head[8:12] in (b"avif", b"avis")
    if head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X":
        return bool(head[20] & _WEBP_ANIMATION_BIT)
    return False


def pages(path: Path) -> int:
    """How many pictures Pillow finds in a file, 1 where it does not know the kind."""
    try:
        with Image.open(path) as image:
            return getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return 1


@dataclass(frozen=True, kw_only=True)
class Still:
    """What was found: the facts of the clip, and when its frames are shown, in milliseconds."""

    info: VideoInfo
    timeline: Timeline


def examine(path: Path) -> Still:
    """Facts and times of every frame.

    Raises:
        UserError: it cannot be read.
    """
    with _opened(path) as image:
        durations = []
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            image.load()
            durations.append(max(1, round(image.info.get("duration") or 0)))
        image.seek(0)
        orientation = exif_orientation(image)
        height, width = _shown(image).shape[:2]
        timeline = _timeline(durations)
        info = VideoInfo(
            path=path,
            codec=(image.format or "").lower(),
            width=width,
            height=height,
            frames=timeline.frames,
            fps=timeline.fps,
            duration=timeline.frames / timeline.fps,
            pixel_format=image.mode.lower(),
            bit_depth=8,
            rotation=orientation.rotation,
            mirrored=orientation.mirrored,
            variable_frame_rate=timeline.variable,
            sample_aspect_ratio=Fraction(1),
            color=ColorTags(),
            audio=False,
            metadata={},
        )
    return Still(info=info, timeline=timeline)


def pictures(path: Path, wanted: Sequence[int]) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    """The frames of these indices, in their order.

    Raises:
        UserError: one does not decode, when it is reached.
    """
    with _opened(path) as image:
        for index in wanted:
            image.seek(index)
            yield _shown(image)


def _timeline(durations: list[int]) -> Timeline:
    times = np.cumsum([0, *durations[:-1]]).astype(np.int64)
    still = len(durations) == 1
    constant = still or max(durations) - min(durations) <= 1  # milliseconds are rounded
    fps = _RATE if still else Fraction(1000 * len(durations), sum(durations))
    return Timeline(
        frames=len(durations), stamps=times, times=times, fps=fps, variable=not constant, truncated=False,
        last=durations[-1],
    )  # fmt: skip


def _shown(image: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    upright = ImageOps.exif_transpose(image)
    return over_black(np.asarray(upright.convert("RGBA")))


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except (ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a picture that Pillow can read, or damaged; export it again") from error
    except OSError as error:
        if error.errno is None:  # Pillow's own
            message = f"{path}: not a picture that Pillow can read, or damaged; export it again"
            raise UserError(message) from error
        raise UserError(os_error_line(path, error)) from error
