"""Batches prepared ahead of time by background threads."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


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
