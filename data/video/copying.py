"""A piece of a clip as a file of its own, its packets copied as they are where they can be."""

from itertools import dropwhile, islice
from pathlib import Path
from typing import Any

import av
import av.error

from kinoflow.configs.errors import UserError, os_error_line
from kinoflow.configs.files import replacing
from kinoflow.data.video import reader
from kinoflow.data.video.decoding import opened
from kinoflow.data.video.writer import VideoWriter

_CHUNK = 32


def extract(path: str | Path, span: range, out: str | Path, *, crf: float = 12) -> bool:
    """Write frames of a clip to an mp4, without its sound; whether the packets were copied.

    They are where the piece begins at a keyframe and nothing behind it is needed to show it, nor anything
    before. Otherwise it is encoded again (H.264, at `crf`).

    Raises:
        UserError: the clip cannot be read, or the file cannot be written.
    """
    path, out = Path(path), Path(out)
    if _copied(path, span, out):
        return True
    info, times = reader.probe(path), reader.presentation(path)
    times = None if times is None else times.cut(span.start, span.stop)
    made = VideoWriter(out, fps=info.fps, width=info.width, height=info.height, crf=crf, presentation=times)
    with made as writer:
        for frames in reader.stream(path, span.start, span.stop, chunk=_CHUNK):
            writer.write(frames)
    return False


class _UnfitError(Exception):
    """The packets cannot be copied."""


def _copied(path: Path, span: range, out: Path) -> bool:
    info = reader.probe(path)
    with opened(path) as (container, video):
        # The times alone: a film's packets are as large as its file.
        times = sorted(
            packet.pts for packet in container.demux(video) if packet.pts is not None and packet.size
        )
        if len(times) != info.frames:
            return False
        try:
            chosen = _closed(container, video, times[span.start], times[span.stop - 1], len(span))
            if not chosen:
                return False
            with replacing(out) as aside:
                _mux(aside, video, chosen)
                there = reader.probe(aside)
                if (there.frames, there.height, there.width) != (len(span), info.height, info.width):
                    raise _UnfitError
        except OSError as error:
            raise UserError(os_error_line(out, error)) from error
        except (_UnfitError, av.error.FFmpegError, ValueError):
            return False  # a codec or a clock that an mp4 does not take
    return True


def _closed(container: Any, video: Any, first: int, last: int, count: int) -> list[Any]:
    """The packets of a piece in their order, if it begins at a keyframe and they build on each other alone.

    `first` and `last` are the times of its frames at the ends, `count` how many it has.
    """
    container.seek(first, stream=video)  # to the keyframe there, or one before
    packets = (packet for packet in container.demux(video) if packet.pts is not None and packet.size)
    chosen = list(islice(dropwhile(lambda packet: packet.pts != first, packets), count))
    inside = all(first <= packet.pts <= last for packet in chosen)
    return chosen if len(chosen) == count and chosen[0].is_keyframe and inside else []


def _mux(path: Path, video: Any, packets: list[Any]) -> None:
    with av.open(f"file:{path}", "w", format="mp4", options={"movflags": "+faststart"}) as container:
        track = container.add_stream_from_template(video)
        begin = min(packet.pts for packet in packets)
        for packet in packets:
            packet.pts -= begin
            packet.dts = None if packet.dts is None else packet.dts - begin
            packet.stream = track
            container.mux(packet)
