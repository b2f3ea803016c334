"""One piece of a video, decoded once and small: what every stage says of each of its frames."""

import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from kinoflow.configs.errors import UserError, one_line
from kinoflow.data import video
from kinoflow.data.clips import pace
from kinoflow.data.clips.remote import local, place
from kinoflow.data.engine import borders, duplicates, motion, quality, text, transnet
from kinoflow.data.engine.config import ScanConfig
from kinoflow.data.engine.dissolves import dissolve_signal, reach, tiny
from kinoflow.data.engine.parts import FLOATS, Signals, write_signals
from kinoflow.data.engine.shots import Changes

_BLOCK = 64  # flows that are looked at together, for the memory they take


def spans(frames: int, fps: Fraction, seconds: float) -> list[range]:
    """The pieces in which a video is looked at, of nearly equal length and at most so many seconds."""
    count = max(1, math.ceil(frames / (seconds * fps)))
    at = [frames * index // count for index in range(count + 1)]
    return [range(*pair) for pair in pairwise(at)]


def scan_to(path: str, span: range, out: Path, config: ScanConfig) -> str:
    """Scan a piece of what lies at a path or URL into a part; what is wrong with it, or an empty string.

    Raises:
        UserError: it cannot be read at all, or the part cannot be written.
    """
    with local(place(path)) as file:
        signals = scan(file, span, config)
    write_signals(out, signals)
    return signals.fault


def scan(path: Path, span: range, config: ScanConfig) -> Signals:
    """What the stages say of the frames of a piece: the same whatever the pieces are.

    Stages that compare frames look at those before and behind the piece as well. Where a frame does not
    decode, those behind it in the piece are left out.

    Raises:
        UserError: the file cannot be read at all.
    """
    import cv2

    cv2.setNumThreads(1)  # there is a worker for each core
    info, times = video.probe(path), pace.times_of(path)
    fps = float(info.fps)
    wide = range(max(0, span.start - reach(fps)), min(info.frames, span.stop + reach(fps)))
    if config.transnet:
        asked = transnet.needed(span, info.frames)
        wide = range(min(wide.start, asked.start), max(wide.stop, asked.stop))
    look, fault = _Look(config, fps, wide), ""
    try:
        for picture in video.thumbnails(path, wide, side=config.side, detail=config.detail, every=look.step):
            look.at(picture, inside=picture.index in span)
    except UserError as error:
        fault = one_line(error)
    seen = range(span.start, min(span.stop, wide.start + look.count))
    fault = fault if len(seen) < len(span) else ""
    return look.signals(seen, times, fault)


@dataclass(kw_only=True)
class _Steps:
    """Frames between those that a stage looks at."""

    detail: int
    text: int
    hash: int


class _Look:
    """Gathers what the stages say, frame by frame, from neighbours of the piece on."""

    def __init__(self, config: ScanConfig, fps: float, wide: range) -> None:
        def step(seconds: float) -> int:
            return max(1, round(seconds * fps))

        detail = step(config.every)
        # Text is sought in pictures that are large already.
        self._steps = _Steps(detail=detail, text=detail * max(1, round(config.text_every / config.every)),
                             hash=step(config.hash_every))  # fmt: skip
        self._fps, self._text, self._wide = fps, config.text != "none", wide
        self._changes = Changes()
        self._before: np.ndarray | None = None
        self._values = {key: np.full(len(wide), math.nan, np.float32) for key in FLOATS}
        self._flows: dict[int, np.ndarray] = {}
        self._hashes = np.zeros(len(wide), np.uint64)
        self._pictures: list[bytes | None] = [None] * len(wide)
        self._tiny: list[np.ndarray] = []
        self._transnet: list[np.ndarray] | None = [] if config.transnet else None
        self.count = 0

    @property
    def step(self) -> int:
        """How many frames lie between large pictures."""
        return self._steps.detail

    def at(self, picture: Any, *, inside: bool) -> None:
        """Look at the next frame; of those outside of the piece only what comparisons need."""
        import cv2

        at = self.count
        self.count += 1
        self._tiny.append(tiny(picture.small))
        if self._transnet is not None:
            self._transnet.append(transnet.small(picture.small))
        self._values["change"][at] = self._changes(picture.small)
        gray = cv2.cvtColor(picture.small, cv2.COLOR_RGB2GRAY)
        if inside:
            self._note(at, quality.brightness(gray))
            if picture.large is not None:
                self._note(at, self._detailed(picture))
                self._pictures[at] = _jpeg(picture.small)
            if picture.index % self._steps.hash == 0:
                self._hashes[at] = duplicates.picture_hash(gray)
            if self._before is not None:
                self._flows[at] = motion.flow(self._before, gray)
        self._before = gray
        if len(self._flows) == _BLOCK:
            self._move()

    def _note(self, at: int, found: dict[str, float]) -> None:
        for key, value in found.items():
            self._values[key][at] = value

    def _move(self) -> None:
        """What the flows say that are not looked at yet."""
        if self._before is None or not self._flows:
            return
        for key, values in motion.motions(np.stack([*self._flows.values()]), self._before.shape).items():
            self._values[key][[*self._flows]] = values
        self._flows.clear()

    def _detailed(self, picture: Any) -> dict[str, float]:
        import cv2

        gray = cv2.cvtColor(picture.large, cv2.COLOR_RGB2GRAY)
        found = borders.borders(gray)
        found["sharpness"] = quality.sharpness(gray)
        if self._text and picture.index % self._steps.text == 0:
            found["text"] = text.text_share(picture.large)
        return found

    def signals(self, seen: range, times: Any, fault: str) -> Signals:
        """What was seen of the frames of the piece."""
        self._move()
        start = self._wide.start
        inner = slice(seen.start - start, max(seen.start, seen.stop) - start)
        values = {key: self._values[key][inner] for key in FLOATS}
        if self._tiny:
            distance, half = dissolve_signal(np.stack(self._tiny), self._fps)
            values |= {"dissolve": distance[inner], "dissolve_half": half[inner]}
        if self._transnet and len(seen):
            one, many = transnet.transitions(np.stack(self._transnet), start, seen)
            values |= {"transnet": one, "transnet_all": many}
        ticks = times.ticks[seen.start : max(seen.start, seen.stop) + 1]
        return Signals(
            first=seen.start, values=values, hashes=self._hashes[inner], pictures=self._pictures[inner],
            ticks=np.asarray(ticks, np.int64), time_base=str(times.time_base), fault=fault,
        )  # fmt: skip


def _jpeg(picture: np.ndarray) -> bytes:
    import cv2

    shown = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    _, data = cv2.imencode(".jpg", shown, [cv2.IMWRITE_JPEG_QUALITY, 75])
    return data.tobytes()
