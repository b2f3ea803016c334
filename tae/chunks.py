"""A clip as a stream of chunks of a few frames ("b c t h w"): activations stay small and in cache."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

# A chunk of activations about this large is streamed through the layers at once. On a CPU it is what the
# allocator hands out again without new pages; elsewhere a chunk has to be worth the launches of its kernels.
CHUNK_BYTES = {"cpu": 8 << 20}
CHUNK_BYTES_ELSEWHERE = 512 << 20


def regroup(chunks: Iterable[Tensor], multiple: int = 1, growth: float = 1.0) -> Iterator[Tensor]:
    """Cut and join chunks along time until each, once it has grown by `growth`, is about `CHUNK_BYTES` large.

    All but the last have a multiple of `multiple` frames.
    """
    waiting: list[Tensor] = []
    for chunk in chunks:
        waiting.append(chunk)
        budget = CHUNK_BYTES.get(chunk.device.type, CHUNK_BYTES_ELSEWHERE) / growth
        frame = chunk[:, :, 0].numel() * chunk.element_size()
        size = max(int(budget / frame) // multiple, 1) * multiple
        if sum(x.shape[2] for x in waiting) >= size:
            *pieces, rest = join(waiting).split(size, dim=2)
            yield from pieces
            waiting = [rest]
            if rest.shape[2] == size:
                yield rest
                waiting = []
    if waiting:
        yield join(waiting)


def join(chunks: list[Tensor]) -> Tensor:
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=2)


def neighbours(chunks: Iterable[Tensor]) -> Iterator[tuple[Tensor | None, Tensor, Tensor | None]]:
    """Each chunk, between the last frame of the one before and the first frame of the one after it."""
    before: Tensor | None = None
    current: Tensor | None = None
    for chunk in chunks:
        if current is not None:
            yield before, current, chunk[:, :, :1]
            before = current[:, :, -1:]
        current = chunk
    if current is not None:
        yield before, current, None
