"""Is a clip wholly right: all that its prompt names as named, and nothing there that nobody asked for?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from jaxtyping import UInt8

from kinoflow.data.world.questions import asked, is_named, unasked, wrong
from kinoflow.sample.evaluation.statistics import Share
from kinoflow.sample.evaluation.strict import StrictJudge

Seen = Sequence[Mapping[str, str]]


@dataclass(frozen=True, kw_only=True)
class Missed:
    """A prompt whose clip is not wholly right, and what was seen instead, by attribute."""

    prompt: str
    seen: dict[str, str]

    def __str__(self) -> str:
        nothing = {"speed": "ordinary"}
        named = {key: value or nothing.get(key, "none") for key, value in self.seen.items()}
        return ", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in named.items())


@dataclass(frozen=True, kw_only=True)
class Whole:
    """What the strict judge says of clips, each share beside its own on real renders of the same scenes."""

    wholly: Share
    """All as named, and nothing else there."""
    unasked: Share
    """Nothing there that nobody asked for."""
    attributes: dict[str, Share]
    """Each attribute, of the prompts that name it."""
    missed: tuple[Missed, ...]
    """The prompts whose clips are not wholly right, in their order."""


def measure_whole(
    judge: StrictJudge,
    prompts: Sequence[str],
    generated: Sequence[UInt8[np.ndarray, "f h w 3"]],
    real: Sequence[UInt8[np.ndarray, "f h w 3"]],
    fps: Fraction,
) -> Whole:
    """Judge generated clips of the prompts, at least one, and real ones of the same scenes."""
    return compared(prompts, judge.judge(generated, fps), judge.judge(real, fps))


def compared(prompts: Sequence[str], generated: Seen, real: Seen) -> Whole:
    """What a judge saw in generated and in real clips, beside what the prompts ask for; at least one."""
    wants = [asked(prompt) for prompt in prompts]
    wrongs = [_each(wrong, wants, seen) for seen in (generated, real)]
    extras = [_each(unasked, wants, seen) for seen in (generated, real)]
    attributes = {}
    for key in dict.fromkeys(key for want in wants for key in want):
        named = [i for i, want in enumerate(wants) if is_named(want.get(key, ""))]
        if named:
            attributes[key] = _share(*([key not in found[i] for i in named] for found in wrongs))
    return Whole(
        wholly=_share(*([not each for each in found] for found in wrongs)),
        unasked=_share(*([not each for each in found] for found in extras)),
        attributes=attributes,
        missed=tuple(
            Missed(prompt=prompt, seen={key: seen[key] for key in keys})
            for prompt, keys, seen in zip(prompts, wrongs[0], generated, strict=True)
            if keys
        ),
    )


def _each(
    rule: Callable[[Mapping[str, str], Mapping[str, str]], tuple[str, ...]], wants: Seen, seen: Seen
) -> list[tuple[str, ...]]:
    return [rule(want, label) for want, label in zip(wants, seen, strict=True)]


def _share(generated: Sequence[bool], real: Sequence[bool]) -> Share:
    return Share.of(sum(generated), len(generated), real=sum(real))
