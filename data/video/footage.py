"""What the autoencoder is fed: a clip file or a folder of pictures, at its own times or a constant rate."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from kinoflow.configs.errors import UserError, os_error_line
from kinoflow.data.video import frames, reader
from kinoflow.data.video.info import VideoInfo, checked_rate
from kinoflow.data.video.timeline import Presentation

PICTURE_RATE = Fraction(24)  # of a folder of pictures, which says nothing of it
_MOST_REPEATS = 1000


@dataclass(frozen=True, kw_only=True)
class Footage:
    """A clip ready to stream. `info` says what comes out of it, resampling included.

    `presentation` holds the exact times of a variable frame rate, None for a constant one. `repeats` says how
    often each stored frame is shown, None where nothing is resampled. `stored` is how many frames of the file
    are read, None for all.
    """

    info: VideoInfo
    presentation: Presentation | None
    repeats: np.ndarray | None = None
    stored: int | None = None

    @property
    def resampled(self) -> bool:
        """Whether frames are repeated or dropped to reach the rate asked for."""
        return self.repeats is not None

    def stream(self, chunk: int) -> Iterator[UInt8[np.ndarray, "frames height width 3"]]:
        """All frames, in order, a bounded number at a time.

        Raises:
            UserError: a frame does not decode, when it is reached.
        """
        path, done = self.info.path, 0
        source = (
            frames.stream(path, chunk) if path.is_dir() else reader.stream(path, end=self.stored, chunk=chunk)
        )
        for shown in source:
            if self.repeats is None:
                yield shown
                continue
            order = np.repeat(np.arange(len(shown)), self.repeats[done : done + len(shown)])
            done += len(shown)
            for start in range(0, len(order), chunk):
                yield shown[order[start : start + chunk]]


def footage(path: str | Path, fps: Fraction | None = None, *, partial: bool = False) -> Footage:
    """Open a clip, or a folder of pictures (at 24 frames a second unless `fps` says otherwise).

    With `fps`, a clip is resampled to that constant rate: each frame is shown from the slot nearest to its
    own time until the next one, so frames are repeated or dropped, never blended. With `partial`, a truncated
    or damaged clip is the frames before the damage.

    Raises:
        UserError: nothing that can be read as a clip, or a rate that it cannot be brought to.
    """
    path = Path(path)
    fps = None if fps is None else checked_rate(fps)
    if path.is_dir():
        return Footage(info=frames.probe(path, fps or PICTURE_RATE), presentation=None)
    info, times, stored = reader.probe(path), reader.presentation(path), None
    if partial and (stored := reader.readable(path)) < info.frames:
        times = None if times is None else times.cut(0, stored)
        length = stored / info.fps if times is None else times.time_of(stored)
        info = replace(info, frames=stored, duration=length)
    if fps is None or (times is None and fps == info.fps):
        return Footage(info=info, presentation=times, stored=stored)
    if info.frames == 1:  # a picture has no rate to resample
        return Footage(info=replace(info, fps=fps, duration=1 / fps), presentation=None)
    times = times or Presentation.constant(info.frames, info.fps)
    count = round(times.time_of(info.frames) * fps)
    if count > _MOST_REPEATS * info.frames:
        raise UserError(
            f"{path}: {info.frames} frames would become {count} at {fps} frames a second; use a lower rate"
        )
    repeats = times.repeats(fps)
    total = int(repeats.sum())
    resampled = replace(info, fps=fps, frames=total, duration=total / fps, variable_frame_rate=False)
    return Footage(info=resampled, presentation=None, repeats=repeats, stored=stored)


def stamp(path: Path) -> tuple[int, int]:
    """Size in bytes and last change in nanoseconds, of a file or of all pictures of a folder.

    Raises:
        UserError: the file or folder is not there.
    """
    try:
        files = [file.stat() for file in (frames.pictures(path) if path.is_dir() else [path])]
    except OSError as error:
        raise UserError(os_error_line(path, error)) from error
    return sum(file.st_size for file in files), max((file.st_mtime_ns for file in files), default=0)
