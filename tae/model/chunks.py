"""A clip as a stream of chunks of a few frames ("b c t h w"): activations stay small and in cache."""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

# A chunk of activations about this large is streamed through the layers at once. On a CPU it stays in cache;
# elsewhere a chunk has to be worth the launches of its kernels.
CHUNK_BYTES = {"cpu": 4 << 20}
CHUNK_BYTES_ELSEWHERE = 512 << 20
# Tensors without values ("meta"), by which memory is counted, are cut as those of this device type would be.
_counted_for = ContextVar("_counted_for", default="cpu")
_parts = ContextVar("_parts", default=1)


def streams() -> bool:
    """Chunk by chunk or whole: gradients need the whole clip, and a compiler plans the memory itself."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


@contextmanager
def counted_for(device_type: str) -> Iterator[None]:
    """Cut tensors on the meta device as they would be cut on a device of this type."""
    token = _counted_for.set(device_type)
    try:
        yield
    finally:
        _counted_for.reset(token)


@contextmanager
def cut_into(parts: int) -> Iterator[None]:
    """Chunks are so many times smaller. What is alive in a long stream is some fifty of them."""
    token = _parts.set(parts)
    try:
        yield
    finally:
        _parts.reset(token)


def _chunk_bytes(device_type: str) -> int:
    device_type = _counted_for.get() if device_type == "meta" else device_type
    return CHUNK_BYTES.get(device_type, CHUNK_BYTES_ELSEWHERE) // _parts.get()


def regroup(chunks: Iterable[Tensor], multiple: int = 1, growth: float = 1.0) -> Iterator[Tensor]:
    """Cut and join chunks along time until each, once it has grown by `growth`, is about `CHUNK_BYTES` large.

    All but the last have a multiple of `multiple` frames.
    """
    waiting: list[Tensor] = []
    for chunk in chunks:
        waiting.append(chunk)
        budget = _chunk_bytes(chunk.device.type) / growth
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


def crop(chunks: Iterable[Tensor], start: int, stop: int) -> Iterator[Tensor]:
    """Frames start..stop-1 of a stream; no more chunks are asked for."""
    position = 0
    for chunk in chunks:
        begin, position = position, position + chunk.shape[2]
        if position > start:
            yield chunk[:, :, max(start - begin, 0) : stop - begin]
        if position >= stop:
            return


def gather(chunks: Iterable[Tensor], frames: int) -> Tensor:
    """The first `frames` frames in one tensor; no more chunks are asked for.

    Made with the first chunk: pieces kept until the last would lie between what is freed on the way, and the
    heap would grow by the gaps.
    """
    whole: Tensor | None = None
    filled = 0
    for chunk in chunks:
        if whole is None:
            whole = chunk.new_empty((*chunk.shape[:2], frames, *chunk.shape[3:]))
        piece = chunk[:, :, : frames - filled]
        whole[:, :, filled : (filled := filled + piece.shape[2])] = piece
        if filled == frames:
            return whole
    raise ValueError(f"frames: the chunks end after {filled} of {frames}")


def join(chunks: list[Tensor]) -> Tensor:
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=2)


def neighbours(chunks: Iterable[Tensor]) -> Iterator[tuple[Tensor | None, Tensor, Tensor | None]]:
    """Each chunk, between the last frame of the one before and the first frame of the one after it."""
    before: Tensor | None = None
    current: Tensor | None = None
    for chunk in chunks:
        if current is not None:
            yield before, current, chunk[:, :, :1]
            before = current[:, :, -1:].clone()  # a view would hold the whole chunk
        current = chunk
    if current is not None:
        yield before, current, None
