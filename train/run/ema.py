"""An exponential moving average of fp32 master weights that stays sharded as ZeRO shards them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """The part of one parameter whose fp32 master lives on this rank.

    The optimizer updates master in place. It is the whole parameter, in its own shape and memory format,
    or a flat view of the elements [start, start + master.numel()) of the flattened parameter.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    master: Float[Tensor, "..."]


def decay_at(decay: float, step: int) -> float:
    """min(decay, (1 + step) / (10 + step)): a young average forgets its random start faster."""
    return min(decay, (1 + step) / (10 + step))


class EMA:
    """Averages the fragments of this rank; no communication and no full copy of the model."""

    def __init__(self, fragments: Sequence[Fragment], decay: float) -> None:
        self.fragments = list(fragments)
        self.decay = decay
        self._masters = [fragment.master for fragment in self.fragments]
        self.values = [master.clone() for master in self._masters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the masters after optimizer step `step` (from 0)."""
        if self.values:
            torch._foreach_lerp_(self.values, self._masters, 1 - decay_at(self.decay, step))

    def load(self, values: dict[str, Float[Tensor, " n"]]) -> None:
        """Take over saved values, one flat tensor per fragment name."""
        for fragment, value in zip(self.fragments, self.values, strict=True):
            value.copy_(values[fragment.name].view(value.shape))

    def pieces(self) -> dict[str, Float[Tensor, " n"]]:
        """The average of each fragment, flat."""
        return {f.name: value.reshape(-1) for f, value in zip(self.fragments, self.values, strict=True)}
