"""What every text encoder is: text to states, with a word about what was cut."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from conditioning.embedding import TextEmbedding


class EncoderError(ValueError):
    """A text encoder that can't be loaded."""


class TruncatedPromptWarning(UserWarning):
    """A prompt was longer than an encoder can read; the rest was left out."""


@runtime_checkable
class TextEncoder(Protocol):
    """Text to states: real tokens first, then padding, no longer than the longest text of the batch.

    The states of a text do not depend on the others in the batch.
    """

    @property
    def width(self) -> int: ...

    def __call__(self, texts: list[str]) -> TextEmbedding: ...


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """States of some texts, and for each whether its end was left out."""

    states: TextEmbedding
    cut: tuple[bool, ...]


def warn_of_cuts(name: str, limit: int, cut: Sequence[bool]) -> None:
    """A TruncatedPromptWarning when an encoder that reads `limit` tokens left something out."""
    if any(cut):
        warnings.warn(
            f"{name} reads at most {limit} tokens: the end of {sum(cut)} of {len(cut)} prompts "
            "was left out; shorten the prompt",
            TruncatedPromptWarning,
            stacklevel=3,
        )
