"""A small world of captioned clips: coloured shapes that move on plain backgrounds.

A scene is sampled from a seed, drawn at any size, length and frame rate, and described in words.
Combinations of colour, shape and motion are split by a fixed hash, so that adherence can be measured
on combinations that were never trained on. Lengths are in sides: 1.0 is the frame's shorter side.
"""

import re
import zlib
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np

from data.captions import caption
from data.draw import contrast, render
from data.words import WORDS

__all__ = [
    "BACKGROUNDS", "CAMERAS", "COLORS", "MOTIONS", "SHAPES", "SIZES", "SPEEDS", "TEXTURES", "WORDS",
    "Scene", "Split", "Thing", "WorldError", "caption", "combinations", "is_heldout", "labels",
    "render", "sample_scene",
]  # fmt: skip

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond")
MOTIONS = (
    "moves left", "moves right", "moves up", "moves down", "bounces", "spins", "grows", "shrinks",
    "stays still",
)  # fmt: skip
TEXTURES = ("plain", "striped", "dotted", "checkered")
SIZES = ("small", "medium", "large")
SPEEDS = ("slowly", "", "fast")
CAMERAS = ("still", "pan left", "pan right", "zoom in", "zoom out")
_GROUNDS = ("black", "gray", "navy", "brown", "teal", "maroon")
BACKGROUNDS = _GROUNDS + tuple(f"{p} {g}" for p in ("checkered", "striped") for g in _GROUNDS)

Split = Literal["train", "heldout"]
Relation = Literal["", "next to", "above", "below"]
_T = TypeVar("_T")

_DIAMETERS = {"small": 0.36, "medium": 0.44, "large": 0.54}
_ROUND_SHAPES = ("circle", "ring")
_HORIZONTAL = ("moves left", "moves right")
_VERTICAL = ("moves up", "moves down", "bounces")
_WORLD_KEY = 20241117
_HELDOUT_SALT = "kinoflow"
_HELDOUT_PERCENT = 10
# Between a thing's tones and its background's: a red thing's darker stripes vanish on maroon.
_LEAST_CONTRAST = 60.0


class WorldError(ValueError):
    """A scene that can't be sampled or drawn."""


def _require(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise WorldError(f"{key}: {value!r} is not one of {', '.join(repr(a) for a in allowed)}")


@dataclass(frozen=True, kw_only=True)
class Thing:
    """A coloured shape; `x`, `y` (centre at mid-clip, from the frame's centre) and `diameter` in sides.

    `reach` scales how far a translation or a bounce carries it. Raises WorldError naming the key.
    """

    shape: str
    color: str
    size: str = "medium"
    texture: str = "plain"
    motion: str = "stays still"
    speed: str = ""
    x: float = 0.0
    y: float = 0.0
    diameter: float = 0.44
    reach: float = 1.0

    def __post_init__(self) -> None:
        _require("shape", self.shape, SHAPES)
        _require("color", self.color, COLORS)
        _require("size", self.size, SIZES)
        _require("texture", self.texture, TEXTURES)
        _require("motion", self.motion, MOTIONS)
        _require("speed", self.speed, SPEEDS)
        if not 0 < self.diameter <= 1:
            raise WorldError(f"diameter: {self.diameter} is not in (0, 1] sides")
        if self.motion == "spins" and self.shape in _ROUND_SHAPES:
            raise WorldError(f"motion: nobody sees a {self.shape} spin; choose another shape or motion")


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One or two things on a background, a camera, and perhaps a sign with a word.

    `relation` says where the first thing is, seen from the second ("" if alone); `word_place` is where
    the sign is. Raises WorldError naming the key.
    """

    things: tuple[Thing, ...]
    background: str = "gray"
    camera: str = "still"
    word: str | None = None
    word_place: Literal["top", "bottom"] = "bottom"
    relation: Relation = ""

    def __post_init__(self) -> None:
        if len(self.things) not in (1, 2):
            raise WorldError(f"things: a scene has one or two, not {len(self.things)}")
        _require("background", self.background, BACKGROUNDS)
        _require("camera", self.camera, CAMERAS)
        if self.word is not None and re.fullmatch("[A-Z]{1,4}", self.word) is None:
            raise WorldError(f"word: {self.word!r} must be one to four letters A-Z")


def is_heldout(color: str, shape: str, motion: str) -> bool:
    """Whether the combination is never the first thing of a train scene (about one in ten)."""
    key = f"{_HELDOUT_SALT}/{color}/{shape}/{motion}"
    return zlib.crc32(key.encode()) % 100 < _HELDOUT_PERCENT


def combinations(split: Split) -> tuple[tuple[str, str, str], ...]:
    """Every (color, shape, motion) that can be seen and belongs to the split, in a fixed order."""
    _require("split", split, get_args(Split))
    return tuple(
        (color, shape, motion)
        for color in COLORS
        for shape in SHAPES
        for motion in MOTIONS
        if not (motion == "spins" and shape in _ROUND_SHAPES)
        and is_heldout(color, shape, motion) == (split == "heldout")
    )


_COMBINATIONS = {split: combinations(split) for split in get_args(Split)}


class _Draws:
    """Random choices straight from PCG64's bits: numpy fixes those for ever, its distributions not."""

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(list(key))

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * ((int(self._bits.random_raw()) >> 11) * 2.0**-53)

    def choice(self, options: tuple[_T, ...]) -> _T:
        return options[int(self.uniform() * len(options))]


def sample_scene(seed: int, *, split: Split = "train") -> Scene:
    """The scene of this seed; the same everywhere and for ever.

    The first thing's (color, shape, motion) is uniform over the combinations of the split. One scene in
    five has a second, resting thing, 15 % a sign; a thing that stays still may be filmed by a moving
    camera, on a patterned background only, where one sees it. Raises WorldError (split, seed < 0).
    """
    _require("split", split, get_args(Split))
    if seed < 0:
        raise WorldError(f"seed: {seed} is negative; use 0 or more")
    draws = _Draws(_WORLD_KEY, get_args(Split).index(split), seed)
    color, shape, motion = draws.choice(_COMBINATIONS[split])
    size = draws.choice(("small", "medium", "medium", "large"))
    texture = draws.choice(TEXTURES[1:]) if draws.uniform() < 0.3 else "plain"
    grounds = tuple(g for g in _GROUNDS if contrast(color, texture, f"checkered {g}") >= _LEAST_CONTRAST)
    background = draws.choice(grounds)
    if draws.uniform() < 0.3:
        background = f"{draws.choice(('checkered', 'striped'))} {background}"
    speed = "" if motion == "stays still" else draws.choice(("slowly", "", "", "fast"))
    kind = draws.uniform()
    if kind < 0.35 and size == "small":
        size = "medium"  # a sign or a second thing leaves less room; the first must stay the largest
    common = {"shape": shape, "color": color, "texture": texture, "motion": motion, "speed": speed}
    if kind < 0.2:
        return _pair(draws, background, size, common)
    if kind < 0.35:
        return _sign(draws, background, size, common)
    camera = "still"
    if motion == "stays still" and draws.uniform() < 0.45:
        camera = draws.choice(CAMERAS[1:])
        if " " not in background:
            background = f"{draws.choice(('checkered', 'striped'))} {background}"
    thing = _place(draws, size, common, x=0.0, y=0.0, scale=1.0)
    return Scene(things=(thing,), background=background, camera=camera)


def _place(draws: _Draws, size: str, common: dict[str, str], *, x: float, y: float, scale: float) -> Thing:
    """The first thing near (x, y), with everything about it scaled; more room to stand across its path."""
    diameter = _DIAMETERS[size] * scale * draws.uniform(0.95, 1.05)
    spread = 0.06 * scale
    wide = 2.0 if common["motion"] in _VERTICAL else 1.0
    tall = 2.0 if common["motion"] in _HORIZONTAL else 1.0
    return Thing(
        **common,
        size=size,
        x=round(x + wide * draws.uniform(-spread, spread), 4),
        y=round(y + tall * draws.uniform(-spread, spread), 4),
        diameter=round(diameter, 4),
        reach=scale,
    )


def _pair(draws: _Draws, background: str, size: str, common: dict[str, str]) -> Scene:
    """Two things: the second rests beside the path of the first."""
    relation: Relation
    if common["motion"] in _HORIZONTAL:
        relation = draws.choice(("above", "below"))
    elif common["motion"] in _VERTICAL:
        relation = "next to"
    else:
        relation = draws.choice(("next to", "above", "below"))
    sign = draws.choice((-1.0, 1.0)) if relation == "next to" else -1.0 if relation == "above" else 1.0
    across = (sign, 0.0) if relation == "next to" else (0.0, sign)
    first = _place(draws, size, common, x=0.16 * across[0], y=0.16 * across[1], scale=0.78)
    along = draws.uniform(-0.12, 0.12)
    second = Thing(
        shape=draws.choice(tuple(s for s in SHAPES if s != common["shape"])),
        color=draws.choice(tuple(c for c in COLORS if c != common["color"])),
        size="small",
        x=round(-0.345 * across[0] + along * abs(across[1]), 4),
        y=round(-0.345 * across[1] + along * abs(across[0]), 4),
        diameter=0.24,
    )
    return Scene(things=(first, second), background=background, relation=relation)


def _sign(draws: _Draws, background: str, size: str, common: dict[str, str]) -> Scene:
    """One thing in the part of the frame that the sign leaves free."""
    place: Literal["top", "bottom"] = draws.choice(("top", "bottom"))
    y = 0.15 if place == "top" else -0.15
    first = _place(draws, size, common, x=0.0, y=y, scale=0.7)
    return Scene(things=(first,), background=background, word=draws.choice(WORDS), word_place=place)


def labels(scene: Scene) -> dict[str, str]:
    """What a judge is asked: color, shape and motion of the first thing, and the word ("" if none)."""
    first = scene.things[0]
    return {"color": first.color, "shape": first.shape, "motion": first.motion, "word": scene.word or ""}
