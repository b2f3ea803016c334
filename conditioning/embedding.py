"""What a text encoder is, and the states that it hands to the video transformer."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kinoflow.conditioning.labels import Labels


@dataclass(frozen=True, kw_only=True)
class TextEmbedding:
    """Hidden states of one text encoder for a batch of prompts.

    Attributes:
        hidden: raw last hidden states, ``(b, l, d)``; zero where ``mask`` is False.
        mask: ``(b, l)``, True where a real token stands and False on padding.
        pooled: ``(b, p)``, the whole text in one vector; None of an encoder that gives none.

    Raises:
        ValueError: when the shapes do not belong together or the mask is not boolean.
    """

    hidden: Float[Tensor, "b l d"]
    mask: Bool[Tensor, "b l"]
    pooled: Float[Tensor, "b p"] | None = None

    def __post_init__(self) -> None:
        if self.hidden.dim() != 3 or self.hidden.shape[:2] != self.mask.shape:
            raise ValueError(
                f"TextEmbedding: hidden {tuple(self.hidden.shape)} needs a mask of its first two sizes, "
                f"got {tuple(self.mask.shape)}"
            )
        if self.mask.dtype != torch.bool:
            raise ValueError(f"TextEmbedding: mask must be boolean, got {self.mask.dtype}")
        if self.pooled is not None and len(self.pooled) != len(self.mask):
            raise ValueError(f"TextEmbedding: pooled has {len(self.pooled)} rows, mask {len(self.mask)}")

    def to(self, like: Tensor) -> "TextEmbedding":
        """On the device of `like`, the states in its dtype."""
        pooled = None if self.pooled is None else self.pooled.to(like)
        return TextEmbedding(hidden=self.hidden.to(like), mask=self.mask.to(like.device), pooled=pooled)


Condition = Sequence[TextEmbedding] | Labels
"""What a backbone is given beside latent and time: the states of each text encoder, or labels."""


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
