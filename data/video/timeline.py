"""When each frame of a stream is shown, without decoding it; and what another rate makes of that."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Int64

Container = Any  # opened PyAV objects; PyAV is imported in its rooms only
Stream = Any

_VP8_SHOWN_BIT = 0x10  # RFC 6386, 9.1: show_frame in the first byte of a frame


@dataclass(frozen=True, kw_only=True)
class Presentation:
    """Frame i is shown from `ticks[i]` to `ticks[i + 1]`, in units of `time_base` seconds; `ticks[0]` is 0.

    The end of the last frame is as exact as the container tells it; all others are exact.

    Raises:
        ValueError: no frame, or ticks that do not rise.
    """

    ticks: Int64[np.ndarray, " boundaries"]
    time_base: Fraction

    def __post_init__(self) -> None:
        rising = len(self.ticks) > 1 and self.ticks[0] == 0 and (np.diff(self.ticks) > 0).all()
        if not rising or self.time_base <= 0:
            raise ValueError("presentation: time stamps must begin at 0 and rise")

    @classmethod
    def constant(cls, frames: int, fps: Fraction) -> "Presentation":
        """Frames of one length."""
        return cls(ticks=np.arange(frames + 1, dtype=np.int64), time_base=1 / fps)

    def cut(self, start: int, end: int) -> "Presentation":
        """Frames start..end-1, from time 0."""
        return Presentation(ticks=self.ticks[start : end + 1] - self.ticks[start], time_base=self.time_base)

    def time_of(self, index: int) -> Fraction:
        """Seconds from the start of the clip to where frame `index` begins."""
        return int(self.ticks[index]) * self.time_base

    def repeats(self, fps: Fraction) -> Int64[np.ndarray, " frames"]:
        """How often each frame is shown at a constant rate (0: dropped); each begins at the nearest slot."""
        slots = [math.floor(self.time_of(index) * fps + Fraction(1, 2)) for index in range(len(self.ticks))]
        slots[-1] = max(slots[-1], 1)  # a clip keeps one frame at any rate
        return np.diff(np.array(slots, np.int64))


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Frames of a stream in the order shown; `pts` is None where the container has no usable time stamps.

    `last` is how long the last frame is shown, in ticks, 0 where nothing says it. `truncated` says that the
    container promises more than the file holds.
    """

    frames: int
    pts: Int64[np.ndarray, " frames"] | None
    fps: Fraction
    variable: bool
    truncated: bool
    last: int = 0

    def presentation(self, time_base: Fraction) -> Presentation | None:
        """The exact times of a variable frame rate; None where the rate is constant or no times are known."""
        if self.pts is None or not self.variable:
            return None
        end = int(self.pts[-1]) + (self.last or max(1, round(1 / (self.fps * time_base))))
        return Presentation(ticks=np.append(self.pts, end) - self.pts[0], time_base=time_base)

    def index_of(self, pts: int | None, following: int) -> int:
        """Frame index shown nearest to `pts`; `following` where there are no time stamps."""
        if self.pts is None or pts is None:
            return following
        right = int(np.searchsorted(self.pts, pts))
        if right == 0 or (right < self.frames and self.pts[right] - pts <= pts - self.pts[right - 1]):
            return right
        return right - 1


def timeline_of(container: Container, video: Stream, file_size: int, first: int | None) -> Timeline:
    """Read the index where it holds every frame at a constant rate (mp4, mov), else all packets.

    `first` is the stamp of the first frame that decodes; packets shown before it do not count.
    """
    if container.format.name.startswith("mov,") and len(video.index_entries) == video.frames > 0:
        entries = [
            (entry.timestamp, entry.pos + entry.size, entry.is_discard) for entry in video.index_entries
        ]
        stamps, ends, discarded = np.array(entries, np.int64).T
        steps = np.unique(np.diff(stamps))
        if not discarded.any() and len(steps) == 1 and steps[0] > 0 and video.start_time is not None:
            pts = video.start_time + steps[0] * np.arange(len(stamps), dtype=np.int64)
            fps = 1 / (int(steps[0]) * video.time_base)
            truncated = bool(ends.max() > file_size)
            return Timeline(frames=len(pts), pts=pts, fps=fps, variable=False, truncated=truncated)
    return _from_packets(container, video, first)


def _from_packets(container: Container, video: Stream, first: int | None) -> Timeline:
    hidden, shown, durations, last_duration = 0, [], {}, 0
    vp8 = video.codec_context.name == "vp8"
    for packet in container.demux(video):
        if packet.size == 0:
            continue
        early = first is not None and packet.pts is not None and packet.pts < first
        if early or packet.is_discard or (vp8 and not bytes(memoryview(packet)[:1])[0] & _VP8_SHOWN_BIT):
            hidden += 1
            continue
        shown.append(packet.pts)
        last_duration = durations[packet.pts] = packet.duration or 0
    fps = _nominal_rate(video)
    pts = _usable(shown)
    promised = video.frames - hidden
    if pts is None:
        truncated = promised > len(shown)
        return Timeline(frames=len(shown), pts=None, fps=fps, variable=False, truncated=truncated)
    fps, variable = _rate(pts, video, fps)
    missing = _declared_end(container, video) - (int(pts[-1]) + last_duration) * video.time_base
    longest = max(int(np.diff(pts).max(initial=0)) * video.time_base, 1 / fps)
    # AVI counts the places of dropped frames too.
    places = round(int(pts[-1] - pts[0]) * video.time_base * _nominal_rate(video)) + 1
    truncated = promised > max(len(pts), places) or missing > 2 * longest
    last = durations[int(pts[-1])]
    return Timeline(frames=len(pts), pts=pts, fps=fps, variable=variable, truncated=truncated, last=last)


def _usable(stamps: Sequence[int | None]) -> Int64[np.ndarray, " frames"] | None:
    known = [stamp for stamp in stamps if stamp is not None]
    pts = np.unique(np.array(known, np.int64))
    return pts if known and len(pts) == len(stamps) else None


def _nominal_rate(video: Stream) -> Fraction:
    rates = (video.average_rate, video.guessed_rate, video.base_rate)
    return next((rate for rate in rates if rate), Fraction(25))


def _rate(pts: Int64[np.ndarray, " frames"], video: Stream, nominal: Fraction) -> tuple[Fraction, bool]:
    """The exact constant rate that explains the stamps within one tick, else the average and True."""
    if len(pts) == 1:
        return nominal, False
    elapsed = (pts - pts[0]).astype(np.float64)
    for rate in (nominal, video.guessed_rate, video.base_rate):
        if rate and np.abs(elapsed - np.arange(len(pts)) * float(1 / (rate * video.time_base))).max() <= 1:
            return rate, False
    average = (len(pts) - 1) / (int(pts[-1] - pts[0]) * video.time_base)
    return average.limit_denominator(1001) or average, True


def _declared_end(container: Container, video: Stream) -> Fraction:
    """Where Matroska says that the stream ends, in seconds; 0 for formats that only estimate it."""
    if not container.format.name.startswith("matroska"):
        return Fraction(0)
    tag = next((value for key, value in video.metadata.items() if key.startswith("DURATION")), None)
    if tag is not None and tag.count(":") == 2:
        hours, minutes, seconds = tag.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + Fraction(seconds)
    return Fraction(container.duration or 0, 1_000_000) if len(container.streams) == 1 else Fraction(0)
