"""Scenes of the toy world, each from its seed alone."""

from typing import Literal, TypeVar, get_args

import numpy as np

from kinoflow.configs.errors import UserError
from kinoflow.data.world.draw import contrast
from kinoflow.data.world.scene import (
    CAMERAS,
    COLORS,
    GROUNDS,
    SHAPES,
    TEXTURES,
    Relation,
    Scene,
    Split,
    Thing,
    combinations,
    require,
)
from kinoflow.data.world.words import WORDS

_T = TypeVar("_T")

_DIAMETERS = {"small": 0.36, "medium": 0.44, "large": 0.54}
_HORIZONTAL = ("moves left", "moves right")
_VERTICAL = ("moves up", "moves down", "bounces")
_WORLD_KEY = 20241117
# Between a thing's tones and its background's: a red thing's darker stripes vanish on maroon.
_LEAST_CONTRAST = 60.0

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

    The first thing's (color, shape, motion) is uniform over the combinations of the split; of `new` every
    other scene is of train's, so that what learns from it need not forget the old colours. One scene in
    five has a second, resting thing, 15 % a sign; a thing that stays still may be filmed by a moving
    camera, on a patterned background only, where one sees it. Raises UserError (split, seed < 0).
    """
    require("split", split, get_args(Split))
    if seed < 0:
        raise UserError(f"seed: {seed} is negative; use 0 or more")
    draws = _Draws(_WORLD_KEY, get_args(Split).index(split), seed)
    color, shape, motion = draws.choice(_COMBINATIONS["train" if split == "new" and seed % 2 else split])
    size = draws.choice(("small", "medium", "medium", "large"))
    texture = draws.choice(TEXTURES[1:]) if draws.uniform() < 0.3 else "plain"
    grounds = tuple(g for g in GROUNDS if contrast(color, texture, f"checkered {g}") >= _LEAST_CONTRAST)
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
