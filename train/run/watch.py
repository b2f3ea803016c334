"""A watch over the processes of a run: one that stands still or is gone ends it, with its name and place."""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from kinoflow.configs.files import replacing, write_text
from kinoflow.train.run.processes import Processes

STOOD_STILL = 75  # EX_TEMPFAIL: to run again may help
BEATS, COLLECTIVES = "beats", "collectives"
_DUMP_SECONDS = 60.0


class Watch:
    """A thread that tells the others where this process is, and ends it when it has not moved for `patience`.

    Whoever waits for a process that was stopped, that hangs in a read or that died without a word is in a
    collective that never returns: no exception reaches it, so the thread ends the process (exit status 75)
    after it has said which process is behind, and has written which collectives it was in. A process whose
    launcher died is asked to save and end.
    """

    def __init__(self, folder: Path, processes: Processes, patience: float) -> None:
        self._run_folder, self._folder = folder, folder / BEATS
        self._processes, self._patience = processes, patience
        self._place, self._since = "start", time.monotonic()
        self._parent, self._stop = os.getppid(), threading.Event()
        self._period = min(patience / 4, 5.0)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def at(self, place: str) -> None:
        """Say where this process is now; the clock starts again."""
        self._place, self._since = place, time.monotonic()

    def _run(self) -> None:
        asked = False
        while not self._stop.wait(self._period):
            waited = time.monotonic() - self._since
            beat = {"place": self._place, "waited": waited, "time": time.time()}
            with suppress(OSError):  # a full or absent disk is for those to tell who need it
                write_text(self._folder / f"{self._processes.rank}.json", json.dumps(beat))
            if waited > self._patience:
                self._end(waited)
            if self._processes.size > 1 and os.getppid() != self._parent and not asked:
                asked = True
                os.kill(os.getpid(), signal.SIGTERM)

    def _end(self, waited: float) -> None:
        rank = self._processes.rank
        print(f"rank {rank} has stood still for {waited:.0f} s in {self._place}. {self._behind()}",
              file=sys.stderr, flush=True)  # fmt: skip
        faulthandler.dump_traceback(all_threads=True)
        faulthandler.dump_traceback_later(_DUMP_SECONDS, exit=True)  # a device that hangs may hold it up
        with suppress(OSError):
            record_collectives(self._run_folder / COLLECTIVES / f"rank_{rank}")
        os._exit(STOOD_STILL)

    def _behind(self) -> str:
        """What is known of the rank that moved least, from what each wrote last."""
        ages: list[tuple[float, int, str]] = []
        for rank in range(self._processes.size):
            try:
                beat = json.loads((self._folder / f"{rank}.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                return f"Rank {rank} was never heard of."
            silent = time.time() - beat["time"]
            if silent > 3 * self._period + 1:
                return f"Rank {rank} has not been heard of for {silent:.0f} s, last in {beat['place']}."
            ages.append((-beat["waited"], rank, beat["place"]))
        longest, rank, place = min(ages)
        return f"Rank {rank} has been longest in its place: {-longest:.0f} s in {place}."


def record_collectives(path: Path) -> None:
    """Write what torch's flight recorder knows: the last 2000 collectives, whether each ended, who called it.

    It is always on (TORCH_FR_BUFFER_SIZE sets the number); NCCL's is apart from that of the other backends.
    Plain values in a pickle. `torchfrtrace FOLDER`, which comes with torch and reads NCCL's alone, says which
    process did not come to which collective.
    """
    from torch._C import _distributed_c10d as c10d

    if not dist.is_initialized():
        return
    dump = c10d._dump_nccl_trace if "nccl" in dist.get_backend() else c10d._dump_fr_trace  # pyright: ignore[reportAttributeAccessIssue]
    with replacing(path) as aside:
        aside.write_bytes(dump())
