"""The sound of a clip: kept beside its latents unchanged, and put into the mp4 that is made from them.

Only the first sound track counts. Times are seconds from the first frame shown; `origin` is that frame's time
stamp, so that what the sound leads or lags stays as it was.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.packet import Packet

from kinoflow.configs.errors import UserError, os_error_line

_IN_MP4 = {"aac", "mp3", "ac3", "eac3", "alac", "opus", "flac"}  # what players take in an mp4
_AAC_RATES = {8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000}
_AAC_RATE = 48000
_LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "4.0", 5: "5.0", 6: "5.1", 8: "7.1"}
_JITTER = Fraction(1, 50)  # seconds; stamps are rounded to the container's ticks, only a jump moves samples
_DAMAGED = "its sound is damaged or of an unknown kind; leave --audio out"
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES}


@dataclass(frozen=True, kw_only=True)
class SoundInfo:
    """A sound track: its codec, and the time stamp in its own file that stands for the first frame."""

    codec: str
    origin: Fraction


def extract(source: Path, target: Path, origin: Fraction) -> SoundInfo | None:
    """Copy the first sound track of a clip, packet for packet, into a NUT file, which holds any codec.

    Returns None where the clip has no sound.

    Raises:
        UserError: the clip, or its sound, cannot be read.
    """
    with _opened(source) as (container, track):
        if track is None:
            return None
        shift = None
        with _telling(source), av.open(f"file:{target}", "w", format="nut") as nut:
            copy = nut.add_stream_from_template(track)
            for packet in _packets(container, track):
                if shift is None:  # NUT wants times from 0 up; sound may begin before the picture
                    shift = -min(packet.dts, packet.pts) * Fraction(packet.time_base)
                _move(packet, shift)
                packet.stream = copy
                nut.mux(packet)
        return None if shift is None else SoundInfo(codec=_codec(track), origin=origin + shift)


class Sound:
    """Sound on its way into an mp4: `begin` adds its stream, `write` follows as the picture goes on.

    It is copied where mp4 holds its codec, and encoded again as AAC otherwise. Copied sound begins exactly at
    its start (the mp4 says how much of the first packet to skip) and ends with the packet around its end.
    """

    def __init__(
        self, path: Path, container: InputContainer, track: AudioStream, zero: Fraction, length: Fraction
    ) -> None:
        self._path, self._container, self._track = path, container, track
        self._zero, self._length = zero, length
        self._output: Any = None
        self._packets: Iterator[Packet] = iter(())
        self._held: Packet | None = None

    def __str__(self) -> str:
        """What becomes of it, for people."""
        codec = _codec(self._track)
        return f"{codec}, copied" if codec in _IN_MP4 else f"{codec}, encoded again as aac"

    def begin(self, output: OutputContainer) -> None:
        """Add a stream to an mp4 that has its picture stream, and write the mp4's header.

        Raises:
            UserError: the sound has a form that an mp4 cannot hold.
        """
        self._output = output
        with _telling(self._path):
            if _codec(self._track) in _IN_MP4:
                self._packets = self._copied(output.add_stream_from_template(self._track))
            else:
                self._packets = self._encoded(output)
            output.start_encoding()

    def write(self, until: Fraction | None) -> None:
        """Write what begins before a time of the mp4 and is not written yet; with None, all that is left.

        Raises:
            UserError: the sound does not decode.
        """
        with _telling(self._path):
            while (packet := self._held or next(self._packets, None)) is not None:
                self._held = packet
                if until is not None and packet.pts is not None and packet.pts * packet.time_base >= until:
                    return
                self._held = None
                self._output.mux(packet)

    def close(self) -> None:
        """Write the mp4's trailer, where what is wrong with copied sound may come out.

        Raises:
            UserError: the sound has a form that an mp4 cannot hold.
        """
        with _telling(self._path):
            self._output.close()

    def _copied(self, stream: Any) -> Iterator[Packet]:
        """Packets that sound in the range, after the one before, from which codecs with overlap start up."""
        before: Packet | None = None
        for packet in _packets(self._container, self._track):
            _move(packet, -self._zero)
            packet.stream = stream
            if packet.pts * packet.time_base >= self._length:
                return
            if (packet.pts + (packet.duration or 1)) * packet.time_base <= 0:
                before = packet
                continue
            if before is not None:
                yield before
                before = None
            yield packet

    def _encoded(self, output: OutputContainer) -> Iterator[Packet]:
        rate = self._track.rate if self._track.rate in _AAC_RATES else _AAC_RATE
        layout = _LAYOUTS.get(self._track.channels, "stereo")
        stream: Any = output.add_stream("aac", rate=rate, layout=layout)
        stream.codec_context.time_base = Fraction(1, rate)

        def packets() -> Iterator[Packet]:
            done = 0
            for samples in self._trimmed(rate, layout):
                frame = av.AudioFrame.from_ndarray(
                    np.ascontiguousarray(samples), format="fltp", layout=layout
                )
                frame.sample_rate, frame.pts, frame.time_base = rate, done, Fraction(1, rate)
                done += samples.shape[1]
                yield from stream.encode(frame)
            yield from stream.encode(None)

        return packets()

    def _trimmed(self, rate: int, layout: str) -> Iterator[np.ndarray]:
        """Samples (channels, n) of the range, to the sample; what is missing before them is silence."""
        total, done = round(self._length * rate), 0
        for samples, first in self._samples(rate, layout):
            kept = samples[:, max(0, done - first) : max(0, total - first)]
            if kept.shape[1]:
                silence = max(0, first - done)
                yield np.pad(kept, ((0, 0), (silence, 0)))
                done += silence + kept.shape[1]
            if done >= total:
                return

    def _samples(self, rate: int, layout: str) -> Iterator[tuple[np.ndarray, int]]:
        """Planar samples at the rate of the output, and the number of the first, counted from the start."""
        resampler, following = AudioResampler(format="fltp", layout=layout, rate=rate), None
        for frame in self._container.decode(self._track):
            place = following or 0
            if frame.pts is not None and frame.time_base is not None:
                place = round((frame.pts * frame.time_base - self._zero) * rate)
            if following is None or abs(place - following) > _JITTER * rate:
                following = place
            for converted in resampler.resample(_placed(frame)):
                samples = converted.to_ndarray()
                yield samples, following
                following += samples.shape[1]
        for converted in resampler.resample(None):
            yield converted.to_ndarray(), following or 0


@contextmanager
def sound(
    path: Path, *, origin: Fraction, start: Fraction, end: Fraction, named: Path | None = None
) -> Iterator[Sound | None]:
    """The sound of a clip between two times, for `VideoWriter`; None where the clip has none.

    Errors name `named` where the sound came out of another file.

    Raises:
        UserError: the file cannot be read.
    """
    with _opened(path, named) as (container, track):
        yield None if track is None else Sound(named or path, container, track, origin + start, end - start)


@contextmanager
def _opened(path: Path, named: Path | None = None) -> Iterator[tuple[InputContainer, AudioStream | None]]:
    try:
        container = av.open(f"file:{path}", options={"protocol_whitelist": "file"}, metadata_errors="replace")
    except OSError as error:
        raise UserError(os_error_line(named or path, error)) from error
    except (av.error.FFmpegError, ValueError) as error:
        raise UserError(f"{named or path}: {_DAMAGED}") from error
    with container:
        track = next(iter(container.streams.audio), None)
        if track is not None and track.codec_context is None:
            raise UserError(f"{named or path}: {_DAMAGED}")
        yield container, track


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    try:
        yield
    except (av.error.FFmpegError, ValueError, ArithmeticError) as error:
        if isinstance(error, UserError) or (isinstance(error, OSError) and error.errno in _DISK):
            raise
        raise UserError(f"{path}: {_DAMAGED}") from error


def _placed(frame: av.AudioFrame) -> av.AudioFrame:
    """The frame with usual speakers where the file names none."""
    if frame.layout.name.endswith("channels") and frame.layout.nb_channels in _LAYOUTS:
        layout = _LAYOUTS[frame.layout.nb_channels]
        placed = av.AudioFrame.from_ndarray(frame.to_ndarray(), format=frame.format.name, layout=layout)
        placed.sample_rate = frame.sample_rate
        return placed
    return frame


def _codec(track: AudioStream) -> str:
    return track.codec_context.codec.canonical_name


def _packets(container: InputContainer, track: AudioStream) -> Iterator[Any]:
    """Packets with content and both time stamps."""
    for packet in container.demux(track):
        packet.dts = packet.pts if packet.dts is None else packet.dts
        packet.pts = packet.dts if packet.pts is None else packet.pts
        if packet.size and packet.pts is not None:
            yield packet


def _move(packet: Any, seconds: Fraction) -> None:
    shift = round(seconds / packet.time_base)
    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
