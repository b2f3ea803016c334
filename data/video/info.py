"""What a clip is, in plain values."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from kinoflow.configs.errors import UserError

DecodedFrame = Any  # a PyAV VideoFrame; PyAV is imported in its rooms only

MAX_RATE = 1_000_000  # frames a second; high-speed cameras reach it

# Code points of ITU-T H.273; 2 means "not said".
_MATRICES = {
    0: "rgb", 1: "bt709", 4: "fcc", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m", 8: "ycgco", 9: "bt2020nc",
    10: "bt2020c", 11: "smpte2085", 12: "chroma-derived-nc", 13: "chroma-derived-c", 14: "ictcp",
    15: "ipt-c2", 16: "ycgco-re", 17: "ycgco-ro",
}  # fmt: skip
_PRIMARIES = {
    1: "bt709", 4: "bt470m", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m", 8: "film", 9: "bt2020",
    10: "smpte428", 11: "smpte431", 12: "smpte432", 22: "ebu3213",
}  # fmt: skip
_TRANSFERS = {
    1: "bt709", 4: "gamma22", 5: "gamma28", 6: "smpte170m", 7: "smpte240m", 8: "linear", 9: "log100",
    10: "log316", 11: "iec61966-2-4", 12: "bt1361e", 13: "srgb", 14: "bt2020-10", 15: "bt2020-12", 16: "pq",
    17: "smpte428", 18: "hlg",
}  # fmt: skip
_RANGES = {1: "limited", 2: "full"}


@dataclass(frozen=True, kw_only=True)
class ColorTags:
    """Colour tags of a stream as written in it; None where it says nothing."""

    matrix: str | None = None
    range: str | None = None
    primaries: str | None = None
    transfer: str | None = None

    @classmethod
    def of(cls, frame: DecodedFrame) -> "ColorTags":
        """What a decoded frame says of itself."""
        return cls(
            matrix=_MATRICES.get(frame.colorspace),
            range=_RANGES.get(frame.color_range),
            primaries=_PRIMARIES.get(frame.color_primaries),
            transfer=_TRANSFERS.get(frame.color_trc),
        )


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a clip is. `width` and `height` in displayed pixels (after rotation), `duration` in seconds.

    `rotation` is the clockwise turn in degrees that the stream asks for, after mirroring left to right where
    it is `mirrored`; reading applies both. With `variable_frame_rate`, `fps` is the average; frames are
    addressed by their index all the same. `lost_packets` counts what a broadcast lost; FFmpeg conceals it.
    """

    path: Path
    codec: str
    width: int
    height: int
    frames: int
    fps: Fraction
    duration: Fraction
    pixel_format: str
    bit_depth: int
    rotation: int
    mirrored: bool = False
    variable_frame_rate: bool
    sample_aspect_ratio: Fraction
    color: ColorTags
    audio: bool
    lost_packets: int = 0
    metadata: dict[str, str]


def checked_rate(fps: Fraction | int) -> Fraction:
    """A frame rate that clips can have.

    Raises:
        UserError: not above 0, or more than MAX_RATE.
    """
    if not 0 < fps <= MAX_RATE:
        raise UserError(f"fps: {fps}; use a rate above 0 and up to {MAX_RATE}")
    return Fraction(fps)
