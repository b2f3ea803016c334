"""Who does the work: processes on this machine, or a Ray cluster. Each call has a time limit and may die.

`Actors` are for work that wants something large first: each makes it once and keeps it.
"""

import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from kinoflow.configs.errors import UserError, one_line
from kinoflow.data.clips.workers import Workers


@dataclass(frozen=True, kw_only=True)
class Call:
    """A function of a module, and what it gets: first what messages name. `key` tells it from others."""

    key: Any
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


Done = tuple[Any, Any]  # a call's key, and what it gave or the UserError that it ended in


@runtime_checkable
class Pool(Protocol):
    """Makes calls, several at a time; `address` is that of its Ray cluster, None without one."""

    address: str | None

    def run(self, calls: Iterable[Call]) -> Iterator[Done]:
        """The results as they come, in no order; one that fails, hangs or dies is its UserError."""
        ...

    def close(self) -> None:
        """End what still runs."""
        ...


class LocalPool:
    """`count` processes; of 0 the calls are made here and now, without a time limit."""

    address: str | None = None

    def __init__(self, count: int, seconds: float) -> None:
        self._workers, self._count = Workers(count, seconds), count

    def run(self, calls: Iterable[Call]) -> Iterator[Done]:
        """As `Pool.run`."""
        if self._count == 0:
            for call in calls:
                yield call.key, _attempt(self._workers, call.function, call.arguments)
            return
        waiting = iter(calls)
        with ThreadPoolExecutor(2 * self._count) as threads:

            def begin(call: Call) -> Future[Done]:
                return threads.submit(
                    lambda: (call.key, _attempt(self._workers, call.function, call.arguments))
                )

            running = {begin(call) for call in islice(waiting, 4 * self._count)}
            try:
                while running:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    running |= {begin(call) for call in islice(waiting, len(done))}
                    yield from (future.result() for future in done)
            except BaseException:
                self.close()  # else the threads wait for what their processes are doing
                raise

    def close(self) -> None:
        """As `Pool.close`."""
        self._workers.close()


class RayPool:
    """The workers of a Ray cluster, at an address, or of an embedded one ("local") with `count` of them.

    All of them must see the videos and the folder that is written, under the same paths. One that is killed
    is replaced, and what it did is done again.

    Raises:
        UserError: there is no cluster at the address, or it does not start.
    """

    def __init__(self, address: str, count: int, seconds: float) -> None:
        ray = self._ray = _connected(address, count)
        self._seconds = seconds
        self.address: str | None = ray.get_runtime_context().gcs_address
        self._remote = ray.remote(num_cpus=1, max_retries=3)(_in_ray)

    def run(self, calls: Iterable[Call]) -> Iterator[Done]:
        """As `Pool.run`."""
        ray, waiting = self._ray, iter(calls)
        most = 4 * max(1, int(ray.cluster_resources().get("CPU", 1)))

        def begin(call: Call) -> tuple[Any, Any]:
            return self._remote.remote(call.function, call.arguments, self._seconds), call.key

        running = dict(begin(call) for call in islice(waiting, most))
        while running:
            done, _ = ray.wait(list(running), num_returns=1)
            running |= dict(begin(call) for call in islice(waiting, len(done)))
            for reference in done:
                yield running.pop(reference), self._result(reference)

    def _result(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            return UserError(f"its Ray worker was lost several times ({type(error).__name__})")

    def close(self) -> None:
        """As `Pool.close`."""
        self._ray.shutdown()


def open_pool(address: str | None, count: int, seconds: float) -> Pool:
    """Processes here, or with an address those of Ray.

    Raises:
        UserError: no cluster answers at the address.
    """
    return LocalPool(count, seconds) if address is None else RayPool(address, count, seconds)


class Actors:
    """`count` actors of a Ray cluster, at an address or of an embedded one ("local").

    Each keeps what `make(*arguments)` gives it and makes calls with that; of None there is one for each GPU
    of the cluster, or else for each machine. All machines see the same files, and paths are those of this
    process's folder. An actor that is killed is replaced, and what it did is done again.

    Raises:
        UserError: no cluster answers at the address.
    """

    def __init__(
        self, address: str, count: int | None, make: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> None:
        ray = self._ray = _connected(address, os.cpu_count() or 1)
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = int(sum(node.get("GPU", 0) for node in machines))
        count = count or gpus or len(machines)
        if 0 < gpus < count:
            raise UserError(f"actors: {count} of them, the cluster has {gpus} GPUs; use {gpus} or fewer")
        # Torch takes as many threads as Ray gives the actor cores; those of one machine share its cores.
        cores = min(node.get("CPU", 1) for node in machines) / -(-count // len(machines))
        share = {"num_cpus": int(cores) or cores} if gpus == 0 else {"num_cpus": 1, "num_gpus": 1}
        kind = ray.remote(**share, max_restarts=3, max_task_retries=3)(_Holder)
        self._actors = [kind.remote(str(Path.cwd()), make, arguments) for _ in range(count)]

    def run(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """What the function gives for each, in no order; its first argument is what the actor keeps.

        Raises:
            UserError: one of them fails, or its actor is lost several times.
        """
        from ray.util import ActorPool

        pool = ActorPool(self._actors)
        try:
            for given in pool.map_unordered(lambda actor, call: actor.call.remote(function, call), [*calls]):
                if isinstance(given, UserError):
                    raise given
                yield given
        except self._ray.exceptions.RayError as error:
            raise UserError(f"a Ray actor was lost several times ({one_line(error)})") from error

    def close(self) -> None:
        """End them."""
        self._ray.shutdown()


class _Holder:
    """An actor."""

    def __init__(self, folder: str, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        os.chdir(folder)
        try:
            self._kept = make(*arguments)
        except UserError as error:
            self._kept = error

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """What the function gives, or its UserError."""
        if isinstance(self._kept, UserError):
            return self._kept
        try:
            return function(self._kept, *arguments)
        except UserError as error:
            return error


def _connected(address: str, count: int) -> Any:
    """Ray, with a cluster.

    Raises:
        UserError: it is not installed, there is no cluster at the address, or it does not start.
    """
    try:
        import ray
    except ImportError:
        raise UserError("ray is not installed; run: pip install 'kinoflow[engine]'") from None
    where: dict[str, Any] = {"num_cpus": max(1, count)} if address == "local" else {"address": address}
    try:
        ray.init(**where, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # of no common kind: no cluster there, or a node too slow to start
        remedy = "run it again" if address == "local" else "see that `ray status` finds it"
        raise UserError(f"ray: {address} did not start ({one_line(error)}); {remedy}") from None
    return ray


def _attempt(workers: Workers, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    try:
        return workers.call(function, *arguments)
    except UserError as error:
        return error


@functools.cache
def _own(seconds: float) -> Workers:
    """Of a Ray worker: a process that can be ended, unlike itself."""
    return Workers(1, seconds)


def _in_ray(function: Callable[..., Any], arguments: tuple[Any, ...], seconds: float) -> Any:
    return _attempt(_own(seconds), function, arguments)
