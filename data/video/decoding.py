"""FFmpeg's side of reading: files opened safely, and their frames in the order in which they are shown."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import av.error
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from kinoflow.configs.errors import UserError, os_error_line
from kinoflow.data.video.stamps import Clock, is_broadcast

DAMAGED = "truncated or damaged; copy or export it again"

_TEXT_ART = {"tty", "bin", "xbin", "adf", "idf"}  # demuxers that would "play" a text file
_PICTURES_OF_MANY = {"heic", "heix", "heim", "heis", "mif1", "msf1"}
_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own decoders leave alpha out


class DamageError(Exception):
    """The stream stops making sense here."""


@contextmanager
def opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its main video stream, with FFmpeg's faults told in one line."""
    try:
        # "file:" keeps odd names from being read as protocols; the whitelist keeps playlists off the network.
        local = {"protocol_whitelist": "file"}
        with av.open(f"file:{path}", options=local, metadata_errors="replace") as container:
            yield container, main_stream(path, container)
    except OSError as error:
        raise UserError(os_error_line(path, error)) from error
    except (av.error.FFmpegError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a video that FFmpeg can read, or {DAMAGED}") from error


def frames(container: InputContainer, video: VideoStream) -> Iterator[av.VideoFrame]:
    """Decode up to the first damage; packets before a first decodable one (a cut broadcast) do not count.

    A broadcast that lost packets goes on behind them, as on a screen.

    Raises:
        DamageError: after the last good frame.
    """
    begun, broadcast, clock = False, is_broadcast(container), Clock(container)
    decoder = decoder_of(video)
    for packet in container.demux(video):
        clock.correct(packet)
        damaged = packet.is_corrupt and not broadcast
        try:
            shown = [] if damaged and begun else decoder.decode(packet if packet.size else None)
        except av.error.InvalidDataError:
            shown, damaged = [], not broadcast
        begun = begun or bool(shown)
        yield from shown
        if damaged and begun:
            yield from decoder.decode(None)
            raise DamageError


def count(path: Path) -> tuple[int, bool, bool]:
    """How many frames decode, whether their stamps rise, and whether damage ends them."""
    number, rising, before = 0, True, None
    with opened(path) as (container, video):
        video.thread_type = "AUTO"
        try:
            for frame in frames(container, video):
                rising = rising and frame.pts is not None and (before is None or frame.pts > before)
                number, before = number + 1, frame.pts
        except (DamageError, av.error.FFmpegError):
            return number, rising, True
    return number, rising, False


def decoder_of(video: VideoStream) -> Any:
    """The stream's decoder, or for VP8 and VP9 with transparency the one that knows it."""
    name = _WITH_ALPHA.get(video.codec_context.name)
    if name is None or video.metadata.get("alpha_mode") != "1" or name not in av.codecs_available:
        return video.codec_context
    return av.CodecContext.create(name, "r")


def main_stream(path: Path, container: InputContainer) -> VideoStream:
    """The first video stream that is no cover.

    Raises:
        UserError: none that can be read as a clip.
    """
    videos = [v for v in container.streams.video if not v.disposition & Disposition.attached_pic]
    if not videos or container.format.name in _TEXT_ART:
        raise UserError(f"{path}: has no video; give a clip or a picture")
    if videos[0].codec_context is None:
        raise UserError(f"{path}: its video is of a kind that this FFmpeg does not decode; convert it")
    if len(videos) > 1 and container.metadata.get("major_brand") in _PICTURES_OF_MANY:
        raise UserError(
            f"{path}: is put together from {len(videos)} pictures (tiles or transparency), which is not done "
            "here for HEIC; convert it to PNG or AVIF"
        )
    return videos[0]
