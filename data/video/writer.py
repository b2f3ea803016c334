"""Write clips: H.264, yuv420p, BT.709 limited, whole or not at all.

That format stores even sizes only, so an odd width or height is padded by repeating the last column or row,
and the true size is kept in the container's metadata (`kinoflow_size`), which reading uses to crop; other
players show the repeated line.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import av.error
import numpy as np
from av.container import OutputContainer
from av.packet import Packet
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import UInt8

from kinoflow.configs.errors import UserError, os_error_line
from kinoflow.configs.files import replacing
from kinoflow.data.video.audio import Sound
from kinoflow.data.video.color import BT709, EXACT, FULL, LIMITED
from kinoflow.data.video.info import checked_rate
from kinoflow.data.video.timeline import Presentation

PathLike = str | os.PathLike[str]

SIZE_KEY = "kinoflow_size"
# For the same bytes every time: a fixed number of threads, and no macroblock tree, whose vector code differs.
_X264_THREADS, _X264_OPTIONS = 4, {"mbtree": "0"}


def write(
    path: PathLike,
    frames: UInt8[np.ndarray, "frames height width 3"],
    *,
    fps: Fraction | int,
    crf: int | float = 18,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a whole clip; see VideoWriter."""
    frames = np.asarray(frames)
    if frames.ndim != 4:
        raise UserError(f"{path}: frames have shape {frames.shape}; give (frames, height, width, 3)")
    height, width = frames.shape[1:3]
    with VideoWriter(path, fps=fps, width=width, height=height, crf=crf, metadata=metadata) as writer:
        writer.write(frames)


class VideoWriter:
    """Write a clip a few frames at a time: `with VideoWriter(...) as writer: writer.write(frames)`.

    The file appears, whole, when the block ends without an exception. The same frames and arguments give
    the same bytes.

    Args:
        path: ends in .mp4, .m4v or .mov; its folder is made where missing.
        fps: frames per second, kept exactly.
        width, height: pixels.
        crf: 0 (lossless but for the conversion to yuv420p) .. 51 (worst).
        metadata: any keys; `title` and `comment` are the ones that players show.
        presentation: exact times of all the frames to come, for a variable rate; `fps` is then the average.
        sample_aspect_ratio: width over height of a pixel as players show it.
        sound: goes into the file beside the picture.

    Raises:
        UserError: an argument outside its range, wrong frames, or a file that cannot be written.
    """

    def __init__(
        self,
        path: PathLike,
        *,
        fps: Fraction | int,
        width: int,
        height: int,
        crf: int | float = 18,
        metadata: Mapping[str, str] | None = None,
        presentation: Presentation | None = None,
        sample_aspect_ratio: Fraction = Fraction(1),
        sound: Sound | None = None,
    ) -> None:
        self._presentation, self._sound, self._aspect = presentation, sound, sample_aspect_ratio
        self._path, self._fps, self._size, self._crf = Path(path), checked_rate(fps), (height, width), crf
        # Names of files that are not UTF-8 come with surrogates, which no container takes.
        texts = (metadata or {}).items()
        self._metadata = {key: value.encode(errors="replace").decode() for key, value in texts}
        self._reformatter, self._frames = VideoReformatter(), 0
        self._durations: dict[int | None, int] = {}
        self._last: Any = None  # packet of a clip with times, the last one so far
        self._begun = 0
        if self._path.suffix.lower() not in {".mp4", ".m4v", ".mov"}:
            raise UserError(f"{path}: clips are written as mp4; end the name in .mp4")
        if not 0 <= crf <= 51:
            raise UserError(f"crf: {crf}; use 0 (best) to 51 (worst)")
        if not (1 <= height <= 16384 and 1 <= width <= 16384):
            raise UserError(f"size: {width}x{height}; H.264 takes 1 to 16384 pixels a side")
        if any("\0" in key + value for key, value in self._metadata.items()):
            raise UserError("metadata: contains a NUL character; remove it")

    def __enter__(self) -> "VideoWriter":
        with _writing(self._path), ExitStack() as stack:
            name = stack.enter_context(replacing(self._path))
            self._container, self._stream = self._open(name)
            stack.push(self._finish)
            self._stack = stack.pop_all()
        return self

    def write(self, frames: UInt8[np.ndarray, "frames height width 3"]) -> None:
        """Append frames, RGB."""
        frames = np.asarray(frames)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (*self._size, 3):
            wanted = f"uint8 (frames, {self._size[0]}, {self._size[1]}, 3)"
            raise UserError(f"{self._path}: frames are {frames.dtype} {frames.shape}; give {wanted}")
        to_even = ((0, 0), (0, self._size[0] % 2), (0, self._size[1] % 2), (0, 0))
        with _writing(self._path):
            for shown in np.pad(frames, to_even, mode="edge"):
                encodable = self._encodable(shown)
                if self._sound is not None:
                    self._sound.write((encodable.pts or 0) * self._time_base)
                self._mux(self._stream.encode(encodable))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _writing(self._path):
            self._stack.__exit__(kind, error, trace)

    def _finish(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        try:
            if error is None:
                if self._frames == 0:
                    raise UserError(f"{self._path}: no frames to write; give at least one")
                if self._sound is not None:
                    self._sound.write(None)
                self._mux(self._stream.encode(None))
                self._close_track()
                (self._sound or self._container).close()
        finally:
            with suppress(Exception):
                self._container.close()

    def _open(self, name: Path) -> tuple[OutputContainer, VideoStream]:
        height, width = self._size
        flags = {"movflags": "+faststart+use_metadata_tags", "fflags": "+bitexact"}
        container = av.open(f"file:{name}", "w", format="mp4", options=flags)
        container.metadata.update(self._metadata)
        if height % 2 or width % 2:
            container.metadata[SIZE_KEY] = f"{width}x{height}"
        encoder = container.add_stream(
            "libx264", rate=self._fps, options=_X264_OPTIONS | {"crf": str(self._crf)}
        )
        encoder.width, encoder.height, encoder.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        context = encoder.codec_context
        context.time_base, context.thread_count = self._time_base, _X264_THREADS
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED
        if self._aspect != 1:
            context.sample_aspect_ratio = self._aspect
        if self._sound is not None:
            self._sound.begin(container)
        return container, encoder

    def _mux(self, packets: list[Packet]) -> None:
        """Packets say how long their own frame is shown; the encoder gives them all one length."""
        if self._presentation is None:
            self._container.mux(packets)
            return
        for packet in packets:
            packet.duration = self._durations.pop(packet.pts)
            self._begun = packet.dts if self._last is None else self._begun
            if self._last is not None:
                self._container.mux(self._last)
            self._last = packet

    def _close_track(self) -> None:
        """An mp4 is as long as the steps between decoding times add up to, and the last one in the file."""
        if self._presentation is None or self._last is None:
            return
        end = int(self._presentation.ticks[self._frames])
        self._last.duration = max(1, end - (self._last.dts - self._begun))
        self._container.mux(self._last)

    @property
    def _time_base(self) -> Fraction:
        return 1 / self._fps if self._presentation is None else self._presentation.time_base

    def _encodable(self, shown: UInt8[np.ndarray, "height width 3"]) -> av.VideoFrame:
        frame = self._reformatter.reformat(
            av.VideoFrame.from_ndarray(np.ascontiguousarray(shown), format="rgb24"),
            format="yuv420p",
            src_color_range=FULL,
            dst_colorspace=BT709,
            dst_color_range=LIMITED,
            interpolation=EXACT,
            threads=1,
        )
        frame.color_primaries = frame.color_trc = BT709
        frame.pts, frame.time_base, frame.duration = self._frames, self._time_base, 1
        if self._presentation is not None:
            if self._frames + 1 == len(self._presentation.ticks):
                raise UserError(f"{self._path}: more frames than its presentation has times for")
            begin, end = self._presentation.ticks[self._frames : self._frames + 2].tolist()
            frame.pts, frame.duration = begin, end - begin
            self._durations[begin] = end - begin
        self._frames += 1
        return frame


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(os_error_line(path, error)) from error
    except av.error.FFmpegError as error:
        raise UserError(f"{path}: cannot be encoded ({error}); check the size and rate") from error
