"""The toy world: captioned clips of coloured shapes, drawn from a seed at any size, length and frame rate."""

from kinoflow.data.world.captions import caption
from kinoflow.data.world.draw import render
from kinoflow.data.world.sample import sample_scene
from kinoflow.data.world.scene import (
    BACKGROUNDS,
    CAMERAS,
    COLORS,
    MOTIONS,
    NEW_COLORS,
    SHAPES,
    SIZES,
    SPEEDS,
    TEXTURES,
    Scene,
    Split,
    Thing,
    combinations,
    is_heldout,
    labels,
)
from kinoflow.data.world.words import WORDS

__all__ = [
    "BACKGROUNDS", "CAMERAS", "COLORS", "MOTIONS", "NEW_COLORS", "SHAPES", "SIZES", "SPEEDS", "TEXTURES",
    "WORDS", "Scene", "Split", "Thing", "caption", "combinations", "is_heldout", "labels",
    "render", "sample_scene",
]  # fmt: skip
