"""Read clips, whole, in ranges or as a stream, through FFmpeg (PyAV); `data.video.writer` writes them.

Arrays are RGB uint8, (frames, height, width, 3), 0..255, as a player shows them.

Followed: the stream's matrix and range, linear light (data.video.color); display matrices and EXIF
orientation, mirrored ones too; alpha, also beside the main picture (VP8, VP9, AVIF), over black; edit lists;
variable rates and how long the last frame is shown; time stamps that are those of decoding, equal or missing
(frames are then counted from the first one on); recordings joined or damaged in a broadcast; sizes that the
writer had to make even, as it notes in the container's metadata; a size that changes in mid-stream and keeps
its shape. AVIF and animated WebP are read through Pillow.

Left alone: pixels are not rescaled for a non-square sample aspect ratio, interlaced pictures stay woven, PQ
and HLG are not tone-mapped, of several video streams the first counts.

Refused, in one line: pictures of several pages or (HEIC) tiles, a size that changes its shape, colours that
would come out wrong, what is truncated or damaged unless `partial` is asked for.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import groupby, pairwise
from pathlib import Path

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import UInt8

from kinoflow.configs.errors import UserError, os_error_line
from kinoflow.data.video import decoding, still
from kinoflow.data.video.color import refusal
from kinoflow.data.video.decoding import DAMAGED, DamageError, opened
from kinoflow.data.video.info import ColorTags, VideoInfo
from kinoflow.data.video.picture import Display, Thumbnail, display_of, orientation_of, shrink
from kinoflow.data.video.stamps import counted, timeline_of
from kinoflow.data.video.timeline import Presentation, Timeline
from kinoflow.data.video.writer import SIZE_KEY

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class _Examined:
    """`display` is None for what Pillow reads."""

    info: VideoInfo
    timeline: Timeline
    display: Display | None
    time_base: Fraction


def probe(path: PathLike) -> VideoInfo:
    """Say what a clip is; decodes one frame, and reads all packets only where there is no full index.

    Where time stamps are doubtful, all frames are decoded once, to count them.

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
    times = examined.timeline.times
    return Fraction(0) if times is None else int(times[0]) * examined.time_base


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
        raise UserError(f"{path}: no frame decodes; the file is {DAMAGED}")
    return chunks[0]


def readable(path: PathLike) -> int:
    """How many frames of a clip, from the first one on, decode; all of a whole clip.

    Raises:
        UserError: as `probe`; no frame decodes.
    """
    examined = _examine(Path(path))
    if examined.display is None or not examined.timeline.truncated:
        return examined.timeline.frames
    number, _, _ = decoding.count(Path(path))
    if number == 0:
        raise UserError(f"{path}: no frame decodes; the file is {DAMAGED}")
    return min(number, examined.timeline.frames)


def stream(
    path: PathLike, start: int = 0, end: int | None = None, chunk: int = 32, *, partial: bool = False
) -> Iterator[UInt8[np.ndarray, "frames height width 3"]]:
    """Frames start..end-1 in arrays of `chunk` frames (the last may be shorter), in bounded memory.

    Raises:
        UserError: as `read`, when the iterator reaches the fault.
    """
    path = Path(path)
    examined = _examine(path)
    stop = examined.timeline.frames if end is None else end
    if chunk < 1:
        raise UserError(f"chunk: {chunk} frames; use 1 or more")
    _check_range(path, examined, start, stop)
    if examined.timeline.truncated and end is None and not partial:
        raise UserError(f"{path}: {DAMAGED}")
    size = (examined.info.height, examined.info.width)
    array, filled, left = np.empty((0, *size, 3), np.uint8), 0, stop - start
    for shown in _pictures(path, examined, range(start, stop), partial):
        if filled == 0:
            array = np.empty((min(chunk, left), *size, 3), np.uint8)
        array[filled] = shown
        filled, left = filled + 1, left - 1
        if filled == len(array):
            yield array
            filled = 0
    if filled:
        yield array[:filled]


def thumbnails(path: PathLike, span: range, *, side: int, detail: int, every: int) -> Iterator[Thumbnail]:
    """The frames of `span`, made small for statistics: longer sides of `side` pixels, or what there is.

    Those whose index divides by `every` come at `detail` pixels too. Pixels are averaged before they become
    RGB, several times as fast as `stream`, and the same on every machine; decoding takes one thread.

    Raises:
        UserError: as `stream`.
    """
    path = Path(path)
    examined = _examine(path)
    _check_range(path, examined, span.start, span.stop)
    display, small, large = examined.display, VideoReformatter(), VideoReformatter()
    if display is None:
        for index, picture in zip(span, still.pictures(path, span), strict=True):
            detailed = shrink(picture, detail) if index % every == 0 else None
            yield Thumbnail(index=index, small=shrink(picture, side), large=detailed)
        return
    index = span.start
    try:
        with opened(path) as (container, video):
            video.thread_type = "NONE"
            for frame in _sequence(path, container, video, examined.timeline, span):
                _require_shape(path, display, frame, index)
                detailed = display.finish(frame, large, detail) if index % every == 0 else None
                yield Thumbnail(index=index, small=display.finish(frame, small, side), large=detailed)
                index += 1
    except (DamageError, av.error.FFmpegError):
        raise UserError(f"{path}: frame {index} does not decode; the file is {DAMAGED}") from None


def frames_at(
    path: PathLike, wanted: Sequence[int], *, threads: int | None = None
) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    """The frames of these indices, which rise or repeat, one at a time: those that `stream` gives.

    All from the first to the last are decoded, as they build on each other; only these are converted. One
    that repeats is the same array again. FFmpeg decodes in so many `threads`, by default as many as it likes.

    Raises:
        UserError: as `stream` for the range from the first to the last; no indices, or some that fall.
    """
    path = Path(path)
    examined = _examine(path)
    if len(wanted) == 0 or any(after < before for before, after in pairwise(wanted)):
        raise UserError(f"{path}: the frames to read must be named in rising order; sort their indices")
    _check_range(path, examined, wanted[0], wanted[-1] + 1)
    yield from _pictures(path, examined, wanted, partial=False, threads=threads)


def _check_range(path: Path, examined: _Examined, start: int, stop: int) -> None:
    frames = examined.timeline.frames
    if not 0 <= start < stop <= frames:
        raise UserError(f"{path}: has frames 0:{frames}, not {start}:{stop}; choose a range inside")


def _examine(path: Path) -> _Examined:
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(os_error_line(path, error)) from error
    except ValueError as error:  # a zero byte
        raise UserError(f"{str(path)!r}: no file can have this name; correct it") from error
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a video file")
    if not path.is_file():
        raise UserError(f"{path}: is a pipe or a device; save the clip to a file first")
    if stat.st_size == 0:
        raise UserError(f"{path}: is empty (0 bytes); copy or export it again")
    return _examine_version(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=32)
def _examine_version(path: Path, _modified: int, size: int) -> _Examined:
    try:
        by_pillow = still.is_ours(path)
    except OSError as error:
        raise UserError(os_error_line(path, error)) from error
    if by_pillow:
        found = still.examine(path)
        return _Examined(info=found.info, timeline=found.timeline, display=None, time_base=still.TICK)
    with opened(path) as (container, video):
        first = next(decoding.frames(container, video), None)
        if first is None:
            raise UserError(f"{path}: no frame decodes; the file is {DAMAGED}")
        if (reason := refusal(first)) is not None:
            raise UserError(f"{path}: {reason}")
        demuxer = container.format.name
        if demuxer == "tiff_pipe" and (pages := still.pages(path)) > 1:
            raise UserError(f"{path}: has {pages} pages; save each as a picture in a folder, which is a clip")
        display = display_of(first, video.codec_context.name, orientation_of(path, demuxer, first))
        display = display.cropped(container.metadata.get(SIZE_KEY))
        timeline = _timeline(path, size, first.pts)
        time_base = video.time_base or 1 / timeline.fps
        info = _info(path, container, first, display, timeline)
    return _Examined(info=info, timeline=timeline, display=display, time_base=time_base)


def _timeline(path: Path, size: int, first: int | None) -> Timeline:
    with opened(path) as (container, video):
        timeline, doubtful = timeline_of(container, video, size, first)
    if not doubtful:
        return timeline
    number, rising, damaged = decoding.count(path)
    if rising or (damaged and number == 0):
        return timeline
    return counted(timeline, number if not damaged else max(number, timeline.frames))


def _info(
    path: Path, container: InputContainer, first: av.VideoFrame, display: Display, timeline: Timeline
) -> VideoInfo:
    video = decoding.main_stream(path, container)
    (height, width), aspect = display.size, video.sample_aspect_ratio or Fraction(1)
    times = timeline.presentation(video.time_base or 1 / timeline.fps)
    return VideoInfo(
        path=path,
        codec=video.codec_context.name,
        width=width,
        height=height,
        frames=timeline.frames,
        fps=timeline.fps,
        duration=timeline.frames / timeline.fps if times is None else times.time_of(timeline.frames),
        pixel_format=first.format.name,
        bit_depth=max(component.bits for component in first.format.components),
        rotation=display.orientation.rotation,
        mirrored=display.orientation.mirrored,
        variable_frame_rate=timeline.variable,
        sample_aspect_ratio=1 / aspect if display.orientation.transpose else aspect,
        color=ColorTags.of(first),
        audio=bool(container.streams.audio),
        lost_packets=timeline.lost,
        metadata=dict(container.metadata),
    )


def _pictures(
    path: Path, examined: _Examined, wanted: Sequence[int], partial: bool, threads: int | None = None
) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    """The frames of rising or repeated indices; the others between them are decoded, not converted."""
    display, reformatter, done = examined.display, VideoReformatter(), wanted[0]
    if display is None:
        yield from still.pictures(path, wanted)
        return
    turns = groupby(wanted)
    following, repeats = next(turns)
    with opened(path) as (container, video):
        span = range(wanted[0], wanted[-1] + 1)
        # What threads conceal of a lost packet depends on their timing.
        video.thread_type = "NONE" if examined.timeline.lost or threads == 1 else "AUTO"
        video.codec_context.thread_count = threads or 0
        try:
            for frame in _sequence(path, container, video, examined.timeline, span):
                _require_shape(path, display, frame, done)
                if done == following:
                    picture = display.finish(frame, reformatter)
                    for _ in repeats:
                        yield picture
                    following, repeats = next(turns, (None, ()))
                done += 1
        except (DamageError, av.error.FFmpegError):
            if not partial:
                raise UserError(f"{path}: frame {done} does not decode; the file is {DAMAGED}") from None


def _require_shape(path: Path, display: Display, frame: av.VideoFrame, index: int) -> None:
    if not display.takes(frame):
        height, width = display.stored
        raise UserError(
            f"{path}: frame {index} has {frame.width}x{frame.height} pixels, the first one has "
            f"{width}x{height}; a clip keeps its shape, cut it there"
        )


def _sequence(
    path: Path, container: InputContainer, video: VideoStream, timeline: Timeline, span: range
) -> Iterator[av.VideoFrame]:
    """Exactly the frames of `span`; a packet that decodes to nothing shows the frame before it again."""
    held, following, index = None, span.start, -1
    for frame in _from_keyframe(path, container, video, timeline, span.start):
        index = timeline.index_of(frame.pts, index + 1)
        while following < min(index, span.stop):
            if held is None:
                raise DamageError
            yield held
            following += 1
        if index == following < span.stop:
            yield frame
            following += 1
        if following == span.stop:
            return
        held = frame
    if held is None or not timeline.lost:
        raise DamageError
    for _ in range(following, span.stop):  # the packets that a broadcast lost were its last
        yield held


def _from_keyframe(
    path: Path, container: InputContainer, video: VideoStream, timeline: Timeline, start: int
) -> Iterator[av.VideoFrame]:
    """Frames from a keyframe at or before `start`, or from the first one."""
    if timeline.stamps is None or timeline.sequential or start == 0:
        yield from decoding.frames(container, video)
        return
    # With open groups of pictures a seek can land on a keyframe that is shown after the frame wanted.
    for back in (0, 16, 64, 256, 1024):
        container.seek(int(timeline.stamps[max(0, start - back)]), stream=video)
        frames = decoding.frames(container, video)
        first = next(frames, None)
        if first is not None and timeline.index_of(first.pts, 0) <= start:
            yield first
            yield from frames
            return
    # Transport streams have no index, and a seek cannot reach the very first keyframe.
    with opened(path) as (unread, again):
        yield from decoding.frames(unread, again)
