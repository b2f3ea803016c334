"""The processes of a run, and the little they tell each other outside of DeepSpeed."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among all: rank in [0, size), and the device it computes on.

    `sequence` neighbours share each clip's tokens and count as one replica of the model.
    """

    rank: int
    size: int
    device: torch.device
    sequence: int = 1

    @property
    def replica(self) -> int:
        """Which slice of a batch this process sees, in [0, replicas)."""
        return self.rank // self.sequence

    @property
    def replicas(self) -> int:
        """Into how many slices a batch is cut."""
        return self.size // self.sequence


def device_of(local_rank: int) -> torch.device:
    """The GPU of a process; where its launcher shows it one only, that one. The CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def agree(flag: bool, processes: Processes) -> bool:
    """Whether the flag is set on any rank; every rank calls it."""
    if processes.size == 1:
        return flag
    shared = torch.tensor(float(flag), device=processes.device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return bool(shared)


def from_first(value: Any, processes: Processes) -> Any:
    """Rank 0's picklable value on every rank."""
    if processes.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=processes.device)
    return box[0]


def from_all(value: Any, processes: Processes) -> list[Any]:
    """Every rank's picklable value, in rank order."""
    if processes.size == 1:
        return [value]
    values = [None] * processes.size
    dist.all_gather_object(values, value)
    return values


@contextmanager
def termination() -> Iterator[list[int]]:
    """A list that SIGTERM fills: a preempted run saves at the end of its step instead of dying in it."""
    received: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, previous)
