"""Verifiers, which choose among clips of a prompt; that of the world is a strict judge.

It is another one than the judge that evaluates, trained from other starting values on other scenes: a judge
would find what it chose itself better than it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from kinoflow.data.clips.buckets import Bucket
from kinoflow.data.world.questions import asked, wrong
from kinoflow.sample.evaluation.judge import letter_classes
from kinoflow.sample.evaluation.strict import Answers, StrictJudge


@dataclass(frozen=True, kw_only=True, order=True)
class Score:
    """How well a clip shows its prompt; the larger the better."""

    passed: bool
    """Whether nothing is wrong with it."""
    likelihood: float
    """Natural logarithm of how likely it is that it shows all of it."""


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
        """Passed where every answer is as the prompt asks for; the likelihood is the product of theirs."""
        if len(frames) == 1:
            frames, fps = np.repeat(frames, self._stands.frames, axis=0), self._stands.fps
        video = self._judge.prepare(torch.from_numpy(frames)[None])
        answers = self._judge(video, torch.tensor([float((len(frames) - 1) / fps)]))
        wants, (seen,) = asked(prompt), self._judge.name(answers)
        return Score(passed=not wrong(wants, seen), likelihood=self._likelihood(answers, wants))

    def _likelihood(self, answers: Answers, wants: Mapping[str, str]) -> float:
        config, total = self._judge.config, 0.0
        for key, logits in answers.classes.items():
            if key in wants:
                total += _log_share(logits, config.questions[key].index(wants[key]))
        for letter, wanted in enumerate(letter_classes(wants["word"][: config.letters], config.letters)):
            total += _log_share(answers.letters[:, letter], wanted)
        return total


def _log_share(logits: Tensor, index: int) -> float:
    return logits.double().log_softmax(dim=-1)[0, index].item()
