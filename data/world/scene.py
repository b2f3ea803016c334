"""What a scene of the toy world is: coloured shapes that move on plain backgrounds.

Combinations of colour, shape and motion are split by a fixed hash, so that adherence can be measured
on combinations that were never trained on. Lengths are in sides: 1.0 is the frame's shorter side.
"""

import re
import zlib
from dataclasses import dataclass
from typing import Literal, get_args

from kinoflow.configs.errors import UserError

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
NEW_COLORS = ("cyan",)
"""In no scene of train or heldout: what a release does not know, and a fine-tuning may teach."""
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond")
MOTIONS = (
    "moves left", "moves right", "moves up", "moves down", "bounces", "spins", "grows", "shrinks",
    "stays still",
)  # fmt: skip
TEXTURES = ("plain", "striped", "dotted", "checkered")
SIZES = ("small", "medium", "large")
SPEEDS = ("slowly", "", "fast")
CAMERAS = ("still", "pan left", "pan right", "zoom in", "zoom out")
GROUNDS = ("black", "gray", "navy", "brown", "teal", "maroon")
BACKGROUNDS = GROUNDS + tuple(f"{p} {g}" for p in ("checkered", "striped") for g in GROUNDS)

Split = Literal["train", "heldout", "new"]
Relation = Literal["", "next to", "above", "below"]

_ROUND_SHAPES = ("circle", "ring")
_HELDOUT_SALT = "kinoflow"
_HELDOUT_PERCENT = 10


def require(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{key}: {value!r} is not one of {', '.join(repr(a) for a in allowed)}")


@dataclass(frozen=True, kw_only=True)
class Thing:
    """A coloured shape; `x`, `y` (centre at mid-clip, from the frame's centre) and `diameter` in sides.

    `reach` scales how far a translation or a bounce carries it. Raises UserError naming the key.
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
        require("shape", self.shape, SHAPES)
        require("color", self.color, COLORS + NEW_COLORS)
        require("size", self.size, SIZES)
        require("texture", self.texture, TEXTURES)
        require("motion", self.motion, MOTIONS)
        require("speed", self.speed, SPEEDS)
        if not 0 < self.diameter <= 1:
            raise UserError(f"diameter: {self.diameter} is not in (0, 1] sides")
        if self.motion == "spins" and self.shape in _ROUND_SHAPES:
            raise UserError(f"motion: nobody sees a {self.shape} spin; choose another shape or motion")


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One or two things on a background, a camera, and perhaps a sign with a word.

    `relation` says where the first thing is, seen from the second ("" if alone); `word_place` is where
    the sign is. Raises UserError naming the key.
    """

    things: tuple[Thing, ...]
    background: str = "gray"
    camera: str = "still"
    word: str | None = None
    word_place: Literal["top", "bottom"] = "bottom"
    relation: Relation = ""

    def __post_init__(self) -> None:
        if len(self.things) not in (1, 2):
            raise UserError(f"things: a scene has one or two, not {len(self.things)}")
        require("background", self.background, BACKGROUNDS)
        require("camera", self.camera, CAMERAS)
        if self.word is not None and re.fullmatch("[A-Z]{1,4}", self.word) is None:
            raise UserError(f"word: {self.word!r} must be one to four letters A-Z")


def is_heldout(color: str, shape: str, motion: str) -> bool:
    """Whether the combination is never the first thing of a train scene (about one in ten)."""
    key = f"{_HELDOUT_SALT}/{color}/{shape}/{motion}"
    return zlib.crc32(key.encode()) % 100 < _HELDOUT_PERCENT


def combinations(split: Split) -> tuple[tuple[str, str, str], ...]:
    """Every (color, shape, motion) that can be seen and belongs to the split, in a fixed order.

    Those of `new` are all of the new colours.
    """
    require("split", split, get_args(Split))
    return tuple(
        (color, shape, motion)
        for color in (NEW_COLORS if split == "new" else COLORS)
        for shape in SHAPES
        for motion in MOTIONS
        if not (motion == "spins" and shape in _ROUND_SHAPES)
        and (split == "new" or is_heldout(color, shape, motion) == (split == "heldout"))
    )


def labels(scene: Scene) -> dict[str, str]:
    """What a judge is asked: color, shape and motion of the first thing, and the word ("" if none)."""
    first = scene.things[0]
    return {"color": first.color, "shape": first.shape, "motion": first.motion, "word": scene.word or ""}
