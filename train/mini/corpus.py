"""What the small text encoders read: captions of the world, written words, and their corruptions."""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from random import Random

from kinoflow.conditioning.prompt import fps_prefix
from kinoflow.data.world import (
    BACKGROUNDS,
    CAMERAS,
    COLORS,
    MOTIONS,
    SHAPES,
    SIZES,
    SPEEDS,
    TEXTURES,
    WORDS,
    Scene,
    Split,
    Thing,
    caption,
    sample_scene,
)

# Movie Gen trains at 16 to 32 frames a second, the mini release at the first ones too.
RATES = (Fraction(8), Fraction(12), Fraction(16), Fraction(16), Fraction(16), Fraction(24), Fraction(25),
         Fraction(30), Fraction(32), Fraction(30000, 1001), Fraction(24000, 1001))  # fmt: skip
_FREQUENT_PAIRS = """
    th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le ve co me
    de hi ri ro ic ne ea ra ce li ch ll be ma si om ur
"""
_LONGEST_WORD = 8
_NONE = ("",)
# The first thing's, the scene's, the second thing's.
ATTRIBUTES = (COLORS, SHAPES, MOTIONS, SIZES, TEXTURES, SPEEDS, BACKGROUNDS, CAMERAS,
              _NONE + COLORS, _NONE + SHAPES)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A scene, a prompt for it as the encoder gets it, and the scene in canonical words."""

    scene: Scene
    prompt: str
    description: str


def random_word(random: Random) -> str:
    """2 to 8 random capitals: unseen words must work too."""
    return "".join(random.choices(string.ascii_uppercase, k=random.randint(2, _LONGEST_WORD)))


def sample(seed: int, *, wording: int = 0, split: Split = "train", complete: bool = False) -> Sample:
    """The scene of this seed, in one of its wordings; half of the written words are random letters."""
    scene = sample_scene(seed, split=split)
    random = Random(f"text/{split}/{seed}/{wording}")
    image = not complete and random.random() < 0.1
    text = caption(scene, random.getrandbits(40), complete=complete, image=image)
    word = scene.word or ""
    if word and random.random() < 0.5:
        word = random_word(random)
        text = text.replace(f'"{scene.word}"', f'"{word}"')
    if random.random() < 0.15:
        text += "."
    fps = random.choice(RATES)
    if random.random() < 0.9:
        text = fps_prefix(text, fps)
    return Sample(scene=scene, prompt=text, description=describe(scene, word))


def describe(scene: Scene, word: str) -> str:
    """The scene in one fixed order of words, nothing left out: what a state has to know to say it."""
    second = f"{scene.relation} {_describe_thing(scene.things[1])}" if scene.relation else "alone"
    first = scene.things[0]
    moving = f"{_describe_thing(first)} {first.motion} {first.speed or 'steadily'}"
    sign = f"sign {word.lower()}" if word else "no sign"
    return f"{moving} , {second} , on {scene.background} , camera {scene.camera} , {sign}"


def attributes(scene: Scene) -> tuple[int, ...]:
    """The scene as an index into each of ATTRIBUTES."""
    first = scene.things[0]
    second = scene.things[1] if scene.relation else None
    values = (first.color, first.shape, first.motion, first.size, first.texture, first.speed,
              scene.background, scene.camera,
              second.color if second else "", second.shape if second else "")  # fmt: skip
    return tuple(options.index(value) for options, value in zip(ATTRIBUTES, values, strict=True))


def _describe_thing(thing: Thing) -> str:
    return f"{thing.color} {thing.shape} {thing.size} {thing.texture}"


def quoted(seed: int) -> str:
    """What ByT5 reads: a word of the world or random letters, now and then two words, rarely none."""
    random = Random(f"quoted/{seed}")
    kind = random.random()
    if kind < 0.02:
        return ""
    words = [random.choice(WORDS) if random.random() < 0.35 else random_word(random) for _ in range(2)]
    text = words[0] if kind < 0.85 else " ".join(words)
    return text if random.random() < 0.85 else text.lower() if random.random() < 0.5 else text.title()


def pieces() -> list[str]:
    """Generic fallback of a word tokenizer: the characters of ASCII and frequent pairs of letters."""
    return [*string.ascii_lowercase, *string.digits, *string.punctuation, *_FREQUENT_PAIRS.split()]


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """Token ids for the encoder and for the decoder, both with their end token.

    `attributes` are those of the scene when the inputs are a whole prompt, else empty.
    """

    inputs: list[int]
    targets: list[int]
    attributes: tuple[int, ...] = ()


def corrupt(ids: Sequence[int], sentinels: Sequence[int], random: Random) -> Corruption:
    """One of UL2's three denoisers, chosen at random (Tay et al. 2022, section 3.1).

    R: about 15 % in spans of about 3; X: about half in spans of about 6; S: all after a point. The last id
    is the end token and stays. Without UL2's mode tokens: no prompt will carry one.
    """
    body, end = list(ids[:-1]), ids[-1]
    if len(body) < 2:
        return Corruption(inputs=[*body, end], targets=[*body, end])
    kind = random.choice("RXS")
    if kind == "S":
        spans = [(random.randrange(1, len(body)), len(body))]
    else:
        spans = _spans(len(body), *((0.15, 3) if kind == "R" else (0.5, 6)), random)
    inputs, targets, position = [], [], 0
    for sentinel, (start, stop) in zip(sentinels, spans, strict=False):
        inputs += [*body[position:start], sentinel]
        targets += [sentinel, *body[start:stop]]
        position = stop
    return Corruption(inputs=[*inputs, *body[position:], end], targets=[*targets, end])


def _spans(length: int, density: float, mean: int, random: Random) -> list[tuple[int, int]]:
    """Spans apart from each other, in order, that cover about `density` of the length."""
    wanted = max(1, round(length * density))
    number = min(max(1, round(wanted / mean)), length - wanted + 1)
    free = sorted(random.sample(range(length - wanted + 1), k=number))
    cuts = sorted(random.sample(range(1, wanted), k=len(free) - 1)) if len(free) > 1 else []
    spans, hidden = [], 0
    for gap, start, stop in zip(free, [0, *cuts], [*cuts, wanted], strict=True):
        spans.append((gap + hidden, gap + hidden + stop - start))
        hidden += stop - start
    return spans


def spell(ids: Sequence[int], digits: Sequence[int], random: Random) -> Corruption:
    """The word's first nine ids in random order, each behind the digit of its place.

    To answer, a state has to know what letter it is and where it stands.
    """
    body, end = list(ids[:-1]), ids[-1]
    places = list(range(min(len(body), len(digits))))
    random.shuffle(places)
    targets = [token for place in places for token in (digits[place], body[place])]
    return Corruption(inputs=[*body, end], targets=[*targets, end])
