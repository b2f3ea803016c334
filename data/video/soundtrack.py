"""The sound of a clip in a file of its own: copied packet for packet, or samples where no copy decodes."""

import errno
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error
from av.audio.stream import AudioStream
from av.container import InputContainer

from kinoflow.configs.errors import UserError, os_error_line
from kinoflow.data.video.stamps import Clock, is_broadcast

DAMAGED = "its sound is damaged or of an unknown kind; leave --audio out"

_HOLDERS = ("nut", "matroska")  # NUT keeps exact times; Matroska holds some codecs that it can't
_RAW = {
    "u8": "pcm_u8", "s16": "pcm_s16le", "s32": "pcm_s32le", "s64": "pcm_s64le", "flt": "pcm_f32le",
    "dbl": "pcm_f64le",
}  # fmt: skip
JITTER = Fraction(1, 50)  # seconds; stamps are rounded to the container's ticks, only a jump moves samples
_ENDS = 3  # frames at either end that containers may trim to the sample
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES}


@dataclass(frozen=True, kw_only=True)
class SoundInfo:
    """A sound track: its codec, and the time stamp in its own file that stands for the first frame."""

    codec: str
    origin: Fraction


def extract(source: Path, target: Path, origin: Fraction) -> SoundInfo | None:
    """Copy the first sound track of a clip, packet for packet, into a file, NUT or Matroska.

    The copy is decoded and compared with the source. Where neither container gives it back, the samples
    themselves are kept. Returns None where the clip has no sound.

    Raises:
        UserError: the clip, or its sound, cannot be read.
    """
    with opened(source) as (container, track):
        if track is None:
            return None
        codec = codec_of(track)
        counted = container.format.name == "avi"
    heard = _fingerprints(source)
    if not heard:
        raise UserError(f"{source}: {DAMAGED}")
    for holder in () if counted and _drifts(source) else _HOLDERS:
        shift = _copied(source, target, holder)
        if shift is not None and _holds(target, codec, heard):
            return SoundInfo(codec=codec, origin=origin + shift)
    codec, shift = _sampled(source, target)
    return SoundInfo(codec=codec, origin=origin + shift)


@contextmanager
def opened(path: Path, named: Path | None = None) -> Iterator[tuple[InputContainer, AudioStream | None]]:
    """A file and its first sound track that decodes here, None without one; errors name `named`.

    Raises:
        UserError: the file, or its sound, cannot be read.
    """
    try:
        container = av.open(f"file:{path}", options={"protocol_whitelist": "file"}, metadata_errors="replace")
    except OSError as error:
        raise UserError(os_error_line(named or path, error)) from error
    except (av.error.FFmpegError, ValueError) as error:
        raise UserError(f"{named or path}: {DAMAGED}") from error
    with container:
        track = next(iter(container.streams.audio), None)
        if track is not None and track.codec_context is None:
            raise UserError(f"{named or path}: {DAMAGED}")
        yield container, track


@contextmanager
def telling(path: Path) -> Iterator[None]:
    """FFmpeg's faults in one line; those of the disk pass."""
    try:
        yield
    except (av.error.FFmpegError, ValueError, ArithmeticError) as error:
        if isinstance(error, UserError) or (isinstance(error, OSError) and error.errno in _DISK):
            raise
        raise UserError(f"{path}: {DAMAGED}") from error


def codec_of(track: AudioStream) -> str:
    """The codec's own name, whichever decoder is at work."""
    return track.codec_context.codec.canonical_name


def packets(container: InputContainer, track: AudioStream) -> Iterator[Any]:
    """Packets with content and both time stamps, joined where recordings were joined."""
    clock = Clock(container)
    for packet in container.demux(track):
        packet.dts = packet.pts if packet.dts is None else packet.dts
        packet.pts = packet.dts if packet.pts is None else packet.pts
        if packet.size and packet.pts is not None:
            clock.correct(packet)
            yield packet


def frames(container: InputContainer, track: AudioStream) -> Iterator[av.AudioFrame]:
    """Decoded sound; in a broadcast, packets that don't decode are left out.

    AVI has no time stamps, and those that FFmpeg makes up are wrong for some codecs: after the first frame
    there are none, sound goes on where it was.

    Raises:
        av.error.FFmpegError: sound of another file that does not decode.
    """
    begun, counted = False, container.format.name == "avi"
    for frame in _decoded(container, track):
        if counted and begun:
            frame.pts = None
        begun = True
        yield frame


def _decoded(container: InputContainer, track: AudioStream) -> Iterator[av.AudioFrame]:
    clock = Clock(container)
    for packet in container.demux(track):
        if not packet.size:
            continue
        clock.correct(packet)
        try:
            yield from packet.decode()
        except av.error.InvalidDataError:
            if not is_broadcast(container):
                raise
    yield from track.codec_context.decode(None)


def move(packet: Any, seconds: Fraction) -> None:
    """Shift both stamps."""
    shift = round(seconds / packet.time_base)
    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift


def _fingerprints(path: Path) -> list[bytes]:
    """One of each decoded frame."""
    with opened(path) as (container, track), telling(path):
        return [] if track is None else [_fingerprint(frame) for frame in frames(container, track)]


def _fingerprint(frame: av.AudioFrame) -> bytes:
    size = frame.samples * frame.format.bytes * (1 if frame.format.is_planar else frame.layout.nb_channels)
    digest = hashlib.blake2b(digest_size=8)
    for plane in frame.planes:
        digest.update(memoryview(plane)[:size])  # without its padding
    return digest.digest()


def _drifts(path: Path) -> bool:
    """Whether stamps and samples tell lengths of their own: packets that were moved would keep that."""
    with opened(path) as (container, track), telling(path):
        first, last, seconds = None, 0.0, 0.0
        for frame in () if track is None else _decoded(container, track):
            if frame.time is not None:
                first, last = frame.time if first is None else first, frame.time
            length = frame.samples / frame.sample_rate
            seconds += length
        return first is not None and abs(last - first + length - seconds) > 0.05 * seconds + float(JITTER)


def _holds(copy: Path, codec: str, heard: list[bytes]) -> bool:
    """Whether a copy decodes to the frames heard, but for what containers trim at either end."""
    try:
        with opened(copy) as (_, track):
            if track is None or codec_of(track) != codec:
                return False
        again = _fingerprints(copy)
    except UserError:
        return False
    inner = heard[_ENDS:-_ENDS] if len(heard) > 3 * _ENDS else heard[:1]
    return bool(again) and set(inner) <= set(again)


def _copied(source: Path, target: Path, holder: str) -> Fraction | None:
    """Copy the packets; how far they were moved to begin at 0, None where the container takes them not."""
    shift = None
    with opened(source) as (container, track):
        if track is None:
            return None
        try:
            with av.open(f"file:{target}", "w", format=holder) as file:
                copy = file.add_stream_from_template(track)
                for packet in packets(container, track):
                    if shift is None:  # times go from 0 up; sound may begin before the picture
                        shift = -min(packet.dts, packet.pts) * Fraction(packet.time_base)
                    move(packet, shift)
                    packet.stream = copy
                    file.mux(packet)
        except (av.error.FFmpegError, ValueError, ArithmeticError) as error:
            if isinstance(error, OSError) and error.errno in _DISK:
                raise
            return None
    return shift


def _sampled(source: Path, target: Path) -> tuple[str, Fraction]:
    """Keep the samples: the codec that holds them, and how far they were moved to begin at 0."""
    shift, due = None, 0
    with opened(source) as (container, track), telling(source):
        if track is None:
            raise UserError(f"{source}: {DAMAGED}")
        context = track.codec_context
        rate, layout = context.sample_rate, context.layout.name
        packed = context.format.packed.name
        with av.open(f"file:{target}", "w", format="nut") as file:
            raw: Any = file.add_stream(_RAW[packed], rate=rate, layout=layout)
            resampler = av.AudioResampler(format=packed, layout=layout, rate=rate)
            for frame in frames(container, track):
                stamp = None if frame.pts is None or frame.time_base is None else frame.pts * frame.time_base
                if shift is None:
                    shift = -(stamp or Fraction(0))
                place = due if stamp is None else round((stamp + shift) * rate)
                due = place if place - due > JITTER * rate else due
                for samples in resampler.resample(frame):
                    samples.pts, samples.time_base = due, Fraction(1, rate)
                    due += samples.samples
                    file.mux(raw.encode(samples))
            file.mux(raw.encode(None))
    return _RAW[packed], shift or Fraction(0)
