"""The timeline of a stream from its index or its packets, without decoding it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Int64

from kinoflow.data.video.timeline import Timeline

Container = Any  # opened PyAV objects
Stream = Any
Packet = Any

_VP8_SHOWN_BIT = 0x10  # RFC 6386, 9.1: show_frame in the first byte of a frame
_BROADCASTS = {"mpegts", "mpeg"}  # cut, joined and damaged files are healthy ones there
_JUMP, _STEP_BACK = Fraction(10), Fraction(1, 10)  # seconds; where ffmpeg sees a new recording


def is_broadcast(container: Container) -> bool:
    """Whether it is a transport or program stream."""
    return container.format.name in _BROADCASTS


class Clock:
    """Lets the stamps of recordings that were joined go on where the one before ended."""

    def __init__(self, container: Container) -> None:
        self._joins = is_broadcast(container)
        self._shift, self._due = 0, None
        self.joined = False

    def correct(self, packet: Packet) -> None:
        """Move the packet's stamps; packets come in the order of the file, from the first one on."""
        stamp = packet.pts if packet.dts is None else packet.dts
        if not self._joins or stamp is None:
            return
        stamp += self._shift
        if self._due is not None:
            ahead = (stamp - self._due) * packet.time_base
            if abs(ahead) > _JUMP or ahead < -_STEP_BACK:
                self._shift += self._due - stamp
                self.joined, stamp = True, self._due
        self._due = stamp + (packet.duration or 0)
        packet.dts = None if packet.dts is None else packet.dts + self._shift
        packet.pts = None if packet.pts is None else packet.pts + self._shift


@dataclass(kw_only=True)
class _Packets:
    """What the packets of a stream say, in the order of the file."""

    stamps: list[int | None] = field(default_factory=list)
    durations: dict[int | None, int] = field(default_factory=dict)
    decoding: list[int] = field(default_factory=list)
    hidden: int = 0
    lost: int = 0
    reordered: bool = False
    joined: bool = False


def timeline_of(
    container: Container, video: Stream, file_size: int, first: int | None
) -> tuple[Timeline, bool]:
    """The timeline, and whether its stamps are doubtful, so that frames have to be counted.

    The index is read where it holds every frame at a constant rate (mp4, mov), else all packets. `first` is
    the stamp of the first frame that decodes; packets shown before it do not count. Stamps are doubtful where
    a codec that reorders frames has packets whose stamps never go back: they may be those of decoding.
    """
    reorders = bool(video.codec_context.has_b_frames)
    timeline = _from_index(video, file_size) if container.format.name.startswith("mov,") else None
    if timeline is not None and not reorders:
        return timeline, False
    if timeline is not None:
        doubtful = not _goes_back(container, video)
        if doubtful or _ends_with(container, video, timeline):
            return timeline, doubtful
        container.seek(int(video.index_entries[0].timestamp), stream=video)
    packets = _read(container, video, first)
    timeline = _from_packets(container, video, packets, file_size)
    return timeline, reorders and not packets.reordered and timeline.frames > 1


def counted(timeline: Timeline, frames: int) -> Timeline:
    """The timeline of a stream with doubtful stamps that decodes to so many frames.

    Sorted, stamps of decoding are still the moments at which some frame is due.
    """
    times = timeline.times if timeline.frames == frames else None
    variable = timeline.variable and times is not None
    return replace(
        timeline, frames=frames, stamps=None, times=times, variable=variable, sequential=True,
        last=timeline.last if variable else 0,
    )  # fmt: skip


def _from_index(video: Stream, file_size: int) -> Timeline | None:
    entries = [(entry.timestamp, entry.pos + entry.size, entry.is_discard) for entry in video.index_entries]
    if not len(entries) == video.frames > 0 or video.start_time is None:
        return None
    stamps, ends, discarded = np.array(entries, np.int64).T
    steps = np.unique(np.diff(stamps))
    if discarded.any() or len(steps) != 1 or steps[0] <= 0:
        return None
    times = video.start_time + steps[0] * np.arange(len(stamps), dtype=np.int64)
    fps = 1 / (int(steps[0]) * video.time_base)
    truncated = bool(ends.max() > file_size)
    timeline = Timeline(
        frames=len(times), stamps=times, times=times, fps=fps, variable=False, truncated=truncated,
        last=_rest(video, times),
    )  # fmt: skip
    return _averaged(timeline, video.time_base)


def _goes_back(container: Container, video: Stream) -> bool:
    before = None
    for packet in container.demux(video):
        if packet.pts is None or not packet.size:
            continue
        if before is not None and packet.pts < before:
            return True
        before = packet.pts
    return False


def _ends_with(container: Container, video: Stream, timeline: Timeline) -> bool:
    """Whether the last frames are shown when the index, which has decoding times, makes one think."""
    times = timeline.times
    if times is None:
        return False
    container.seek(int(times[-1]), stream=video)
    stamps = sorted(packet.pts for packet in container.demux(video) if packet.size and packet.pts is not None)
    return len(stamps) <= len(times) and stamps == times[len(times) - len(stamps) :].tolist()


def _read(container: Container, video: Stream, first: int | None) -> _Packets:
    read, clock = _Packets(), Clock(container)
    vp8, before = video.codec_context.name == "vp8", None
    for packet in container.demux(video):
        if packet.size == 0:
            continue
        clock.correct(packet)
        read.lost += packet.is_corrupt
        early = first is not None and packet.pts is not None and packet.pts < first
        if early or packet.is_discard or (vp8 and not bytes(memoryview(packet)[:1])[0] & _VP8_SHOWN_BIT):
            read.hidden += 1
            continue
        if packet.pts is not None:
            read.reordered |= before is not None and packet.pts < before
            before = packet.pts
        read.stamps.append(packet.pts)
        read.decoding += [] if packet.dts is None else [packet.dts]
        read.durations[packet.pts] = packet.duration or 0
    read.joined = clock.joined
    return read


def _from_packets(container: Container, video: Stream, packets: _Packets, file_size: int) -> Timeline:
    nominal, count = _nominal_rate(video), len(packets.stamps)
    lost = packets.lost if is_broadcast(container) else 0
    # An edit list hides samples that the header of a mov counts, and AVI's may count one too many.
    slack = {"avi": 1}.get(container.format.name, 0)
    promised = 0 if container.format.name.startswith("mov,") else video.frames - packets.hidden - slack
    beyond = any(entry.pos + entry.size > file_size for entry in video.index_entries)
    stamps = _usable(packets.stamps)
    if stamps is None:
        truncated = promised > count or beyond
        return Timeline(
            frames=count, stamps=None, times=None, fps=nominal, variable=False, truncated=truncated,
            sequential=packets.joined or lost > 0, lost=lost,
        )  # fmt: skip
    times = _rising(stamps)
    fps, variable = _rate(times, video, nominal)
    last = _rest(video, times) if container.format.name.startswith("mov,") else 0
    last = last or packets.durations[int(stamps[-1])]
    last = 0 if last == 1 else last  # what muxers write that do not know it
    missing = _declared_end(container, video) - (int(times[-1]) + last) * video.time_base
    longest = max(int(np.diff(times).max(initial=0)) * video.time_base, 1 / fps)
    # AVI counts the places of dropped frames too.
    span = max(int(times[-1] - times[0]), max(packets.decoding, default=0) - min(packets.decoding, default=0))
    places = round(span * video.time_base * nominal) + 1
    truncated = promised > max(count, places) or missing > 2 * longest or beyond
    timeline = Timeline(
        frames=count, stamps=stamps, times=times, fps=fps, variable=variable, truncated=truncated, last=last,
        sequential=packets.joined or lost > 0, lost=lost,
    )  # fmt: skip
    return _averaged(timeline, video.time_base)


def _averaged(timeline: Timeline, time_base: Fraction) -> Timeline:
    """The timeline with the average rate over its whole length, where the rate is not constant.

    It is not where the last frame is held for longer or shorter by more than half a frame.
    """
    frames, times, step = timeline.frames, timeline.times, 1 / (timeline.fps * time_base)
    odd_end = frames > 1 and timeline.last and abs(timeline.last - step) > max(1, step / 2)
    if times is None or not (timeline.variable or odd_end):
        return timeline
    rate = frames / ((int(times[-1] - times[0]) + (timeline.last or step)) * time_base)
    return replace(timeline, variable=True, fps=rate.limit_denominator(1001) or rate)


def _usable(stamps: Sequence[int | None]) -> Int64[np.ndarray, " frames"] | None:
    """Sorted stamps of all frames; None where some have none, or most are the same."""
    known = [stamp for stamp in stamps if stamp is not None]
    if not known or len(known) < len(stamps) or 2 * len(set(known)) <= len(known):
        return None
    return np.sort(np.array(known, np.int64))


def _rising(stamps: Int64[np.ndarray, " frames"]) -> Int64[np.ndarray, " frames"]:
    """Equal stamps moved apart by single ticks."""
    place = np.arange(len(stamps))
    return np.maximum.accumulate(stamps - place) + place


def _rest(video: Stream, times: Int64[np.ndarray, " frames"]) -> int:
    """Ticks from the last frame to the end that the track of an mp4 declares."""
    if not video.duration or video.start_time is None:
        return 0
    return max(0, int(video.start_time + video.duration - times[-1]))


def _nominal_rate(video: Stream) -> Fraction:
    rates = (video.average_rate, video.guessed_rate, video.base_rate)
    return next((rate for rate in rates if rate), Fraction(25))


def _rate(times: Int64[np.ndarray, " frames"], video: Stream, nominal: Fraction) -> tuple[Fraction, bool]:
    """The exact constant rate that explains the times within one tick, else the average and True."""
    if len(times) == 1:
        return nominal, False
    elapsed = (times - times[0]).astype(np.float64)
    for rate in (nominal, video.guessed_rate, video.base_rate):
        if rate and np.abs(elapsed - np.arange(len(times)) * float(1 / (rate * video.time_base))).max() <= 1:
            return rate, False
    average = (len(times) - 1) / (int(times[-1] - times[0]) * video.time_base)
    return average.limit_denominator(1001) or average, True


def _declared_end(container: Container, video: Stream) -> Fraction:
    """Where Matroska says that the stream ends, in seconds; 0 for formats that only estimate it.

    A tag that a cut left behind is contradicted by a newer one, or by the file's own duration.
    """
    if not container.format.name.startswith("matroska"):
        return Fraction(0)
    tags = [value for key, value in video.metadata.items() if key.startswith("DURATION")]
    ends = [_seconds(tag) for tag in tags if tag.count(":") == 2]
    if container.duration and (ends or len(container.streams) == 1):
        ends.append(Fraction(container.duration, 1_000_000))
    return min(ends, default=Fraction(0))


def _seconds(tag: str) -> Fraction:
    hours, minutes, seconds = tag.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + Fraction(seconds)
