"""A clip as a stream of chunks of a few frames ("b c t h w"): activations stay small and in cache."""

import ctypes
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from functools import cache

import torch
from torch import Tensor

# A chunk of activations about this large is streamed through the layers at once. On a CPU it stays in cache;
# elsewhere a chunk has to be worth the launches of its kernels.
CHUNK_BYTES = {"cpu": 4 << 20}
CHUNK_BYTES_ELSEWHERE = 512 << 20

# mallopt's names for what it sets (glibc, malloc.h), and what they are set to.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 1 << 30
HEAP_BYTES = 32 << 20


def streams() -> bool:
    """Chunk by chunk or whole: gradients need the whole clip, and a compiler plans the memory itself."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


@cache
def keep_pages() -> None:
    """Let malloc keep what is freed, up to a GiB, for what is asked for next.

    Once a process, with glibc, and only where its own environment variables (MALLOC_...) don't say otherwise.
    By itself it hands activations of some MiB back to the kernel. The next layer's come as new pages, and on
    a virtual machine to map and clear those takes as long as to compute what is written there.
    """
    told = any(name.startswith("MALLOC_") for name in os.environ)
    if sys.platform == "linux" and not told and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(MMAP_THRESHOLD, HEAP_BYTES)
        libc.mallopt(TRIM_THRESHOLD, KEPT_BYTES)


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


def fork(chunks: Iterable[Tensor]) -> tuple[Iterator[Tensor], Iterator[Tensor]]:
    """The chunks twice. Held is only what the first has given and the second has not: the first goes ahead.

    `itertools.tee` holds up to 57 items that both have given.
    """
    source, held = iter(chunks), deque[Tensor]()

    def ahead() -> Iterator[Tensor]:
        for chunk in source:
            held.append(chunk)
            yield chunk

    def behind() -> Iterator[Tensor]:
        while held:
            yield held.popleft()
        if next(source, None) is not None:
            raise RuntimeError("the second stream was asked for a chunk before the first")

    return ahead(), behind()


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
