"""What happens to a run beside its figures: a line each, on the terminal and in a file."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kinoflow.configs.errors import UserError
from kinoflow.train.run.processes import Processes, from_all

EVENTS = "events.jsonl"
LIMIT = 3  # steps in a row without a finite gradient: more of them are no bad clip


class StuckError(UserError):
    """Step after step nothing was learned; every rank raises it at the same step."""


class Events:
    """The events of a run folder; rank 0 writes them."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = folder / EVENTS if rank == 0 else None

    def tell(self, step: int, event: str, text: str, **more: Any) -> None:
        """Append {"step", "time", "event", "text", ...} and print the text."""
        if self._path is None:
            return
        line = {"step": step, "time": time.time(), "event": event, "text": text, **more}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(text, flush=True)


class Guard:
    """Counts the steps that were skipped, says which clips were in them, and ends a run that goes nowhere."""

    def __init__(self, events: Events, processes: Processes) -> None:
        self._events, self._processes, self._in_a_row = events, processes, 0

    def saw(self, step: int, *, skipped: bool, bad: bool, clips: Callable[[], Sequence[str]]) -> None:
        """Take in that step (from 1); every rank calls it.

        `bad` says whether a loss of this rank was no finite number: then its `clips` are named, and those of
        all ranks where nobody's was.

        Raises:
            StuckError: three steps in a row were skipped.
        """
        if not skipped:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        told = from_all((bad, [*clips()]), self._processes)
        some = any(bad for bad, _ in told)
        names = [name for bad, own in told if bad or not some for name in own]
        listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        cause = "a loss" if some else "the gradient"
        text = f"step {step}: {cause} is no finite number, nothing was learned from {listed}"
        self._events.tell(step, "skipped", text, clips=names)
        if self._in_a_row == LIMIT:
            raise StuckError(f"steps {step - 2} to {step}: no finite gradient, the last in {listed}; "
                             "the newest checkpoint is from before: look at the clips, lower optimizer.lr or "
                             "optimizer.grad_clip, then run the same command again")  # fmt: skip
