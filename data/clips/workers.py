"""Processes that decode clips, each within a time limit: a clip that hangs or crashes costs only itself."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from typing import TYPE_CHECKING, Any, TypeVar

from kinoflow.configs.errors import UserError

if TYPE_CHECKING:
    from pebble import ProcessPool

T = TypeVar("T")
S = TypeVar("S")
# Imported once by the server that workers are forked from.
_PRELOADED = ["kinoflow.data.clips.fit", "kinoflow.data.world"]


class Workers:
    """`count` processes; none of them is a plain call here and now, without a time limit.

    They are forked from a server that is started fresh, so that they have none of this process's threads,
    devices and locks, when the first call comes. `threads` is how many each may decode in, None for as many
    as FFmpeg likes.
    """

    def __init__(self, count: int, seconds: float = 60.0) -> None:
        self.count, self._seconds = count, seconds
        # Each decodes in its share of the cores: together they would be in each other's way.
        self.threads = max(1, (os.cpu_count() or 1) // count) if count else None
        self._pool: ProcessPool | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._beginning = threading.Lock()  # the first calls may come from several threads at once

    def call(self, function: Callable[..., T], subject: Any, *more: Any) -> T:
        """What a module's function makes of the subject.

        Raises:
            UserError: it took too long, or its process died of it; or what the function raises.
        """
        if self.count == 0:
            return function(subject, *more)
        from pebble import ProcessExpired

        try:
            return self._begin(function, (subject, *more)).result()
        except TimeoutError as error:
            raise UserError(f"{subject}: not read within {self._seconds:g} s") from error
        except ProcessExpired as error:
            raise UserError(f"{subject}: the process that read it died ({error})") from error

    def map(self, function: Callable[[S], T], items: Iterable[S]) -> list[T]:
        """A function of each, in their order; the function may `call`, and runs in threads for that."""
        if self.count == 0:
            return [function(item) for item in items]
        if self._threads is None:
            self._threads = ThreadPoolExecutor(2 * self.count, thread_name_prefix="clips")
        return list(self._threads.map(function, items))

    def _begin(self, function: Callable[..., T], arguments: tuple[Any, ...]) -> "Future[T]":
        with self._beginning:
            pool = self._pool = self._pool or _pool(self.count)
        return pool.schedule(function, args=arguments, timeout=self._seconds)

    def close(self) -> None:
        """End the processes; what they were doing is lost."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        self._pool = self._threads = None


def _pool(count: int) -> "ProcessPool":
    from pebble import CONSTS, ProcessPool

    CONSTS.term_timeout = 0.1  # workers take no SIGTERM
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return ProcessPool(count, initializer=_start, context=context)


def _start() -> None:
    """Signals are for the process that asked: schedulers and terminals send them to all."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    import torch

    torch.set_num_threads(1)
