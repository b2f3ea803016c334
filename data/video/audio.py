"""The sound of a clip: kept beside its latents unchanged, and put into the mp4 that is made from them.

Only the first sound track counts. Times are seconds from the first frame shown; `origin` is that frame's time
stamp, so that what the sound leads or lags stays as it was.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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

from kinoflow.data.video.soundtrack import JITTER, codec_of, frames, move, opened, packets, telling

_IN_MP4 = {"aac", "mp3", "ac3", "eac3", "alac", "opus", "flac"}  # what players take in an mp4
_TRIED = 48  # packets, to see whether an mp4 gives them back
_AAC_RATES = {8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000}
_AAC_RATE = 48000
_LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "4.0", 5: "5.0", 6: "5.1", 8: "7.1"}


class Sound:
    """Sound on its way into an mp4: `begin` adds its stream, `write` follows as the picture goes on.

    It is copied where mp4 holds its codec, and encoded again as AAC otherwise. Copied sound begins exactly at
    its start (the mp4 says how much of the first packet to skip) and ends with the packet around its end.
    """

    def __init__(
        self,
        path: Path,
        container: InputContainer,
        track: AudioStream,
        *,
        zero: Fraction,
        length: Fraction,
        copies: bool,
    ) -> None:
        self._path, self._container, self._track = path, container, track
        self._zero, self._length, self._copies = zero, length, copies
        self._output: Any = None
        self._packets: Iterator[Packet] = iter(())
        self._held: Packet | None = None

    def __str__(self) -> str:
        """What becomes of it, for people."""
        return f"{codec_of(self._track)}, {'copied' if self._copies else 'encoded again as aac'}"

    def begin(self, output: OutputContainer) -> None:
        """Add a stream to an mp4 that has its picture stream, and write the mp4's header.

        Raises:
            UserError: the sound has a form that an mp4 cannot hold.
        """
        self._output = output
        with telling(self._path):
            if self._copies:
                self._packets = self._copied(output.add_stream_from_template(self._track))
            else:
                self._packets = self._encoded(output)
            output.start_encoding()

    def write(self, until: Fraction | None) -> None:
        """Write what begins before a time of the mp4 and is not written yet; with None, all that is left.

        Raises:
            UserError: the sound does not decode.
        """
        with telling(self._path):
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
        with telling(self._path):
            self._output.close()

    def _copied(self, stream: Any) -> Iterator[Packet]:
        """Packets that sound in the range, after the one before, from which codecs with overlap start up."""
        before: Packet | None = None
        for packet in packets(self._container, self._track):
            move(packet, -self._zero)
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
        for frame in frames(self._container, self._track):
            place = following or 0
            if frame.pts is not None and frame.time_base is not None:
                place = round((frame.pts * frame.time_base - self._zero) * rate)
            if following is None or abs(place - following) > JITTER * rate:
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
    with opened(path, named) as (container, track):
        if track is None:
            yield None
            return
        copies = _fits_mp4(path)
        yield Sound(named or path, container, track, zero=origin + start, length=end - start, copies=copies)


def _placed(frame: av.AudioFrame) -> av.AudioFrame:
    """The frame with usual speakers where the file names none."""
    if frame.layout.name.endswith("channels") and frame.layout.nb_channels in _LAYOUTS:
        if frame.format.name.startswith("s64"):  # which NumPy does not get
            (frame,) = AudioResampler(format="dblp", layout=frame.layout, rate=frame.sample_rate).resample(
                frame
            )
        layout = _LAYOUTS[frame.layout.nb_channels]
        placed = av.AudioFrame.from_ndarray(frame.to_ndarray(), format=frame.format.name, layout=layout)
        placed.sample_rate = frame.sample_rate
        return placed
    return frame


def _fits_mp4(path: Path) -> bool:
    """Whether an mp4 takes the packets of a file and gives sound back: some forms of good codecs it can't."""
    with opened(path) as (container, track), suppress(av.error.FFmpegError, ValueError, ArithmeticError):
        if track is None or codec_of(track) not in _IN_MP4:
            return False
        memory, shift = io.BytesIO(), None
        with av.open(memory, "w", format="mp4") as mp4:
            copy = mp4.add_stream_from_template(track)
            for _, packet in zip(range(_TRIED), packets(container, track), strict=False):
                shift = -packet.dts * Fraction(packet.time_base) if shift is None else shift
                move(packet, shift)
                packet.stream = copy
                mp4.mux(packet)
        memory.seek(0)
        with av.open(memory, "r") as again:
            return any(frame.samples for frame in again.decode(audio=0))
    return False
