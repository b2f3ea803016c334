"""One run folder, one run."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from kinoflow.configs.errors import UserError
from kinoflow.train.run.processes import Processes, from_first

LOCK = "run.lock"
_WAITS = (0.2, 0.3)  # seconds: `status` holds it for a moment when it asks


@contextmanager
def locked(folder: Path, processes: Processes) -> Iterator[None]:
    """Keep other runs out of the folder; rank 0 holds the lock, which the system drops when it dies.

    Raises:
        UserError: another run is in it.
    """
    held: IO[str] | None = None
    told = None
    if processes.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        held = (folder / LOCK).open("a+", encoding="utf-8")
        told = _taken(held)
    try:
        if told := from_first(told, processes):
            raise UserError(f"run: {folder} is in use by {told}; wait for it, or choose another run=")
        yield
    finally:
        if held is not None:
            held.close()


def _taken(file: IO[str]) -> str | None:
    """Take the lock; who has it, where that fails."""
    for wait in (*_WAITS, None):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if wait is None:
                file.seek(0)
                return file.read().strip() or "another process"
            time.sleep(wait)
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            return None
    raise AssertionError("the last turn returns")
