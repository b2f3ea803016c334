"""The processes of a run, and the little they tell each other outside of DeepSpeed."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

_PREEMPTING = (signal.SIGTERM, signal.SIGUSR1)  # schedulers send either, some time before they kill


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among all: rank in [0, size), and the device it computes on.

    `sequence` neighbours share each clip's tokens and count as one replica of the model. `control` is the
    group in which processes talk beside their GPUs; None is the only one there is.
    """

    rank: int
    size: int
    device: torch.device
    sequence: int = 1
    control: dist.ProcessGroup | None = None

    @property
    def replica(self) -> int:
        """Which slice of a batch this process sees, in [0, replicas)."""
        return self.rank // self.sequence

    @property
    def replicas(self) -> int:
        """Into how many slices a batch is cut."""
        return self.size // self.sequence


def any_of(flags: Sequence[bool], processes: Processes) -> list[bool]:
    """Which of the flags are set on any rank; every rank calls it."""
    if processes.size == 1:
        return [*flags]
    shared = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=processes.control)
    return [bool(flag) for flag in shared]


def from_first(value: Any, processes: Processes) -> Any:
    """Rank 0's picklable value on every rank."""
    if processes.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=processes.control)
    return box[0]


def from_all(value: Any, processes: Processes) -> list[Any]:
    """Every rank's picklable value, in rank order."""
    if processes.size == 1:
        return [value]
    values = [None] * processes.size
    dist.all_gather_object(values, value, group=processes.control)
    return values


@contextmanager
def termination() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGUSR1 fill: a preempted run saves at the end of its step, not dies in it."""
    received: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, _: received.append(number)) for number in _PREEMPTING
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
