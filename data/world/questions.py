"""What can be asked of a clip of the world, all that a caption can name, and what a caption asks for."""

import re
from collections.abc import Mapping

from kinoflow.data.world.captions import CAMERA_WORDS, MOTION_PHRASES, SIZE_WORDS, SPEED_WORDS, TEXTURE_WORDS
from kinoflow.data.world.scene import (
    CAMERAS,
    COLORS,
    GROUNDS,
    MOTIONS,
    SHAPES,
    SIZES,
    SPEEDS,
    TEXTURES,
    Scene,
)

PATTERNS = ("", "checkered", "striped")
QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "color": COLORS, "shape": SHAPES, "texture": TEXTURES, "size": SIZES, "motion": MOTIONS, "speed": SPEEDS,
    "second_color": ("", *COLORS), "second_shape": ("", *SHAPES), "second_texture": ("", *TEXTURES),
    "relation": ("", "next to", "above", "below"), "background": GROUNDS, "pattern": PATTERNS,
    "camera": CAMERAS, "sign": ("", "top", "bottom"),
}  # fmt: skip
"""Each attribute and its classes, "" where there is none; the word of a sign is read besides."""
ABSENT = {
    "texture": "plain", "second_color": "", "second_shape": "", "second_texture": "", "relation": "",
    "pattern": "", "camera": "still", "sign": "", "word": "",
}  # fmt: skip
"""What an attribute is where nobody asks for it, and what nobody asks for must not be there."""


def _one_of(*words: str) -> str:
    """A pattern for one of these words, the longest that fits."""
    return rf"\b({'|'.join(map(re.escape, sorted(words, key=len, reverse=True)))})\b"


_SIGN = re.compile(r'"([A-Z]+)"(?: (above|below))?')
_GROUND = re.compile(rf"(?:\b(checkered|striped) )?{_one_of(*GROUNDS)}")
_SECOND = re.compile(
    r"\b(next to|above|below) an?(?: (?:small|little))?"
    rf"(?: {_one_of('plain', *(word for words in TEXTURE_WORDS.values() for word in words))})?"
    rf" {_one_of(*COLORS)} {_one_of(*SHAPES)}"
)
_TABLES = {
    "camera": {words: camera for camera, words in CAMERA_WORDS.items()},
    "motion": {form: motion for motion, pairs in MOTION_PHRASES.items() for pair in pairs for form in pair},
    "speed": {word: speed for speed, words in SPEED_WORDS.items() for word in words},
    "size": {word: size for size, words in SIZE_WORDS.items() for word in words},
    "texture": {word: texture for texture, words in TEXTURE_WORDS.items() for word in words},
    "color": {color: color for color in COLORS},
    "shape": {shape: shape for shape in SHAPES},
}
_PATTERNS = {key: re.compile(_one_of(*table)) for key, table in _TABLES.items()}


def answers(scene: Scene) -> dict[str, str]:
    """The class of each question, and the word ("" if none)."""
    first, *rest = scene.things
    *pattern, ground = scene.background.split(" ")
    second = rest[0] if rest else None
    return {
        "color": first.color,
        "shape": first.shape,
        "texture": first.texture,
        "size": first.size,
        "motion": first.motion,
        "speed": first.speed,
        "second_color": second.color if second else "",
        "second_shape": second.shape if second else "",
        "second_texture": second.texture if second else "",
        "relation": scene.relation,
        "background": ground,
        "pattern": pattern[0] if pattern else "",
        "camera": scene.camera,
        "sign": scene.word_place if scene.word is not None else "",
        "word": scene.word or "",
    }


def asked(text: str) -> dict[str, str]:
    """What a caption of the world asks for, by attribute; what it leaves open is not in it.

    A texture, a second thing, a pattern of the background, a motion of the camera and a sign that are not
    named are asked not to be there (`ABSENT`); all else that is not named may be anything.
    """
    found = dict(ABSENT)
    if match := _SIGN.search(text):
        found["word"] = match[1]
        del found["sign"]
        if match[2]:
            found["sign"] = {"above": "top", "below": "bottom"}[match[2]]
        text = _without(text, match)
    if match := _SECOND.search(text):
        found |= {"relation": match[1], "second_color": match[3], "second_shape": match[4]}
        found["second_texture"] = _TABLES["texture"].get(match[2], "plain")
        text = _without(text, match)
    if match := _GROUND.search(text):
        found |= {"pattern": match[1] or "", "background": match[2]}
        text = _without(text, match)
    else:
        del found["pattern"]
    for key, table in _TABLES.items():
        if match := _PATTERNS[key].search(text):
            found[key] = table[match[1]]
            text = _without(text, match)
    return found


def _without(text: str, match: re.Match[str]) -> str:
    return f"{text[: match.start()]} , {text[match.end() :]}"


def wrong(asked_for: Mapping[str, str], seen: Mapping[str, str]) -> tuple[str, ...]:
    """The attributes that are not as asked for; a clip is wholly right where there is none.

    `seen` has every question and the word.
    """
    return tuple(key for key, value in asked_for.items() if seen[key] != value)


def unasked(asked_for: Mapping[str, str], seen: Mapping[str, str]) -> tuple[str, ...]:
    """Those of the wrong ones that are there though nobody asked for them."""
    return tuple(
        key for key in wrong(asked_for, seen) if not is_named(asked_for[key]) and is_named(seen[key])
    )


def is_named(answer: str) -> bool:
    """Whether it is something, and not that there is no such thing."""
    return answer not in ("", "plain", "still")
