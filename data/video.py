"""Read and write clips; the only place that knows FFmpeg (through PyAV).

Arrays are RGB uint8, (frames, height, width, 3), 0..255, as a player shows them: the stream's matrix and
range are undone, rotation is applied, alpha is composited over black. Pixels are not rescaled for a
non-square sample aspect ratio, interlaced pictures stay woven, and PQ or HLG is not tone-mapped.

Written clips are H.264, yuv420p, BT.709 limited. That format stores even sizes only, so an odd width or
height is padded by repeating the last column or row, and the true size is kept in the container's metadata
(`kinoflow_size`), which reading uses to crop; other players show the repeated line.
"""

import functools
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import av.error
import numpy as np
from av.container import InputContainer, OutputContainer
from av.stream import Disposition
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import UInt8

from data import picture
from data.atomic import VideoError, os_error_line, replacing
from data.sheet import contact_sheet  # noqa: F401 (callers find it here)
from data.timeline import Timeline, timeline_of
from data.video_info import ColorTags, VideoInfo

PathLike = str | os.PathLike[str]

# Without these flags swscale takes shortcuts that are up to 3 levels off and differ between processors.
_FLAGS = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT
_EXACT = Interpolation.BILINEAR | _FLAGS
_TEXT_ART = {"tty", "bin", "xbin", "adf", "idf"}  # demuxers that would "play" a text file
_SIZE_KEY = "kinoflow_size"
# For the same bytes every time: a fixed number of threads, and no macroblock tree, whose vector code differs.
_X264_THREADS, _X264_OPTIONS = 4, {"mbtree": "0"}
_DAMAGED = "truncated or damaged; copy or export it again"


@dataclass(frozen=True, kw_only=True)
class _Examined:
    info: VideoInfo
    timeline: Timeline
    display: picture.Display


def probe(path: PathLike) -> VideoInfo:
    """Say what a clip is; decodes one frame, and reads all packets only where there is no full index.

    Raises:
        VideoError: missing, empty, unreadable or damaged file, or one without a video stream.
    """
    info = _examine(Path(path)).info
    return replace(info, metadata=dict(info.metadata))


def read(
    path: PathLike, start: int = 0, end: int | None = None, *, partial: bool = False
) -> UInt8[np.ndarray, "frames height width 3"]:
    """Frames start..end-1 of a clip (to its end by default), decoding from the keyframe before `start`.

    With `partial`, a truncated or damaged file gives the frames before the damage.

    Raises:
        VideoError: as `probe`; a range outside the clip; a frame in the range that does not decode.
    """
    stop = _examine(Path(path)).timeline.frames if end is None else end
    chunks = list(stream(path, start, end, chunk=max(1, stop - start), partial=partial))
    if not chunks:
        raise VideoError(f"{path}: no frame decodes; the file is {_DAMAGED}")
    return chunks[0]


def stream(
    path: PathLike, start: int = 0, end: int | None = None, chunk: int = 32, *, partial: bool = False
) -> Iterator[UInt8[np.ndarray, "frames height width 3"]]:
    """Frames start..end-1 in arrays of `chunk` frames (the last may be shorter), in bounded memory.

    Raises:
        VideoError: as `read`, when the iterator reaches the fault.
    """
    path = Path(path)
    examined = _examine(path)
    frames = examined.timeline.frames
    stop = frames if end is None else end
    if chunk < 1:
        raise VideoError(f"chunk: {chunk} frames; use 1 or more")
    if not 0 <= start < stop <= frames:
        raise VideoError(f"{path}: has frames 0:{frames}, not {start}:{stop}; choose a range inside")
    if examined.timeline.truncated and end is None and not partial:
        raise VideoError(f"{path}: {_DAMAGED}")
    array, filled, left = np.empty((0, *examined.display.size, 3), np.uint8), 0, stop - start
    for shown in _pictures(path, examined, start, stop, partial):
        if filled == 0:
            array = np.empty((min(chunk, left), *examined.display.size, 3), np.uint8)
        array[filled] = shown
        filled, left = filled + 1, left - 1
        if filled == len(array):
            yield array
            filled = 0
    if filled:
        yield array[:filled]


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
        raise VideoError(f"{path}: frames have shape {frames.shape}; give (frames, height, width, 3)")
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

    Raises:
        VideoError: an argument outside its range, wrong frames, or a file that cannot be written.
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
    ) -> None:
        self._path, self._fps, self._size, self._crf = Path(path), Fraction(fps), (height, width), crf
        self._metadata = dict(metadata or {})
        self._reformatter, self._frames = VideoReformatter(), 0
        if self._path.suffix.lower() not in {".mp4", ".m4v", ".mov"}:
            raise VideoError(f"{path}: clips are written as mp4; end the name in .mp4")
        if not 0 < self._fps <= 1000:
            raise VideoError(f"fps: {fps}; use a rate above 0 and up to 1000")
        if not 0 <= crf <= 51:
            raise VideoError(f"crf: {crf}; use 0 (best) to 51 (worst)")
        if not (1 <= height <= 16384 and 1 <= width <= 16384):
            raise VideoError(f"size: {width}x{height}; H.264 takes 1 to 16384 pixels a side")
        if any("\0" in key + value for key, value in self._metadata.items()):
            raise VideoError("metadata: contains a NUL character; remove it")

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
            raise VideoError(f"{self._path}: frames are {frames.dtype} {frames.shape}; give {wanted}")
        to_even = ((0, 0), (0, self._size[0] % 2), (0, self._size[1] % 2), (0, 0))
        with _writing(self._path):
            for shown in np.pad(frames, to_even, mode="edge"):
                self._container.mux(self._stream.encode(self._encodable(shown)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _writing(self._path):
            self._stack.__exit__(kind, error, trace)

    def _finish(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        try:
            if error is None:
                if self._frames == 0:
                    raise VideoError(f"{self._path}: no frames to write; give at least one")
                self._container.mux(self._stream.encode(None))
                self._container.close()
        finally:
            with suppress(Exception):
                self._container.close()

    def _open(self, name: Path) -> tuple[OutputContainer, VideoStream]:
        height, width = self._size
        flags = {"movflags": "+faststart+use_metadata_tags", "fflags": "+bitexact"}
        container = av.open(f"file:{name}", "w", format="mp4", options=flags)
        container.metadata.update(self._metadata)
        if height % 2 or width % 2:
            container.metadata[_SIZE_KEY] = f"{width}x{height}"
        encoder = container.add_stream(
            "libx264", rate=self._fps, options=_X264_OPTIONS | {"crf": str(self._crf)}
        )
        encoder.width, encoder.height, encoder.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        context = encoder.codec_context
        context.time_base, context.thread_count = 1 / self._fps, _X264_THREADS
        context.colorspace = context.color_primaries = context.color_trc = picture.BT709
        context.color_range = picture.LIMITED
        return container, encoder

    def _encodable(self, shown: UInt8[np.ndarray, "height width 3"]) -> av.VideoFrame:
        frame = self._reformatter.reformat(
            av.VideoFrame.from_ndarray(np.ascontiguousarray(shown), format="rgb24"),
            format="yuv420p",
            src_color_range=picture.FULL,
            dst_colorspace=picture.BT709,
            dst_color_range=picture.LIMITED,
            interpolation=_EXACT,
            threads=1,
        )
        frame.color_primaries = frame.color_trc = picture.BT709
        frame.pts, frame.time_base, frame.duration = self._frames, 1 / self._fps, 1
        self._frames += 1
        return frame


class _DamageError(Exception):
    """The stream stops making sense here."""


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise VideoError(os_error_line(path, error)) from error
    except av.error.FFmpegError as error:
        raise VideoError(f"{path}: cannot be encoded ({error}); check the size and rate") from error


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its main video stream, with FFmpeg's faults told in one line."""
    try:
        # "file:" keeps odd names from being read as protocols; the whitelist keeps playlists off the network.
        local = {"protocol_whitelist": "file"}
        with av.open(f"file:{path}", options=local, metadata_errors="replace") as container:
            videos = [v for v in container.streams.video if not v.disposition & Disposition.attached_pic]
            if not videos or container.format.name in _TEXT_ART:
                raise VideoError(f"{path}: has no video; give a clip or a picture")
            yield container, videos[0]
    except OSError as error:
        raise VideoError(os_error_line(path, error)) from error
    except (av.error.FFmpegError, ValueError) as error:
        if isinstance(error, VideoError):
            raise
        raise VideoError(f"{path}: not a video that FFmpeg can read, or {_DAMAGED}") from error


def _examine(path: Path) -> _Examined:
    try:
        stat = path.stat()
        if path.is_dir():
            raise VideoError(f"{path}: is a folder; name a video file")
    except OSError as error:
        raise VideoError(os_error_line(path, error)) from error
    if stat.st_size == 0 and path.is_file():
        raise VideoError(f"{path}: is empty (0 bytes); copy or export it again")
    return _examine_version(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=32)
def _examine_version(path: Path, _modified: int, size: int) -> _Examined:
    with _opened(path) as (container, video):
        first = next(_frames(container, video), None)
        if first is None:
            raise VideoError(f"{path}: no frame decodes; the file is {_DAMAGED}")
        display = picture.display_of(first, video.codec_context.name)
        display = display.cropped(container.metadata.get(_SIZE_KEY))
        with _opened(path) as (unread, packets):
            timeline = timeline_of(unread, packets, size, first.pts)
        height, width = display.size
        aspect = video.sample_aspect_ratio or Fraction(1)
        info = VideoInfo(
            path=path,
            codec=video.codec_context.name,
            width=width,
            height=height,
            frames=timeline.frames,
            fps=timeline.fps,
            duration=timeline.frames / timeline.fps,
            pixel_format=first.format.name,
            bit_depth=max(component.bits for component in first.format.components),
            rotation=display.orientation.rotation,
            variable_frame_rate=timeline.variable,
            sample_aspect_ratio=1 / aspect if display.orientation.transpose else aspect,
            color=ColorTags.of(first),
            audio=bool(container.streams.audio),
            metadata=dict(container.metadata),
        )
    return _Examined(info=info, timeline=timeline, display=display)


def _pictures(
    path: Path, examined: _Examined, start: int, stop: int, partial: bool
) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    display, reformatter, done = examined.display, VideoReformatter(), start
    with _opened(path) as (container, video):
        video.thread_type = "AUTO"
        try:
            for frame in _sequence(path, container, video, examined.timeline, range(start, stop)):
                converted = reformatter.reformat(
                    frame,
                    height=display.stored[0],
                    width=display.stored[1],
                    format="rgba" if display.alpha else "rgb24",
                    src_colorspace=display.matrix,
                    src_color_range=display.range,
                    dst_color_range=picture.FULL,
                    interpolation=_EXACT,
                    threads=1,
                )
                yield display.finish(converted.to_ndarray())
                done += 1
        except (_DamageError, av.error.FFmpegError):
            if not partial:
                raise VideoError(f"{path}: frame {done} does not decode; the file is {_DAMAGED}") from None


def _sequence(
    path: Path, container: InputContainer, video: VideoStream, timeline: Timeline, span: range
) -> Iterator[av.VideoFrame]:
    """Exactly the frames of `span`; a packet that decodes to nothing shows the frame before it again."""
    held, following = None, span.start
    for position, frame in enumerate(_from_keyframe(path, container, video, timeline, span.start)):
        index = timeline.index_of(frame.pts, position)
        while following < min(index, span.stop):
            if held is None:
                raise _DamageError
            yield held
            following += 1
        if index == following < span.stop:
            yield frame
            following += 1
        if following == span.stop:
            return
        held = frame
    raise _DamageError


def _from_keyframe(
    path: Path, container: InputContainer, video: VideoStream, timeline: Timeline, start: int
) -> Iterator[av.VideoFrame]:
    """Frames from a keyframe at or before `start`, or from the first one."""
    if timeline.pts is None or start == 0:
        yield from _frames(container, video)
        return
    # With open groups of pictures a seek can land on a keyframe that is shown after the frame wanted.
    for back in (0, 16, 64, 256, 1024):
        container.seek(int(timeline.pts[max(0, start - back)]), stream=video)
        frames = _frames(container, video)
        first = next(frames, None)
        if first is not None and timeline.index_of(first.pts, start) <= start:
            yield first
            yield from frames
            return
    # Transport streams have no index, and a seek cannot reach the very first keyframe.
    with _opened(path) as (unread, again):
        yield from _frames(unread, again)


def _frames(container: InputContainer, video: VideoStream) -> Iterator[av.VideoFrame]:
    """Decode up to the first damage; packets before a first decodable one (a cut broadcast) do not count."""
    begun = False
    for packet in container.demux(video):
        try:
            frames = [] if packet.is_corrupt and begun else packet.decode()
            damaged = packet.is_corrupt
        except av.error.InvalidDataError:
            frames, damaged = [], True
        begun = begun or bool(frames)
        yield from frames
        if damaged and begun:
            yield from video.decode(None)
            raise _DamageError
