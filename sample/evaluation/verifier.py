"""Verifiers, which choose among clips of a prompt: a strict judge of the world, or a CLIP for anything.

The strict judge is another one than the judge that evaluates, trained from other starting values on other
scenes: a judge would find what it chose itself better than it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from kinoflow.conditioning.clip_model import ClipModel
from kinoflow.configs.errors import UserError
from kinoflow.configs.pretrained import CONFIG_NAME
from kinoflow.data.clips.buckets import Bucket
from kinoflow.data.world.questions import asked, wrong
from kinoflow.sample.evaluation.judge import ATTRIBUTES, letter_classes
from kinoflow.sample.evaluation.strict import Answers, StrictJudge

_CLIP_FRAMES = 8
# What a prompt is about first counts this often: where something is out of reach, as a second thing's shape
# can be, the likelihood is all of that, and a wrong first thing would hardly count. 3 to 8 choose alike.
_MAIN, _WEIGHT = (*ATTRIBUTES, "word"), 6.0


@dataclass(frozen=True, kw_only=True, order=True)
class Score:
    """How well a clip shows its prompt; the larger the better."""

    passed: bool
    """Whether nothing is wrong with it."""
    likelihood: float
    """The larger the likelier it is that it shows all of it; how it is measured is the verifier's own."""


@runtime_checkable
class Verifier(Protocol):
    """Says how well clips show their prompts."""

    def knows(self, prompt: str) -> bool:
        """Whether it can tell of clips of this prompt."""
        ...

    def score(self, prompt: str, frames: UInt8[np.ndarray, "f h w 3"], fps: Fraction) -> Score:
        """Of one clip, which is a picture if it has one frame."""
        ...


class StrictVerifier:
    """A strict judge as a Verifier.

    Args:
        stands: a clip as the judge knows them; a picture is shown to it as one of these that stands still.
    """

    def __init__(self, judge: StrictJudge, stands: Bucket) -> None:
        self._judge, self._stands = judge.eval(), stands

    @classmethod
    def from_pretrained(cls, folder: Path, stands: Bucket) -> StrictVerifier:
        """Read a strict judge's folder.

        Raises:
            UserError: a missing or damaged file.
        """
        return cls(StrictJudge.from_pretrained(folder), stands)

    def knows(self, prompt: str) -> bool:
        """Of prompts that name no colour and shape of the world it can't tell."""
        return {"color", "shape"} <= asked(prompt).keys()

    @torch.no_grad()
    def score(self, prompt: str, frames: UInt8[np.ndarray, "f h w 3"], fps: Fraction) -> Score:
        """Passed where every answer is as the prompt asks for.

        The likelihood is the logarithm of the product of theirs, in which the first thing's colour, shape and
        motion and the word count six times.
        """
        if len(frames) == 1:
            frames, fps = np.repeat(frames, self._stands.frames, axis=0), self._stands.fps
        answers = self._judge.answers([frames], fps)
        wants, (seen,) = asked(prompt), self._judge.name(answers)
        return Score(passed=not wrong(wants, seen), likelihood=self._likelihood(answers, wants))

    def _likelihood(self, answers: Answers, wants: Mapping[str, str]) -> float:
        questions, length = self._judge.config.questions, self._judge.config.letters
        shares = {
            key: _log_share(logits, questions[key].index(wants[key]))
            for key, logits in answers.classes.items()
            if key in wants
        }
        letters = letter_classes(wants["word"][:length], length)
        shares["word"] = sum(_log_share(answers.letters[:, i], wanted) for i, wanted in enumerate(letters))
        return sum(share * (_WEIGHT if key in _MAIN else 1) for key, share in shares.items())


class ClipVerifier:
    """A CLIP-like model as a Verifier: CLIPScore (Hessel et al. 2021, arXiv:2104.08718), meant over frames.

    It tells which of several clips is the nearest to any prompt, and not whether that is near enough: it
    passes none, so that as many are made as may be.
    """

    def __init__(self, model: ClipModel) -> None:
        self._model = model
        self._text = lru_cache(maxsize=16)(model.text)  # a prompt has several takes

    def knows(self, prompt: str) -> bool:
        """All that says something."""
        return bool(prompt.strip())

    def score(self, prompt: str, frames: UInt8[np.ndarray, "f h w 3"], fps: Fraction) -> Score:
        """The mean cosine of the text and up to eight frames, of all of the clip."""
        del fps
        index = np.linspace(0, len(frames) - 1, min(len(frames), _CLIP_FRAMES)).round().astype(int)
        pictures = self._model.pictures([Image.fromarray(frame) for frame in frames[index]])
        return Score(passed=False, likelihood=float((pictures @ self._text(prompt)).mean()))


def verifier_of(folder: Path, stands: Bucket) -> Verifier:
    """What lies in a folder, a strict judge or a CLIP-like model of transformers.

    Of `stands` see StrictVerifier.

    Raises:
        UserError: neither, or a missing or damaged file.
    """
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CONFIG_NAME}: cannot be read ({error}); fetch the folder again") from None
    if "model_type" in config:  # as transformers writes
        return ClipVerifier(ClipModel(str(folder), called="verifier"))
    return StrictVerifier.from_pretrained(folder, stands)


def _log_share(logits: Tensor, index: int) -> float:
    return logits.double().log_softmax(dim=-1)[0, index].item()
