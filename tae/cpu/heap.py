"""What glibc's malloc does with memory that is freed: kept within a pass, given back between tiles."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

# mallopt's names for what it sets (glibc, malloc.h), and what they are set to.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 1 << 30
HEAP_BYTES = 32 << 20


@cache
def keep_pages() -> None:
    """Let malloc keep what is freed, up to a GiB, for what is asked for next.

    Once a process, with glibc, and only where its own environment variables (MALLOC_...) don't say otherwise.
    By itself it hands activations of some MiB back to the kernel. The next layer's come as new pages, and on
    a virtual machine to map and clear those takes as long as to compute what is written there.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(MMAP_THRESHOLD, HEAP_BYTES)
        libc.mallopt(TRIM_THRESHOLD, KEPT_BYTES)


@contextmanager
def pages_given_back() -> Iterator[None]:
    """At the end, hand what malloc has kept back to the kernel: for a tile of a clip, not for a chunk of it.

    Otherwise the next tile's frames come on top of it, or are put where this tile's activations were, and the
    next activations make the heap longer.
    """
    try:
        yield
    finally:
        libc = _glibc()
        if libc is not None:
            libc.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, where it is glibc and nobody has told its malloc what to do."""
    told = any(name.startswith("MALLOC_") for name in os.environ)
    if sys.platform != "linux" or told or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return None
    return libc
