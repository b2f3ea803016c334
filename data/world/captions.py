"""Describes scenes of the world in words: varied wording, varied order, things left out."""

from random import Random

from kinoflow.data.world.scene import Scene, Thing

# The first phrase is the canonical one; each as it follows the noun, and as an -ing form.
MOTION_PHRASES = {
    "moves left": (("moves left", "moving left"), ("slides to the left", "sliding to the left"),
                   ("drifts left", "drifting left"), ("travels to the left", "traveling to the left"),
                   ("goes left", "going left")),
    "moves right": (("moves right", "moving right"), ("slides to the right", "sliding to the right"),
                    ("drifts right", "drifting right"), ("travels to the right", "traveling to the right"),
                    ("goes right", "going right")),
    "moves up": (("moves up", "moving up"), ("rises", "rising"), ("floats up", "floating up"),
                 ("goes up", "going up"), ("climbs", "climbing")),
    "moves down": (("moves down", "moving down"), ("sinks", "sinking"), ("falls down", "falling down"),
                   ("goes down", "going down"), ("drops", "dropping")),
    "bounces": (("bounces", "bouncing"), ("bounces up and down", "bouncing up and down"),
                ("jumps up and down", "jumping up and down"), ("hops", "hopping")),
    "spins": (("spins", "spinning"), ("rotates", "rotating"), ("turns around", "turning around"),
              ("spins around", "spinning around")),
    "grows": (("grows", "growing"), ("gets bigger", "getting bigger"), ("expands", "expanding"),
              ("becomes larger", "becoming larger")),
    "shrinks": (("shrinks", "shrinking"), ("gets smaller", "getting smaller"),
                ("becomes smaller", "becoming smaller")),
    "stays still": (("stays still", "staying still"), ("rests", "resting"),
                    ("does not move", "not moving"), ("stands still", "standing still")),
}  # fmt: skip
SPEED_WORDS = {"slowly": ("slowly", "slowly", "gently"), "fast": ("fast", "fast", "quickly")}
SIZE_WORDS = {"small": ("small", "small", "little"), "large": ("large", "large", "big")}
TEXTURE_WORDS = {"striped": ("striped",), "dotted": ("dotted", "spotted"), "checkered": ("checkered",)}
CAMERA_WORDS = {
    "pan left": "the camera pans left", "pan right": "the camera pans right",
    "zoom in": "the camera zooms in", "zoom out": "the camera zooms out",
}  # fmt: skip
_PLACES = (
    "on a {} background", "on a {} background", "against a {} background", "in front of a {} background",
    "on {}",
)  # fmt: skip
_MAX_WORDS = 20


class _Words:
    """The random choices of one caption; Random.random() is fixed by Python for a given seed."""

    def __init__(self, seed: int, *, complete: bool) -> None:
        self._random = Random(f"caption/{seed}")
        self._complete = complete
        self.canonical = self.chance(0.55)

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def leave_out(self, probability: float) -> bool:
        """Drawn even when nothing is left out, so that both forms of a caption share their wording."""
        return self.chance(probability) and not self._complete

    def pick(self, options: tuple[str, ...]) -> str:
        return options[0 if self.canonical else int(self._random.random() * len(options))]

    def pick_pair(self, options: tuple[tuple[str, str], ...]) -> tuple[str, str]:
        return options[0 if self.canonical else int(self._random.random() * len(options))]


def caption(scene: "Scene", seed: int, *, complete: bool = False, image: bool = False) -> str:
    """One sentence, 2 to about 20 words, that is true of the scene; the seed picks the wording.

    About half are canonical: "a {color} {shape} {motion} on a {background} background". Written words,
    a second thing and a moving camera are always named. `complete` leaves nothing out; `image` describes
    a single frame: neither motion nor camera.
    """
    words = _Words(seed, complete=complete)
    subject = _subject(words, scene.things[0])
    motion = None if image or words.leave_out(0.04) else _motion(words, scene.things[0])
    beside = _beside(words, scene)
    place = "" if words.leave_out(0.1) else words.pick(_PLACES).format(scene.background)
    sign = _sign(words, scene)
    camera = "" if image else CAMERA_WORDS.get(scene.camera, "")
    camera = f"while {camera}" if camera and motion else f"as {camera}" if camera else ""
    return _sentence(words, subject, motion, (beside, place, sign, camera), image=image)


def _sentence(
    words: _Words, subject: str, motion: tuple[str, str] | None, parts: tuple[str, ...], *, image: bool
) -> str:
    """Put the parts in an order; a variant that is too long falls back to the plain one."""
    beside, place, sign, camera = parts
    verb, gerund = motion or ("", "")
    plain = _join(_article(subject), verb, beside, place, sign, camera)
    if words.canonical:
        return plain
    medium = ("a picture of", "an image of") if image else ("a video of", "a clip of")
    variants = (
        plain,
        _join(f"{place},", _article(subject), verb, beside, sign, camera) if place else plain,
        _join(words.pick(medium), _article(subject), gerund, beside, place, sign, camera),
        _join(subject, gerund, beside, place, sign, camera),
        _join("there is", _article(subject), gerund, beside, place, sign, camera),
    )
    varied = words.pick(variants)
    return varied if len(varied.split()) <= _MAX_WORDS else plain


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _subject(words: _Words, thing: "Thing") -> str:
    size = "" if words.leave_out(0.3) else words.pick(SIZE_WORDS.get(thing.size, ("",)))
    texture = "" if words.leave_out(0.1) else words.pick(TEXTURE_WORDS.get(thing.texture, ("",)))
    color, shape = thing.color, thing.shape
    if words.leave_out(0.04):
        color = ""
    elif words.leave_out(0.04):
        shape = "shape"
    return _join(size, texture, color, shape)


def _motion(words: _Words, thing: "Thing") -> tuple[str, str]:
    """The motion as a verb and as a participle, the speed before or after it."""
    verb, gerund = words.pick_pair(MOTION_PHRASES[thing.motion])
    if not thing.speed or words.leave_out(0.2):
        return verb, gerund
    speed = words.pick(SPEED_WORDS[thing.speed])
    if speed != "fast" and not words.canonical and words.chance(0.5):
        return f"{speed} {verb}", f"{speed} {gerund}"
    return f"{verb} {speed}", f"{gerund} {speed}"


def _beside(words: _Words, scene: "Scene") -> str:
    if len(scene.things) == 1:
        return ""
    second = scene.things[1]
    return f"{scene.relation} {_article(_join(words.pick(SIZE_WORDS['small']), second.color, second.shape))}"


def _sign(words: _Words, scene: "Scene") -> str:
    if scene.word is None:
        return ""
    where = "above" if scene.word_place == "top" else "below"
    return words.pick(
        (
            'with a sign that reads "{}"', 'with a sign that says "{}"', 'and a sign saying "{}"',
            f'and the word "{{}}" {where}', f'with a sign that reads "{{}}" {where}',
        )
    ).format(scene.word)  # fmt: skip
