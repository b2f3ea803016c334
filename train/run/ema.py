"""An exponential moving average of fp32 master weights that stays sharded as ZeRO shards them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kinoflow.train.run.shards import Piece, Shards


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """The part of one parameter whose fp32 master lives on this rank.

    read gives what the master is now: a reference to it, or a copy where the optimizer's states are
    offloaded. It is the whole parameter, in its own shape and memory format, or the flat elements
    [start, start + read().numel()) of the flattened parameter.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    read: Callable[[], Float[Tensor, "..."]]


def decay_at(decay: float, step: int) -> float:
    """min(decay, (1 + step) / (10 + step)): a young average forgets its random start faster."""
    return min(decay, (1 + step) / (10 + step))


class EMA:
    """Averages the fragments of this rank; no communication and no full copy of the model."""

    def __init__(self, fragments: Sequence[Fragment], decay: float) -> None:
        self.fragments = list(fragments)
        self.decay = decay
        self.values = [fragment.read().clone() for fragment in self.fragments]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the masters after optimizer step `step` (from 0)."""
        weight = 1 - decay_at(self.decay, step)
        for fragment, value in self._pairs():
            value.lerp_(fragment.read(), weight)  # one at a time: copies would add up to a whole shard

    def load(self, shards: Shards) -> None:
        """Take over saved values, of any number of processes."""
        sizes = {f.name: (f.start, f.start + v.numel()) for f, v in self._pairs()}
        found = shards.parts(sizes)
        for fragment, value in self._pairs():
            value.copy_(found[fragment.name].view(value.shape))

    def pieces(self) -> dict[str, Piece]:
        """The average of each fragment, copied to host memory."""
        return {
            f.name: Piece(shape=f.shape, start=f.start, value=v.to("cpu", copy=True).reshape(-1))
            for f, v in self._pairs()
        }

    def _pairs(self) -> Iterator[tuple[Fragment, Tensor]]:
        return zip(self.fragments, self.values, strict=True)
