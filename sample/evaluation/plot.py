"""The rows of a sweep as a picture: adherence, Fréchet distance and cost against the first swept setting."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from kinoflow.configs.errors import UserError, os_error_line
from kinoflow.configs.files import replacing
from kinoflow.sample.evaluation.sweep import Row

_SCALE = 2  # pixels of the picture to one of its measures
_PANEL, _LEFT, _RIGHT, _TOP, _BOTTOM = (300, 240), 52, 16, 58, 48
_LEGEND = 18
_FONT, _INK, _GRID, _PAPER = 12, (40, 40, 40), (225, 225, 225), (255, 255, 255)
_At = tuple[float | int, float | int]
_COLORS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14), (90, 90, 90))


@dataclass(frozen=True, kw_only=True)
class _Point:
    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class _Axis:
    key: str
    values: list[str]


@dataclass(frozen=True, kw_only=True)
class _Panel:
    title: str
    point: Callable[[Row], _Point]
    from_zero: bool = True


def _exact(value: float) -> _Point:
    return _Point(value=value, low=value, high=value)


def _adherence(row: Row) -> _Point:
    joint = row.evaluation.joint
    return _Point(value=100 * joint.share, low=100 * joint.low, high=100 * joint.high)


# Pillow's own font has no accents.
_PANELS = (
    _Panel(title="adherence, % (95 % interval)", point=_adherence, from_zero=False),
    _Panel(title="Frechet distance", point=lambda row: _exact(row.evaluation.frechet)),
    _Panel(title="passes a clip", point=lambda row: _exact(row.costs.passes)),
)


def plot(path: Path, rows: Sequence[Row], *, title: str) -> None:
    """Write a PNG: a panel each, the first key's values along it, a line for each combination of the others.

    Raises:
        UserError: the file cannot be written.
    """
    key, *others = rows[0].settings
    axis = _Axis(key=key, values=list(dict.fromkeys(row.settings[key] for row in rows)))
    lines: dict[str, list[Row]] = {}
    for row in rows:
        name = ", ".join(f"{other} {row.settings[other]}" for other in others)
        lines.setdefault(name, []).append(row)
    height = _PANEL[1] + _TOP + _BOTTOM + (_LEGEND * len(lines) if others else 0)
    size = (len(_PANELS) * (_PANEL[0] + _LEFT + _RIGHT), height)
    sheet = Image.new("RGB", (size[0] * _SCALE, size[1] * _SCALE), _PAPER)
    canvas = _Canvas(ImageDraw.Draw(sheet))
    canvas.text((size[0] / 2, 16), title, anchor="mm")
    for number, panel in enumerate(_PANELS):
        left = number * (_PANEL[0] + _LEFT + _RIGHT) + _LEFT
        _draw_panel(canvas, left, panel, lines, axis)
    for number, name in enumerate(lines if others else ()):
        at = _TOP + _PANEL[1] + _BOTTOM + number * _LEGEND
        canvas.line([(_LEFT, at), (_LEFT + 24, at)], _color(number), width=2)
        canvas.text((_LEFT + 32, at), name, anchor="lm")
    try:
        with replacing(path) as aside:
            sheet.save(aside, format="PNG")
    except OSError as error:
        raise UserError(os_error_line(path, error)) from None


def _draw_panel(
    canvas: "_Canvas", left: float | int, panel: _Panel, lines: dict[str, list[Row]], axis: _Axis
) -> None:
    width, height = _PANEL
    points = {name: [panel.point(row) for row in rows] for name, rows in lines.items()}
    every = [point for row in points.values() for point in row]
    high = max(point.high for point in every)
    low = 0.0 if panel.from_zero else min(point.low for point in every)
    room = 0.08 * (high - low) or max(1.0, 0.08 * abs(high))
    low, high = low - room, high + room

    def x(value: str) -> float:
        return left + width * (axis.values.index(value) + 0.5) / len(axis.values)

    def y(value: float) -> float:
        return _TOP + height * (high - value) / (high - low)

    canvas.text((left + width / 2, _TOP - 14), panel.title, anchor="mm")
    for share in (0, 0.25, 0.5, 0.75, 1):
        value = low + room + share * (high - low - 2 * room)
        canvas.line([(left, y(value)), (left + width, y(value))], _GRID)
        canvas.text((left - 6, y(value)), f"{value:.4g}", anchor="rm")
    for value in axis.values:
        canvas.text((x(value), _TOP + height + 12), value, anchor="mm")
    canvas.text((left + width / 2, _TOP + height + 32), axis.key, anchor="mm")
    for number, (name, rows) in enumerate(lines.items()):
        color, drawn = _color(number), points[name]
        shift = 4 * (number - (len(lines) - 1) / 2)  # or intervals would lie on each other
        along = [x(row.settings[axis.key]) + shift for row in rows]
        canvas.line([(at, y(point.value)) for at, point in zip(along, drawn, strict=True)], color)
        for at, point in zip(along, drawn, strict=True):
            canvas.line([(at, y(point.low)), (at, y(point.high))], color)
            canvas.dot((at, y(point.value)), color)


def _color(number: int) -> tuple[int, int, int]:
    return _COLORS[number % len(_COLORS)]


class _Canvas:
    """Draws in measures, of which `_SCALE` pixels are one."""

    def __init__(self, draw: ImageDraw.ImageDraw) -> None:
        self._draw, self._font = draw, ImageFont.load_default(size=_FONT * _SCALE)

    def text(self, at: _At, text: str, *, anchor: str) -> None:
        self._draw.text((at[0] * _SCALE, at[1] * _SCALE), text, fill=_INK, font=self._font, anchor=anchor)

    def line(self, points: Sequence[_At], color: tuple[int, int, int], *, width: int = 1) -> None:
        scaled = [(x * _SCALE, y * _SCALE) for x, y in points]
        self._draw.line(scaled, fill=color, width=round(width * _SCALE), joint="curve")

    def dot(self, at: _At, color: tuple[int, int, int], radius: int = 3) -> None:
        x, y = at[0] * _SCALE, at[1] * _SCALE
        r = radius * _SCALE
        self._draw.ellipse((x - r, y - r, x + r, y + r), fill=color)
