"""One self-contained HTML page of what the autoencoder lost: figures, curves over time, worst frames."""

import base64
import heapq
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from kinoflow.configs.errors import UserError, os_error_line
from kinoflow.configs.files import replacing
from kinoflow.tae.codec.metrics import Quality

_WORST = 4
_WIDEST = 640  # pixels of a picture on the page
_FULL_ERROR = 64  # levels of 255 at the dark end of the difference map
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 1000, 150, 52, 22  # of one chart
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

    def __init__(self, span: int, keep: int = _WORST) -> None:
        self._span, self._keep, self._seen = span, keep, 0
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
            if len(self._kept) > self._keep:
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
    page = _PAGE.format(
        title=html.escape(Path(figures["input"]).name),
        style=_STYLE,
        facts=_facts(figures),
        tiles="".join(_tile(*tile) for tile in _headlines(figures, quality)),
        charts=_charts(quality, seconds, worst, tile_frames),
        table=_table(quality),
        worst="".join(_comparison(frame, seconds[frame.index]) for frame in worst),
        full=_FULL_ERROR,
        ramp=_uri(_ramp(np.tile(np.linspace(0, _FULL_ERROR, 256), (10, 1)))),
        details="".join(_row(key, value) for key, value in figures.items() if key in _DETAILS),
    )
    try:
        with replacing(path) as aside:
            aside.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(os_error_line(path, error)) from error


def _facts(figures: dict[str, Any]) -> str:
    rate = figures["fps"] if "/" not in figures["fps"] else f"{float(_fraction(figures['fps'])):.3f}"
    facts = (
        f"{figures['width']} × {figures['height']} pixels",
        f"{figures['frames']} frames",
        f"{rate} frames/s ({figures['frame_times']})",
        f"autoencoder {figures['tae']}",
    )
    return " · ".join(html.escape(fact) for fact in facts)


def _fraction(text: str) -> float:
    numerator, _, denominator = text.partition("/")
    return int(numerator) / int(denominator or 1)


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


def _tile(name: str, value: str, unit: str, meaning: str) -> str:
    unit = f" <small>{unit}</small>" if unit and value != "–" else ""
    return (
        f'<div class="tile"><h3>{name}</h3><p class="value">{value}{unit}</p>'
        f"<p>{html.escape(meaning)}</p></div>"
    )


@dataclass(frozen=True, kw_only=True)
class _Curve:
    """Values of some frames; `marks` are frames to circle, `css` the class that gives the colour."""

    name: str
    css: str
    frames: Sequence[int]
    values: Sequence[float]
    marks: Sequence[int] = ()


def _charts(quality: Quality, seconds: Sequence[float], worst: Sequence[Frame], tile_frames: int) -> str:
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
    return "".join(_chart(curve, seconds, borders) for curve in curves if len(curve.values) > 1)


def _chart(curve: _Curve, seconds: Sequence[float], borders: Sequence[int]) -> str:
    ticks, end, floor = _ticks(min(curve.values), max(curve.values)), seconds[-1], _HEIGHT - _BOTTOM
    low, high = ticks[0], ticks[-1]

    def x(time: float) -> str:
        return f"{_LEFT + (_WIDTH - _LEFT - 8) * time / end:.1f}"

    def y(value: float) -> float:
        return 8 + (floor - 8) * (high - value) / (high - low)

    parts = [
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        f'<text x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in ticks
    ]
    parts += [
        f'<text x="{x(time)}" y="{_HEIGHT - 4}" text-anchor="middle">{time:g} s</text>'
        for time in _ticks(0.0, end, most=10)
        if time <= end
    ]
    if len(borders) <= _MOST_BORDERS:
        at = [x(seconds[index]) for index in borders]
        parts += [f'<line class="border" x1="{at}" x2="{at}" y1="8" y2="{floor}"/>' for at in at]
    times = [seconds[index] for index in curve.frames]
    points = " ".join(f"{x(time)},{y(value):.1f}" for time, value in _thinned(times, curve.values))
    parts.append(f'<polyline points="{points}"/>')
    parts += [f'<circle cx="{x(seconds[i])}" cy="{y(curve.values[i]):.1f}" r="4"/>' for i in curve.marks]
    return (
        f'<figure class="{curve.css}"><figcaption>{curve.name}</figcaption><svg viewBox="0 0 {_WIDTH} '
        f'{_HEIGHT}" role="img" aria-label="{curve.name} over time">{"".join(parts)}</svg></figure>'
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


def _table(quality: Quality) -> str:
    rows = (
        ("PSNR, dB", quality.psnr_by_frame, 2, min),
        ("SSIM", quality.ssim_by_frame, 4, min),
        ("Flicker, levels of 255", quality.flicker_by_frame, 3, max),
        ("Perceptual distance", quality.perceptual_by_frame, 4, max),
    )
    cells = ""
    for name, values, digits, worst in rows:
        if values:
            best = max if worst is min else min
            shown = (float(np.mean(values)), float(np.median(values)), worst(values), best(values))
            cells += f"<tr><th>{name}</th>" + "".join(f"<td>{v:.{digits}f}</td>" for v in shown) + "</tr>"
    return cells


def _comparison(frame: Frame, second: float) -> str:
    error = np.abs(frame.source.astype(np.int16) - frame.decoded).mean(axis=2)
    pictures = (("source", frame.source), ("decoded", frame.decoded), ("difference", _ramp(error)))
    cells = "".join(
        f'<figure><img src="{_uri(picture)}" alt="{name} of frame {frame.index}">'
        f"<figcaption>{name}</figcaption></figure>"
        for name, picture in pictures
    )
    figures = f"{second:.2f} s · {frame.psnr:.2f} dB · mean error {error.mean():.1f} levels"
    head = f"<h3>Frame {frame.index} <small>{figures}</small></h3>"
    return f'<section class="frame">{head}<div class="trio">{cells}</div></section>'


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


def _row(key: str, value: Any) -> str:
    shown = f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)
    return f"<tr><th>{key.replace('_', ' ')}</th><td>{html.escape(shown)}</td></tr>"


_DETAILS = {
    "input", "output", "fps", "frame_times", "sound", "seconds", "frames_per_second", "latent_bytes", "tae",
    "tae_sha256",
}  # fmt: skip

_STYLE = """
:root { color-scheme: light; --ink: #1d2530; --soft: #5c6876; --line: #e3e7ec; --wash: #f5f7f9; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 40px 28px 64px; max-width: 1120px; background: #fff; color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 27px; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { margin: 44px 0 14px; font-size: 19px; }
h3 { margin: 0; font-size: 14px; }
small { color: var(--soft); font-weight: 400; font-size: 13px; }
.facts, .note { margin: 4px 0 0; color: var(--soft); }
.note { margin: -8px 0 16px; font-size: 13.5px; }
.tiles { display: grid; grid-template-columns: repeat(3, 1fr); gap: 12px; margin-top: 26px; }
.tile { padding: 14px 16px; background: var(--wash); border: 1px solid var(--line); border-radius: 8px; }
.tile h3 { color: var(--soft); font-size: 13px; font-weight: 600; }
.tile p { margin: 0; color: var(--soft); font-size: 12.5px; line-height: 1.35; overflow-wrap: anywhere; }
.tile .value { margin: 2px 0 5px; color: var(--ink); font-size: 25px; font-weight: 650; line-height: 1.2; }
figure { margin: 0; }
figcaption { color: var(--soft); font-size: 13px; }
svg { display: block; width: 100%; height: auto; margin-bottom: 14px; }
svg text { fill: var(--soft); font-size: 11.5px; }
polyline { fill: none; stroke: var(--hue); stroke-width: 1.6; stroke-linejoin: round; }
circle { fill: #fff; stroke: var(--hue); stroke-width: 2; }
.grid { stroke: var(--line); }
.border { stroke: #b9c2cc; stroke-dasharray: 2 4; }
.c1 { --hue: #1f6fb2; } .c2 { --hue: #2a8a5b; } .c3 { --hue: #b4531f; } .c4 { --hue: #7a4fa3; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, .details td { text-align: left; }
th { font-weight: 500; color: var(--soft); white-space: nowrap; }
.details td { overflow-wrap: anywhere; }
.frame { margin-bottom: 26px; }
.trio { display: grid; grid-template-columns: repeat(3, 1fr); gap: 10px; margin-top: 8px; }
.trio img { display: block; width: 100%; border: 1px solid var(--line); }
.legend { display: flex; align-items: center; gap: 8px; margin-bottom: 16px; color: var(--soft);
  font-size: 13px; }
.legend img { width: 180px; height: 10px; border: 1px solid var(--line); }
@media (max-width: 700px) { .tiles { grid-template-columns: 1fr 1fr; } .trio { grid-template-columns: 1fr; } }
@media print { body { padding: 0; } .frame, figure { break-inside: avoid; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: what the autoencoder lost</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1><p class="facts">{facts}</p></header>
<div class="tiles">{tiles}</div>
<h2>Over time</h2>
<p class="note">Dashed lines are the borders of tiles in time; circles are the worst frames shown below.</p>
{charts}
<h2>Frame by frame</h2>
<table><tr><th></th><th>mean</th><th>median</th><th>worst</th><th>best</th></tr>{table}</table>
<h2>Worst frames</h2>
<p class="note">The frames with the lowest PSNR, at most one of each second. The difference is the mean
absolute error of red, green and blue.</p>
<div class="legend"><span>0</span><img src="{ramp}" alt="colours of the error">
<span>{full} levels of 255, or more</span></div>
{worst}
<h2>Details</h2>
<table class="details">{details}</table>
</body>
</html>
"""
