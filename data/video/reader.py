"""Read clips, whole, in ranges or as a stream, through FFmpeg (PyAV); `data.video_writer` writes them.

Arrays are RGB uint8, (frames, height, width, 3), 0..255, as a player shows them: the stream's matrix and
range are undone, rotation is applied, alpha is composited over black. Pixels are not rescaled for a
non-square sample aspect ratio, interlaced pictures stay woven, and PQ or HLG is not tone-mapped.

Sizes that the writer had to make even are cropped back, as it notes in the container's metadata.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import UInt8

from kinoflow.configs.errors import UserError, os_error_line
from kinoflow.data.video import picture
from kinoflow.data.video.info import ColorTags, VideoInfo
from kinoflow.data.video.timeline import Presentation, Timeline, timeline_of
from kinoflow.data.video.writer import EXACT, SIZE_KEY

PathLike = str | os.PathLike[str]

_TEXT_ART = {"tty", "bin", "xbin", "adf", "idf"}  # demuxers that would "play" a text file
_DAMAGED = "truncated or damaged; copy or export it again"


@dataclass(frozen=True, kw_only=True)
class _Examined:
    info: VideoInfo
    timeline: Timeline
    display: picture.Display
    time_base: Fraction


def probe(path: PathLike) -> VideoInfo:
    """Say what a clip is; decodes one frame, and reads all packets only where there is no full index.

    Raises:
        UserError: missing, empty, unreadable or damaged file, or one without a video stream.
    """
    info = _examine(Path(path)).info
    return replace(info, metadata=dict(info.metadata))


def presentation(path: PathLike) -> Presentation | None:
    """When each frame of a clip with a variable frame rate is shown; None where the rate is constant.

    Raises:
        UserError: as `probe`.
    """
    examined = _examine(Path(path))
    return examined.timeline.presentation(examined.time_base)


def origin(path: PathLike) -> Fraction:
    """The time stamp of the first frame shown, in seconds: where the clock of picture and sound stands.

    Raises:
        UserError: as `probe`.
    """
    examined = _examine(Path(path))
    pts = examined.timeline.pts
    return Fraction(0) if pts is None else int(pts[0]) * examined.time_base


def read(
    path: PathLike, start: int = 0, end: int | None = None, *, partial: bool = False
) -> UInt8[np.ndarray, "frames height width 3"]:
    """Frames start..end-1 of a clip (to its end by default), decoding from the keyframe before `start`.

    With `partial`, a truncated or damaged file gives the frames before the damage.

    Raises:
        UserError: as `probe`; a range outside the clip; a frame in the range that does not decode.
    """
    stop = _examine(Path(path)).timeline.frames if end is None else end
    chunks = list(stream(path, start, end, chunk=max(1, stop - start), partial=partial))
    if not chunks:
        raise UserError(f"{path}: no frame decodes; the file is {_DAMAGED}")
    return chunks[0]


def stream(
    path: PathLike, start: int = 0, end: int | None = None, chunk: int = 32, *, partial: bool = False
) -> Iterator[UInt8[np.ndarray, "frames height width 3"]]:
    """Frames start..end-1 in arrays of `chunk` frames (the last may be shorter), in bounded memory.

    Raises:
        UserError: as `read`, when the iterator reaches the fault.
    """
    path = Path(path)
    examined = _examine(path)
    frames = examined.timeline.frames
    stop = frames if end is None else end
    if chunk < 1:
        raise UserError(f"chunk: {chunk} frames; use 1 or more")
    if not 0 <= start < stop <= frames:
        raise UserError(f"{path}: has frames 0:{frames}, not {start}:{stop}; choose a range inside")
    if examined.timeline.truncated and end is None and not partial:
        raise UserError(f"{path}: {_DAMAGED}")
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


class _DamageError(Exception):
    """The stream stops making sense here."""


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its main video stream, with FFmpeg's faults told in one line."""
    try:
        # "file:" keeps odd names from being read as protocols; the whitelist keeps playlists off the network.
        local = {"protocol_whitelist": "file"}
        with av.open(f"file:{path}", options=local, metadata_errors="replace") as container:
            videos = [v for v in container.streams.video if not v.disposition & Disposition.attached_pic]
            if not videos or container.format.name in _TEXT_ART:
                raise UserError(f"{path}: has no video; give a clip or a picture")
            yield container, videos[0]
    except OSError as error:
        raise UserError(os_error_line(path, error)) from error
    except (av.error.FFmpegError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a video that FFmpeg can read, or {_DAMAGED}") from error


def _examine(path: Path) -> _Examined:
    try:
        stat = path.stat()
        if path.is_dir():
            raise UserError(f"{path}: is a folder; name a video file")
    except OSError as error:
        raise UserError(os_error_line(path, error)) from error
    if not path.is_file():
        raise UserError(f"{path}: is a pipe or a device; save the clip to a file first")
    if stat.st_size == 0:
        raise UserError(f"{path}: is empty (0 bytes); copy or export it again")
    return _examine_version(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=32)
def _examine_version(path: Path, _modified: int, size: int) -> _Examined:
    with _opened(path) as (container, video):
        first = next(_frames(container, video), None)
        if first is None:
            raise UserError(f"{path}: no frame decodes; the file is {_DAMAGED}")
        display = picture.display_of(first, video.codec_context.name)
        display = display.cropped(container.metadata.get(SIZE_KEY))
        with _opened(path) as (unread, packets):
            timeline = timeline_of(unread, packets, size, first.pts)
        height, width = display.size
        time_base = video.time_base or 1 / timeline.fps
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
    return _Examined(info=info, timeline=timeline, display=display, time_base=time_base)


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
                    interpolation=EXACT,
                    threads=1,
                )
                yield display.finish(converted.to_ndarray())
                done += 1
        except (_DamageError, av.error.FFmpegError):
            if not partial:
                raise UserError(f"{path}: frame {done} does not decode; the file is {_DAMAGED}") from None


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
