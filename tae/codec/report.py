"""Self-contained HTML pages of what the autoencoder lost: figures, curves over time, worst frames of a clip.

Of a folder each clip has its page, and one more lists them.
"""

import base64
import heapq
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jaxtyping import UInt8
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from kinoflow.configs.errors import UserError, os_error_line
from kinoflow.configs.files import replacing
from kinoflow.tae.codec.metrics import Quality

_TEMPLATE, _INDEX = "report.html.j2", "index.html.j2"
_WORST = 4
_WIDEST = 640  # pixels of a picture on the page
_FULL_ERROR = 64  # levels of 255 at the dark end of the difference map
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _MARGIN = 1000, 150, 52, 22, 8  # of one chart
_POINTS, _MOST_BORDERS = 1000, 120


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A frame of the clip, what became of it, and how far apart they are."""

    index: int
    psnr: float
    source: UInt8[np.ndarray, "height width 3"]
    decoded: UInt8[np.ndarray, "height width 3"]


class WorstFrames:
    """Keep the frames with the lowest PSNR, at most one of each `span`, so that not all are neighbours."""

    def __init__(self, span: int) -> None:
        self._span, self._seen = span, 0
        self._kept: list[tuple[float, int, Frame]] = []  # a heap with the best of the worst on top
        self._current: Frame | None = None

    def update(
        self,
        source: UInt8[np.ndarray, "frames height width 3"],
        decoded: UInt8[np.ndarray, "frames height width 3"],
        psnr: Sequence[float],
    ) -> None:
        """Look at frames that follow those of the call before."""
        for original, restored, value in zip(source, decoded, psnr, strict=True):
            if self._seen % self._span == 0:
                self._settle()
            if self._current is None or value < self._current.psnr:
                self._current = Frame(
                    index=self._seen, psnr=value, source=original.copy(), decoded=restored.copy()
                )
            self._seen += 1

    def frames(self) -> list[Frame]:
        """The worst frames, worst first."""
        self._settle()
        return [frame for _, _, frame in sorted(self._kept, reverse=True)]

    def _settle(self) -> None:
        if self._current is not None:
            heapq.heappush(self._kept, (-self._current.psnr, self._current.index, self._current))
            if len(self._kept) > _WORST:
                heapq.heappop(self._kept)
        self._current = None


def write_report(
    path: Path,
    figures: dict[str, Any],
    quality: Quality,
    *,
    seconds: Sequence[float],
    worst: Sequence[Frame],
    tile_frames: int,
) -> None:
    """Write the page; `seconds` says when each frame begins, `figures` is what `reconstruct` reports.

    Raises:
        UserError: the page cannot be written.
    """
    _write(
        path,
        _TEMPLATE,
        title=Path(figures["input"]).name,
        facts=_facts(figures),
        headlines=_headlines(figures, quality),
        charts=_charts(quality, seconds, worst, tile_frames),
        chart_size=(_WIDTH, _HEIGHT),
        rows=_rows(quality),
        full_error=_FULL_ERROR,
        ramp=_uri(_ramp(np.tile(np.linspace(0, _FULL_ERROR, 256), (10, 1)))),
        worst=[_comparison(frame, seconds[frame.index]) for frame in worst],
        details=[(key.replace("_", " "), _shown(figures[key])) for key in figures if key in _DETAILS],
    )


def write_index(path: Path, figures: dict[str, Any]) -> None:
    """Write the page that leads to those of a folder's clips; `figures` is what the folder's run reports.

    Raises:
        UserError: the page cannot be written.
    """
    rows = [
        {
            "name": Path(clip["input"]).relative_to(figures["input"]),
            "page": quote(os.path.relpath(clip["report"], path.parent)),
            "cells": (
                clip["frames"],
                _number(clip["psnr"], 2),
                _number(clip["ssim"], 4),
                _number(clip["perceptual"], 4),
            ),
        }
        for clip in sorted(figures["results"], key=lambda clip: clip["psnr"])
    ]
    failed = [problem["error"] for problem in figures["failed"]]
    _write(path, _INDEX, title=Path(figures["input"]).resolve().name, rows=rows, failed=failed)


def _write(path: Path, template: str, **values: Any) -> None:
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = templates.get_template(template).render(values)
    try:
        with replacing(path) as aside:
            aside.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(os_error_line(path, error)) from error


def _facts(figures: dict[str, Any]) -> str:
    rate = figures["fps"] if "/" not in figures["fps"] else f"{float(Fraction(figures['fps'])):.3f}"
    facts = (
        f"{figures['width']} × {figures['height']} pixels",
        f"{figures['frames']} frames",
        f"{rate} frames/s ({figures['frame_times']})",
        f"autoencoder {figures['tae']}",
    )
    return " · ".join(facts)


def _headlines(figures: dict[str, Any], quality: Quality) -> list[tuple[str, str, str, str]]:
    """Name, value, unit and meaning of the figures at the top."""
    perceptual = (
        f"mean of {len(quality.perceptual_frames)} frames, lower is closer"
        if quality.perceptual is not None
        else str(figures["perceptual_note"])
    )
    return [
        ("PSNR", f"{quality.psnr:.2f}", "dB", "mean of the frames, higher is closer"),
        ("SSIM", f"{quality.ssim:.4f}", "", "mean of the frames, 1 is equal"),
        ("Perceptual distance", _number(quality.perceptual, 4), "", perceptual),
        (
            "Flicker",
            _number(quality.flicker, 3),
            "levels",
            "change between frames that is not in the clip",
        ),
        ("Seam", _number(quality.seam, 3), "", "flicker at tile borders over flicker inside, 1 is unseen"),
        ("Smaller by", f"{figures['ratio']:.0f}×", "", "RGB bytes over bytes of the latents"),
    ]


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


@dataclass(frozen=True, kw_only=True)
class _Curve:
    """Values of some frames; `marks` are frames to circle, `css` the class that gives the colour."""

    name: str
    css: str
    frames: Sequence[int]
    values: Sequence[float]
    marks: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class _Chart:
    """A curve in coordinates of its picture: labelled ticks, borders of tiles, points and circles."""

    name: str
    css: str
    left: int
    right: int
    top: int
    floor: int
    levels: list[tuple[float, str]]
    times: list[tuple[float, str]]
    borders: list[float]
    points: list[tuple[float, float]]
    circles: list[tuple[float, float]]


def _charts(
    quality: Quality, seconds: Sequence[float], worst: Sequence[Frame], tile_frames: int
) -> list[_Chart]:
    every = range(quality.frames)
    marks = [frame.index for frame in worst]
    curves = (
        _Curve(name="PSNR, dB", css="c1", frames=every, values=quality.psnr_by_frame, marks=marks),
        _Curve(name="SSIM", css="c2", frames=every, values=quality.ssim_by_frame),
        _Curve(name="Flicker, levels of 255", css="c3", frames=every[1:], values=quality.flicker_by_frame),
        _Curve(
            name="Perceptual distance",
            css="c4",
            frames=quality.perceptual_frames,
            values=quality.perceptual_by_frame,
        ),
    )
    borders = range(tile_frames, quality.frames, tile_frames)
    return [_chart(curve, seconds, borders) for curve in curves if len(curve.values) > 1]


def _chart(curve: _Curve, seconds: Sequence[float], borders: Sequence[int]) -> _Chart:
    ticks, end = _ticks(min(curve.values), max(curve.values)), seconds[-1]
    right, top, floor = _WIDTH - _MARGIN, _MARGIN, _HEIGHT - _BOTTOM
    low, high = ticks[0], ticks[-1]

    def x(time: float) -> float:
        return _LEFT + (right - _LEFT) * time / end

    def y(value: float) -> float:
        return top + (floor - top) * (high - value) / (high - low)

    shown = borders if len(borders) <= _MOST_BORDERS else ()
    times = [seconds[index] for index in curve.frames]
    return _Chart(
        name=curve.name,
        css=curve.css,
        left=_LEFT,
        right=right,
        top=top,
        floor=floor,
        levels=[(y(tick), f"{tick:g}") for tick in ticks],
        times=[(x(time), f"{time:g} s") for time in _ticks(0.0, end, most=10) if time <= end],
        borders=[x(seconds[index]) for index in shown],
        points=[(x(time), y(value)) for time, value in _thinned(times, curve.values)],
        circles=[(x(seconds[index]), y(curve.values[index])) for index in curve.marks],
    )


def _thinned(times: Sequence[float], values: Sequence[float]) -> list[tuple[float, float]]:
    """All points, or the lowest and highest of each bin where a chart could not show them all."""
    size = max(1, -(-len(values) // _POINTS))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(values), size):
        part = sorted(zip(values[start : start + size], times[start : start + size], strict=True))
        ends = {(time, value) for value, time in (part[0], part[-1])}
        kept += sorted(ends)
    return kept


def _ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Round numbers that cover low..high: 1, 2, 2.5 or 5 times a power of ten apart."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * times for times in (1, 2, 2.5, 5, 10) if span / (power * times) <= most)
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    return [round(step * index, 12) for index in range(first, last + 1)]


def _rows(quality: Quality) -> list[tuple[str, list[str]]]:
    """Name, and mean, median, worst and best of the frames."""
    every = (
        ("PSNR, dB", quality.psnr_by_frame, 2, min),
        ("SSIM", quality.ssim_by_frame, 4, min),
        ("Flicker, levels of 255", quality.flicker_by_frame, 3, max),
        ("Perceptual distance", quality.perceptual_by_frame, 4, max),
    )
    rows = []
    for name, values, digits, worst in every:
        if values:
            best = max if worst is min else min
            cells = (float(np.mean(values)), float(np.median(values)), worst(values), best(values))
            rows.append((name, [_number(cell, digits) for cell in cells]))
    return rows


def _comparison(frame: Frame, second: float) -> dict[str, Any]:
    """A frame, what became of it and the difference, as pictures with their names, and its figures."""
    error = np.abs(frame.source.astype(np.int16) - frame.decoded).mean(axis=2)
    pictures = (("source", frame.source), ("decoded", frame.decoded), ("difference", _ramp(error)))
    return {
        "index": frame.index,
        "figures": f"{second:.2f} s · {frame.psnr:.2f} dB · mean error {error.mean():.1f} levels",
        "pictures": [(name, _uri(picture)) for name, picture in pictures],
    }


def _ramp(error: np.ndarray) -> UInt8[np.ndarray, "height width 3"]:
    """Levels of error as colours: white, yellow, red, dark red at `_FULL_ERROR` and above."""
    stops = np.array([0, 0.2, 0.55, 1.0]) * _FULL_ERROR
    colors = np.array([[255, 255, 255], [255, 214, 102], [214, 64, 48], [80, 8, 24]], np.float64)
    channels = [np.interp(error, stops, colors[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def _uri(picture: np.ndarray) -> str:
    """A PNG inside the page, no wider than the page shows it."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    if image.width > _WIDEST:
        height = max(1, round(image.height * _WIDEST / image.width))
        image = image.resize((_WIDEST, height), Image.Resampling.BOX)
    data = io.BytesIO()
    image.save(data, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode("ascii")


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


_DETAILS = {
    "input", "output", "fps", "frame_times", "sound", "seconds", "frames_per_second", "latent_bytes", "tae",
    "tae_sha256",
}  # fmt: skip
