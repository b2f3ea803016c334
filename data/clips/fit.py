"""Real clips from a list, cut to a bucket; a bad clip costs one line in a quarantine file, nothing else."""

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from torch.nn.functional import interpolate

from kinoflow.configs.errors import UserError, os_error_line
from kinoflow.configs.files import read_json_lines, seeded
from kinoflow.data import video
from kinoflow.data.clips import pace
from kinoflow.data.clips.buckets import Bucket, admissible
from kinoflow.data.clips.manifest import ClipEntry, Manifest
from kinoflow.data.clips.patience import WAITS, GoneError, OutageError, patiently
from kinoflow.data.clips.remote import Place, Url, local, require, stamp
from kinoflow.data.clips.workers import Workers
from kinoflow.data.video.timeline import Presentation

T = TypeVar("T")
# What makes frames of any size a bucket's: frames, height, width.
Fit = Callable[[UInt8[np.ndarray, "_ _ _ 3"], int, int], UInt8[np.ndarray, "_ _ _ 3"]]
# More bad clips than this, and than this share of the list, are no accident.
_FEW, _LARGE_SHARE = 10, 0.25


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A clip cut to its bucket, RGB 0..255, with its caption, its position in the list and its `stamp`."""

    video: UInt8[np.ndarray, "frames height width 3"]
    caption: str
    position: int
    stamp: str


class Clips:
    """Cuts the clips of a list to buckets: frames nearest in time, centre crop, antialiased resize.

    Each bucket draws on the clips that fill it (data.clips.buckets.admissible). A clip that can't be read is
    written to `quarantine` (JSON lines) and the next good one of the same bucket takes its place: the same
    one on every machine. Clips in the file are not tried again; delete the file after a repair. Those that
    were only not there are, by whoever comes next. Bad rows of the list stand in it too, with their numbers.
    A disk that is away for a moment is waited for; for longer, or with a large share of the list bad, it ends
    in an error.

    `workers` cut the clips; by default that happens here and now. `placed` does what `fit` does by default.
    `of` names the list in the quarantine file, where that is shared with other lists.

    Raises UserError when a URL is of a kind that cannot be read here.
    """

    def __init__(
        self, manifest: Manifest, buckets: Sequence[Bucket], seed: int, quarantine: str | os.PathLike[str],
        workers: Workers | None = None, *, of: str = "", placed: Fit | None = None,
    ) -> None:  # fmt: skip
        self._of = {"list": of} if of else {}
        self._placed = placed or fit
        self._manifest, self._seed, self._quarantine = manifest, seed, Path(quarantine)
        self._workers, self._lock = workers or Workers(0), threading.Lock()
        before = [line for line in _quarantined(self._quarantine) if line.get("list", "") == of]
        # What was not there may be there again.
        self._bad = {_key(line) for line in before if "row" not in line and not line.get("gone")}
        self._gone: set[Place] = set()
        places = (manifest.resolve(entry) for entry in manifest.entries)
        urls = {place.kind: place for place in places if isinstance(place, Url)}
        for url in urls.values():
            require(url)
        for problem in manifest.bad:
            line = {**self._of, "row": problem.row, "path": problem.path, "reason": problem.reason}
            if line not in before:
                self._write(line)
        self._members: dict[str, list[int]] = {str(bucket): [] for bucket in buckets}
        for position, entry in enumerate(manifest.entries):
            for bucket in self._serves(entry, tuple(buckets)):
                self._members[str(bucket)].append(position)

    def count(self, bucket: Bucket) -> int:
        """How many clips of the list, good or bad, serve the bucket."""
        return len(self._members[str(bucket)])

    def get(self, index: int, bucket: Bucket) -> Sample:
        """Clip `index`, modulo `count`, of those that serve the bucket; each round cuts elsewhere in time.

        Raises UserError when every clip of the bucket is bad, the clips' folder is away, or the quarantine
        file can't be written.
        """
        for turn, position in self._candidates(index, bucket):
            entry, stamp = self._manifest.entries[position], self._stamp(turn, position)
            frames = self._read(entry, partial(self._cut, bucket=bucket, turn=turn, piece=entry.piece))
            if frames is not None:
                return Sample(video=frames, caption=entry.caption, position=position, stamp=stamp)
        raise UserError(
            f"{self._manifest.path}: no good clip fills {bucket}; add longer clips, or remove the bucket "
            f"(bad clips: {self._quarantine})"
        )

    def name(self, index: int, bucket: Bucket) -> str:
        """The path in the list of what `get` gives, as far as it is known to be good."""
        found = next(self._candidates(index, bucket), None)
        return "no good clip" if found is None else self._manifest.entries[found[1]].path

    def stamp(self, index: int, bucket: Bucket) -> str:
        """What `get` would say in `Sample.stamp`, without reading the clip: another where it changed.

        It stands for the clip's path, size and time of change, its caption and the window; empty where no
        clip is left.
        """
        return next((self._stamp(*found) for found in self._candidates(index, bucket)), "")

    def _candidates(self, index: int, bucket: Bucket) -> Iterator[tuple[int, int]]:
        """Turns and positions in the list, from `index` on, of clips that are not known to be bad."""
        members = self._members[str(bucket)]
        for turn in range(index, index + len(members)):
            position = members[turn % len(members)]
            if self._manifest.entries[position].key not in self._bad:
                yield turn, position

    def _stamp(self, turn: int, position: int) -> str:
        entry = self._manifest.entries[position]
        now = stamp(self._manifest.resolve(entry))
        return f"{seeded('clip', entry.key, now, entry.caption, turn):016x}"

    def _serves(self, entry: ClipEntry, buckets: tuple[Bucket, ...]) -> tuple[Bucket, ...]:
        """The entry's buckets, from the list where it says enough, else from the file.

        Clips in quarantine count too: a clip that goes bad must not shift the others' indices.
        """
        if entry.frames and entry.fps and entry.width and entry.height:
            duration = entry.frames / entry.fps
            return admissible(
                buckets, duration=duration, fps=entry.fps, width=entry.width, height=entry.height
            )
        found = self._read(entry, partial(_facts, piece=entry.piece))
        if found is None:
            return ()
        info, times = found
        duration, rate = times.time_of(-1), pace.usual_rate(times)
        return admissible(buckets, duration=duration, fps=rate, width=info.width, height=info.height)

    def _cut(
        self, path: Place, bucket: Bucket, turn: int, piece: range | None
    ) -> UInt8[np.ndarray, "frames height width 3"]:
        cutting = partial(cut, piece=piece, threads=self._workers.threads)
        return self._workers.call(cutting, path, bucket, self._seed, turn, self._placed)

    def _read(self, entry: ClipEntry, read: Callable[[Place], T]) -> T | None:
        """What `read` makes of the entry's file; None of a bad one, which is set aside."""
        path = self._manifest.resolve(entry)
        folder = None if isinstance(path, Url) else path.parent
        waits = () if folder in self._gone else WAITS
        try:
            return patiently(lambda: read(path), path, waits)
        except OutageError:
            raise
        except GoneError as error:
            if folder is not None and not folder.exists():
                self._gone.add(folder)
            self._set_aside(entry, str(error), gone=True)
        except UserError as error:
            self._set_aside(entry, str(error))
        return None

    def _set_aside(self, entry: ClipEntry, reason: str, **more: int) -> None:
        with self._lock:  # threads may ask for the same clip
            if entry.key in self._bad:
                return
            self._bad.add(entry.key)
            piece = entry.piece
            if piece is not None:
                more |= {"first_frame": piece.start, "frames": len(piece)}
            self._write({**self._of, "path": entry.path, "reason": reason, **more})
        bad, count = len(self._bad), len(self._manifest.entries)
        if bad > max(_FEW, _LARGE_SHARE * count):
            raise OutageError(f"{self._quarantine}: {bad} of {count} clips cannot be read, the last: {reason}"
                              "; mend the disk, or take them out of the list")  # fmt: skip

    def _write(self, line: dict[str, Any]) -> None:
        """Append one line in one write, so that the lines of several processes don't mix."""
        try:
            self._quarantine.parent.mkdir(parents=True, exist_ok=True)
            with self._quarantine.open("ab", buffering=0) as file:
                file.write((json.dumps(line, ensure_ascii=False) + "\n").encode(errors="replace"))
        except OSError as error:
            raise UserError(os_error_line(self._quarantine, error)) from error


def _quarantined(path: Path) -> list[dict[str, Any]]:
    """Lines written before; one that a crash cut short is skipped."""
    lines = read_json_lines(path)
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("path"), str)]


def _key(line: dict[str, Any]) -> str:
    """As `ClipEntry.key`, of a line of the quarantine file."""
    first, frames = line.get("first_frame"), line.get("frames")
    return ClipEntry(path=line["path"] or "?", first_frame=first, frames=frames).key


def _facts(where: Place, piece: range | None = None) -> tuple[video.VideoInfo, Presentation]:
    with local(where) as path:
        return video.probe(path), _times(path, piece)


def _times(path: Path, piece: range | None) -> Presentation:
    times = pace.times_of(path)
    if piece is None:
        return times
    if piece.stop >= len(times.ticks):
        there = len(times.ticks) - 1
        raise UserError(f"{path}: has frames 0:{there}, not {piece.start}:{piece.stop}; correct the list")
    return times.cut(piece.start, piece.stop)


def cut(
    where: Place,
    bucket: Bucket,
    seed: int,
    turn: int,
    placed: Fit,
    *,
    piece: range | None = None,
    threads: int | None = None,
) -> UInt8[np.ndarray, "frames height width 3"]:
    """Decode a window of a clip, another one in each turn, keeping only the bucket's frames, already small.

    The clip is all of the file, or a `piece` of its frames; FFmpeg decodes in so many `threads`.

    Raises:
        UserError: it cannot be read, or does not fill the bucket.
    """
    with local(where) as path:
        frames = video.frames_at(path, _window(path, bucket, seed, turn, piece), threads=threads)
        return np.concatenate([placed(frame[None], bucket.height, bucket.width) for frame in frames])


def _window(path: Path, bucket: Bucket, seed: int, turn: int, piece: range | None) -> list[int]:
    """Which frames are shown at the bucket's rate in a window of the clip."""
    times, first = _times(path, piece), 0 if piece is None else piece.start
    duration, rate = times.time_of(-1), pace.usual_rate(times)
    if not bucket.filled_by(duration=duration, fps=rate):
        length = f"{float(duration):.2f} seconds at {float(rate):.4g} fps"
        raise UserError(f"{path}: has {length}, too few for {bucket}; correct the list")
    start = seeded("start", seed, turn) % pace.starts(times, bucket.span)
    begin = times.time_of(start)
    return [first + frame for frame in pace.steady(times, begin=begin, rate=bucket.fps, count=bucket.frames)]


def fit(
    frames: UInt8[np.ndarray, "frames h w 3"], height: int, width: int
) -> UInt8[np.ndarray, "frames height width 3"]:
    """Crop the centre to the aspect of `height` x `width`, then resize (bilinear, antialiased)."""
    _, rows, columns, _ = frames.shape
    crop_height = min(rows, max(1, round(columns * height / width)))
    crop_width = min(columns, max(1, round(rows * width / height)))
    top, left = (rows - crop_height) // 2, (columns - crop_width) // 2
    cropped = frames[:, top : top + crop_height, left : left + crop_width]
    return _resized(np.ascontiguousarray(cropped), height, width)


def pad(
    frames: UInt8[np.ndarray, "frames h w 3"], height: int, width: int
) -> UInt8[np.ndarray, "frames height width 3"]:
    """Put the whole picture in the middle of `height` x `width`, made smaller only where it is larger.

    What is around it has the value of its background: of each channel the median of its outermost pixels.
    """
    _, rows, columns, _ = frames.shape
    scale = min(1.0, height / rows, width / columns)
    inner = _resized(frames, max(1, round(rows * scale)), max(1, round(columns * scale)))
    edges = (inner[:, 0], inner[:, -1], inner[:, :, 0], inner[:, :, -1])
    background = np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]), axis=0)
    padded = np.empty((len(frames), height, width, 3), np.uint8)
    padded[:] = background.astype(np.uint8)
    top, left = (height - inner.shape[1]) // 2, (width - inner.shape[2]) // 2
    padded[:, top : top + inner.shape[1], left : left + inner.shape[2]] = inner
    return padded


def _resized(
    frames: UInt8[np.ndarray, "frames h w 3"], height: int, width: int
) -> UInt8[np.ndarray, "frames height width 3"]:
    if frames.shape[1:3] == (height, width):
        return frames
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    small = interpolate(pixels, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
    return small.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
