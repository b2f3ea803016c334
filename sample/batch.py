"""Several clips at once, each in a thread of its own and computed as if it were alone.

The kernels of one large batch round otherwise at every batch size (latents of the mini release differ by 2e-5
to 6e-5 at 2, 4 and 8 clips), so no batch of tensors gives a prompt and seed the same frames in any company.
Threads do: PyTorch's kernels run without the interpreter's lock, and each thread of Python has a number of
CPU threads and a scratch memory of its own.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class _Batch(threading.local):
    """Of a thread that works at a batch: set when the batch was given up."""

    given_up: threading.Event | None = None


class GivenUpError(Exception):
    """Another clip of the batch failed, or who asked for it went away."""


_batch = _Batch()


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Compute on so many threads of the CPU, in this thread of Python alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def alive() -> None:
    """Raise GivenUpError in a thread whose batch was given up."""
    if _batch.given_up is not None and _batch.given_up.is_set():
        raise GivenUpError


def in_threads(work: Callable[[T], R], items: Sequence[T], count: int) -> Iterator[R]:
    """Map; when it ends early, work in progress ends where it calls `alive`, and more does not begin."""
    given_up = threading.Event()

    def begin() -> None:
        _batch.given_up = given_up

    pool = ThreadPoolExecutor(count, thread_name_prefix="kinoflow-clip", initializer=begin)
    try:
        yield from pool.map(work, items)
    finally:
        given_up.set()
        pool.shutdown(cancel_futures=True)
