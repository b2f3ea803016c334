"""Draws scenes of the world: anti-aliased signed distances, the same bytes on every machine.

Arrays are float32 and see only operations that IEEE 754 rounds exactly (+ - * / sqrt min max floor);
trigonometry is done on Python floats and rounded to six digits. Letters: f frames, y rows, x columns.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from jaxtyping import Float, UInt8

from kinoflow.data.world.scene import Scene, Thing
from kinoflow.data.world.words import word_bitmap

COLOR_VALUES = {
    "red": (222, 24, 36), "orange": (255, 124, 0), "yellow": (255, 228, 40), "green": (44, 196, 68),
    "blue": (36, 104, 255), "purple": (146, 44, 204), "pink": (255, 128, 196), "white": (246, 246, 246),
    "cyan": (0, 220, 230),
}  # fmt: skip
GROUND_VALUES = {
    "black": (14, 14, 16), "gray": (92, 92, 96), "navy": (16, 24, 78), "brown": (80, 50, 28),
    "teal": (8, 76, 80), "maroon": (84, 14, 38),
}  # fmt: skip
# A pattern's second tone: this much lighter, enough to see the camera move.
GROUND_CONTRAST = 26
# A texture's second tone is the colour times this.
TEXTURE_SHADE = 0.6
_BOARD = (240, 230, 200)
_INK = (36, 26, 24)
_GROUND_CELL = 0.125
# The farthest that a turning shape's corner gets from its centre, in radii (a triangle's: 1.193).
_REACH = 1.2
# Sides per second of a translation, relative growth per second, degrees and bounces per second.
_PACE = {
    "translate": {"slowly": 0.18, "": 0.28, "fast": 0.42},
    "scale": {"slowly": 0.28, "": 0.4, "fast": 0.55},
    "spin": {"slowly": 70.0, "": 110.0, "fast": 160.0},
    "bounce": {"slowly": 0.6, "": 0.85, "fast": 1.15},
}
_BOUNCE_HEIGHT = 0.34
_DIRECTIONS = {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1)}
_PAN_PACE = 0.2
_ZOOM_PACE = 0.25


def _knee(value: float, limit: float) -> float:
    """value near zero, never past ±limit, always rising: value / (1 + (value/limit)^4)^(1/4)."""
    ratio = value / limit
    square = ratio * ratio
    return value / math.sqrt(math.sqrt(1.0 + square * square))


@dataclass(frozen=True, kw_only=True)
class _Pose:
    """Where a thing is in one frame: centre and diameter in sides, turn as cosine and sine."""

    x: float
    y: float
    diameter: float
    cos: float = 1.0
    sin: float = 0.0


def _pose(thing: "Thing", time: float, middle: float) -> _Pose:
    """The thing at `time` seconds of a clip whose middle is at `middle`.

    Translations and growth pass the thing's own place and size at mid-clip and ease off towards the
    frame's border: in a long clip a thing that only ever moves left must slow down or leave.
    """
    motion, elapsed = thing.motion, time - middle
    if motion in _DIRECTIONS:
        step = thing.reach * _knee(_PACE["translate"][thing.speed] * elapsed, 0.36)
        dx, dy = _DIRECTIONS[motion]
        return _Pose(x=thing.x + dx * step, y=thing.y + dy * step, diameter=thing.diameter)
    if motion in ("grows", "shrinks"):
        factor = _knee(_PACE["scale"][thing.speed] * elapsed, 0.5)
        factor = 1.0 + factor if motion == "grows" else 1.0 - factor
        return _Pose(x=thing.x, y=thing.y, diameter=thing.diameter * factor)
    if motion == "bounces":
        phase = _PACE["bounce"][thing.speed] * time
        phase -= math.floor(phase)
        height = _BOUNCE_HEIGHT * thing.reach * (4.0 * phase * (1.0 - phase) - 0.5)
        return _Pose(x=thing.x, y=thing.y - height, diameter=thing.diameter)
    if motion == "spins":
        angle = math.radians(_PACE["spin"][thing.speed] * time)
        cos, sin = round(math.cos(angle), 6), round(math.sin(angle), 6)
        return _Pose(x=thing.x, y=thing.y, diameter=thing.diameter, cos=cos, sin=sin)
    return _Pose(x=thing.x, y=thing.y, diameter=thing.diameter)


def _film(pose: _Pose, camera: tuple[float, float]) -> _Pose:
    """The pose as a camera (pan in sides, zoom) sees it."""
    pan, zoom = camera
    return _Pose(
        x=zoom * (pose.x - pan), y=zoom * pose.y, diameter=zoom * pose.diameter, cos=pose.cos, sin=pose.sin
    )


def _camera(camera: str, elapsed: float) -> tuple[float, float]:
    """Pan in sides and zoom factor, `elapsed` seconds after mid-clip."""
    if camera.startswith("pan"):
        step = _knee(_PAN_PACE * elapsed, 0.3)
        return (-step if camera == "pan left" else step), 1.0
    if camera.startswith("zoom"):
        step = _knee(_ZOOM_PACE * elapsed, 0.35)
        return 0.0, (1.0 + step if camera == "zoom in" else 1.0 - step)
    return 0.0, 1.0


def contrast(color: str, texture: str, background: str) -> float:
    """Least RGB distance between the thing's tones and the background's; black to white is 442."""
    tones: list[tuple[float, ...]] = [COLOR_VALUES[color]]
    if texture != "plain":
        tones.append(tuple(TEXTURE_SHADE * value for value in COLOR_VALUES[color]))
    *pattern, name = background.split(" ")
    grounds: list[tuple[float, ...]] = [GROUND_VALUES[name]]
    if pattern:
        grounds.append(tuple(value + GROUND_CONTRAST for value in GROUND_VALUES[name]))
    return min(math.dist(tone, ground) for tone in tones for ground in grounds)


Plane = Float[np.ndarray, "f y x"]


def _distance(shape: str, x: Plane, y: Plane) -> Plane:
    """Signed distance (negative inside) to the shape of radius 1, y pointing down."""
    return _SHAPES[shape](x, y, np.abs(x), np.abs(y))


def _star(x: Plane, y: Plane) -> Plane:
    """Five points of radius 1.04, y up: the plane is folded onto one edge (x is already folded)."""
    for nx, ny in ((0.809017, -0.587785), (-0.809017, -0.587785)):
        fold = np.maximum(x * np.float32(nx) + y * np.float32(ny), np.float32(0.0)) * np.float32(2.0)
        x, y = x - fold * np.float32(nx), y - fold * np.float32(ny)
    x, y = np.abs(x), y - np.float32(1.04)
    ex, ey = 0.280, -0.655  # from the tip to the inner corner
    inner = np.float32(1.0 / math.sqrt(ex * ex + ey * ey))
    return (y * np.float32(ex) - x * np.float32(ey)) * inner


# The heart: lobes at (±X, Y) of radius R, tip at (0, T), sides along the tangents with normal (NX, NY).
_HEART_X, _HEART_Y, _HEART_R, _HEART_T = 0.44, -0.24, 0.5, 1.04
_HEART_DROP = _HEART_T - _HEART_Y
_HEART_SQUARE = _HEART_X * _HEART_X + _HEART_DROP * _HEART_DROP
_HEART_SIDE = math.sqrt(_HEART_SQUARE - _HEART_R * _HEART_R)
_HEART_NX = np.float32((_HEART_DROP * _HEART_SIDE - _HEART_X * _HEART_R) / _HEART_SQUARE)
_HEART_NY = np.float32((_HEART_DROP * _HEART_R + _HEART_X * _HEART_SIDE) / _HEART_SQUARE)


def _heart(x: Plane, y: Plane) -> Plane:
    """Two round lobes and the wedge that touches them, tip down (x is already folded)."""
    dx, dy = x - np.float32(_HEART_X), y - np.float32(_HEART_Y)
    lobe = np.sqrt(dx * dx + dy * dy) - np.float32(_HEART_R)
    side = x * _HEART_NX + (y - np.float32(_HEART_T)) * _HEART_NY
    beyond_touch = dx * _HEART_NY - dy * _HEART_NX
    wedge = np.maximum(np.maximum(side, beyond_touch), -dy)
    return np.minimum(lobe, wedge)


def _triangle(y: Plane, ax: Plane) -> Plane:
    slant = ax * np.float32(0.866025) - y * np.float32(0.5)
    return np.maximum(slant - np.float32(0.53), y - np.float32(0.66))


_SHAPES: dict[str, Callable[[Plane, Plane, Plane, Plane], Plane]] = {
    "circle": lambda x, y, _ax, _ay: np.sqrt(x * x + y * y) - np.float32(0.96),
    "ring": lambda x, y, _ax, _ay: np.abs(np.sqrt(x * x + y * y) - np.float32(0.74)) - np.float32(0.24),
    "square": lambda _x, _y, ax, ay: np.maximum(ax, ay) - np.float32(0.82),
    "cross": lambda _x, _y, ax, ay: np.maximum(
        np.maximum(ax, ay) - np.float32(0.98), np.minimum(ax, ay) - np.float32(0.3)
    ),
    "diamond": lambda _x, _y, ax, ay: ax * np.float32(0.83205) + ay * np.float32(0.5547) - np.float32(0.57),
    "triangle": lambda _x, y, ax, _ay: _triangle(y, ax),
    "star": lambda _x, y, ax, _ay: _star(ax, np.float32(0.06) - y),
    "heart": lambda _x, y, ax, _ay: _heart(ax, y),
}


def _stripes(position: Float[np.ndarray, "..."], pixel: float) -> Float[np.ndarray, "..."]:
    """+1 and -1 in turn, one unit wide, the edges blended over one pixel of `pixel` units."""
    whole = np.floor(position)
    inside = position - whole
    edge = np.minimum(inside, np.float32(1.0) - inside) * np.float32(2.0 / pixel)
    parity = whole - np.float32(2.0) * np.floor(whole * np.float32(0.5))
    return np.minimum(edge, np.float32(1.0)) * (np.float32(1.0) - np.float32(2.0) * parity)


def _shade(texture: str, x: Plane, y: Plane, pixel: float) -> Plane:
    """0 where the thing has its colour, 1 where it has the darker shade; x, y in radii."""
    half = np.float32(0.5)
    if texture == "striped":
        diagonal = (x + y) * np.float32(1.5) + half
        return half - half * _stripes(diagonal, pixel * 1.5 * math.sqrt(2.0))
    if texture == "checkered":
        product = _stripes(x * np.float32(2.0), pixel * 2.0) * _stripes(y * np.float32(2.0), pixel * 2.0)
        return half - half * product
    u, v = x * np.float32(1.6) + half, y * np.float32(1.6) + half
    u, v = u - np.floor(u) - half, v - np.floor(v) - half
    dots = (np.float32(0.3) - np.sqrt(u * u + v * v)) * np.float32(1.0 / (1.6 * pixel)) + half
    return np.minimum(np.maximum(dots, np.float32(0.0)), np.float32(1.0))


def _ground(scene: "Scene", cameras: list[tuple[float, float]], height: int, width: int) -> np.ndarray:
    """The background as bytes, one frame for each camera."""
    *pattern, name = scene.background.split(" ")
    base = np.asarray(GROUND_VALUES[name], dtype=np.float32)
    canvas = np.empty((len(cameras), height, width, 3), dtype=np.uint8)
    if not pattern:
        canvas[:] = base.astype(np.uint8)
        return canvas
    side = min(height, width)
    xs = (np.arange(width, dtype=np.float32) + np.float32(0.5 - width / 2)) * np.float32(1 / side)
    ys = (np.arange(height, dtype=np.float32) + np.float32(0.5 - height / 2)) * np.float32(1 / side)
    tones = np.asarray([base, base + np.float32(GROUND_CONTRAST)])
    for frame, (pan, zoom) in enumerate(cameras):
        cell = np.float32(1.0 / (zoom * _GROUND_CELL))
        pixel = 1.0 / (zoom * side * _GROUND_CELL)
        shift = np.float32(pan / _GROUND_CELL)
        columns = _stripes(xs * cell + shift, pixel)[None, :]
        rows = _stripes(ys * cell, pixel)[:, None] if pattern[0] == "checkered" else np.ones_like(ys)[:, None]
        mix = (np.float32(0.5) + np.float32(0.5) * (rows * columns))[:, :, None]
        canvas[frame] = _to_bytes(tones[0] + (tones[1] - tones[0]) * mix)
    return canvas


def _to_bytes(values: Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    return (values + np.float32(0.5)).astype(np.uint8)


def _paint(canvas: UInt8[np.ndarray, "f h w 3"], thing: "Thing", poses: list[_Pose]) -> None:
    """Blend the thing into the canvas, computing only the window around it in each frame."""
    _, height, width, _ = canvas.shape
    side = min(height, width)
    window = math.ceil(max(p.diameter for p in poses) * side * _REACH) + 3
    left = [math.floor(p.x * side + width / 2 - window / 2) for p in poses]
    top = [math.floor(p.y * side + height / 2 - window / 2) for p in poses]
    cells = np.arange(window, dtype=np.float32)[None]

    def column(values: list[float]) -> np.ndarray:
        return np.asarray(values, dtype=np.float32)[:, None]

    # Pixels from the centre (small, exact enough in float32), then radii.
    dx = cells + column([x0 + 0.5 - width / 2 - p.x * side for x0, p in zip(left, poses, strict=True)])
    dy = cells + column([y0 + 0.5 - height / 2 - p.y * side for y0, p in zip(top, poses, strict=True)])
    scale = column([2.0 / (p.diameter * side) for p in poses])
    dx, dy = (dx * scale)[:, None, :], (dy * scale)[:, :, None]
    cos = column([p.cos for p in poses])[:, :, None]
    sin = column([p.sin for p in poses])[:, :, None]
    x, y = cos * dx + sin * dy, cos * dy - sin * dx
    cover = np.float32(0.5) - _distance(thing.shape, x, y) / scale[:, :, None]
    cover = np.minimum(np.maximum(cover, np.float32(0.0)), np.float32(1.0))[..., None]
    color = np.asarray(COLOR_VALUES[thing.color], dtype=np.float32)
    if thing.texture != "plain":
        pixel = 2.0 / (min(p.diameter for p in poses) * side)
        shade = _shade(thing.texture, x, y, pixel)[..., None]
        color = color * (np.float32(1.0) - np.float32(1.0 - TEXTURE_SHADE) * shade)
    ink = np.broadcast_to(color, (*cover.shape[:3], 3))
    for f, (x0, y0) in enumerate(zip(left, top, strict=True)):
        rows = slice(max(0, y0), max(0, min(height, y0 + window)))
        columns = slice(max(0, x0), max(0, min(width, x0 + window)))
        inner = slice(rows.start - y0, rows.stop - y0), slice(columns.start - x0, columns.stop - x0)
        below = canvas[f, rows, columns].astype(np.float32)
        canvas[f, rows, columns] = _to_bytes(below + (ink[f][inner] - below) * cover[f][inner])


def _write_sign(canvas: UInt8[np.ndarray, "f h w 3"], word: str, place: str) -> None:
    """A light board with the word, whole pixels a cell, centred at the top or the bottom."""
    _, height, width, _ = canvas.shape
    cell = max(1, (min(height, width) + 16) // 32)
    ink = np.kron(word_bitmap(word), np.ones((cell, cell), dtype=bool))
    ink = np.pad(ink, ((cell, cell), (2 * cell, 2 * cell)))[:height, :width]
    board = np.where(ink[..., None], _INK, _BOARD).astype(np.uint8)
    left = (width - ink.shape[1]) // 2
    gap = min(cell // 2, height - ink.shape[0])
    top = gap if place == "top" else height - ink.shape[0] - gap
    canvas[:, top : top + ink.shape[0], left : left + ink.shape[1]] = board


def render(
    scene: "Scene", *, frames: int, height: int, width: int, fps: Fraction
) -> UInt8[np.ndarray, "frames height width 3"]:
    """Draw the scene as RGB, 0..255; frame i is at i / fps seconds, motion is in units per second.

    Raises ValueError when frames, a side or fps isn't positive.
    """
    for key, value in (("frames", frames), ("height", height), ("width", width), ("fps", fps)):
        if value <= 0:
            raise ValueError(f"{key}: {value} must be positive")
    times = [float(Fraction(i) / fps) for i in range(frames)]
    middle = float(Fraction(frames - 1) / (2 * fps))
    moving = scene.camera != "still"
    cameras = [_camera(scene.camera, time - middle) for time in times] if moving else [(0.0, 1.0)]
    canvas = _ground(scene, cameras, height, width)
    if not moving:
        canvas = np.repeat(canvas, frames, axis=0)
    for thing in reversed(scene.things):
        poses = [_pose(thing, time, middle) for time in times]
        if moving:
            poses = [_film(pose, camera) for pose, camera in zip(poses, cameras, strict=True)]
        _paint(canvas, thing, poses)
    if scene.word is not None:
        _write_sign(canvas, scene.word, scene.word_place)
    return canvas
