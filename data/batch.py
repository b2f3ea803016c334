"""Batches: what a training step receives, and their preparation ahead of time."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PaddedText:
    """States of one text encoder, padded to the longest of the batch; mask is True on real tokens."""

    hidden: Float[Tensor, "b l d"]
    mask: Bool[Tensor, "b l"]

    def to(self, device: torch.device) -> "PaddedText":
        """The same on another device."""
        return PaddedText(hidden=self.hidden.to(device), mask=self.mask.to(device))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Latents (normalized, float32) and the text states that belong to them, one entry per encoder."""

    latent: Float[Tensor, "b c t h w"]
    texts: tuple[PaddedText, ...]

    def to(self, device: torch.device) -> "Batch":
        """The same on another device."""
        return Batch(latent=self.latent.to(device), texts=tuple(text.to(device) for text in self.texts))


def prefetch(make: Callable[[int], T], steps: Iterable[int], workers: int) -> Generator[T, None, None]:
    """Yield make(step) in order, computed ahead by background threads; 0 workers compute in place.

    An exception in a worker is raised here, at its step. Closing the iterator drops what is queued.
    """
    if workers == 0:
        yield from map(make, steps)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="batch")
    queue: deque[Future[T]] = deque()
    try:
        for step in steps:
            queue.append(pool.submit(make, step))
            if len(queue) > workers + 1:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
