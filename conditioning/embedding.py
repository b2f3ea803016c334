"""The states a text encoder hands to the video transformer."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TextEmbedding:
    """Hidden states of one text encoder for a batch of prompts.

    Attributes:
        hidden: raw last hidden states, ``(b, l, d)``; zero where ``mask`` is False.
        mask: ``(b, l)``, True where a real token stands and False on padding.

    Raises:
        ValueError: when the two shapes do not belong together or the mask is not boolean.
    """

    hidden: Float[Tensor, "b l d"]
    mask: Bool[Tensor, "b l"]

    def __post_init__(self) -> None:
        if self.hidden.dim() != 3 or self.hidden.shape[:2] != self.mask.shape:
            raise ValueError(
                f"TextEmbedding: hidden {tuple(self.hidden.shape)} needs a mask of its first two sizes, "
                f"got {tuple(self.mask.shape)}"
            )
        if self.mask.dtype != torch.bool:
            raise ValueError(f"TextEmbedding: mask must be boolean, got {self.mask.dtype}")
