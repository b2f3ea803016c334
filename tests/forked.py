"""Run commands of `kinoflow` one after another, each in a process forked from one that has its libraries.

`python -m tests.forked FILE` reads a command a line, its words ended by NUL, and stops at one that fails.
"""

import os
import sys
import traceback
from pathlib import Path

import kinoflow.data.__main__
import kinoflow.sample.__main__
import kinoflow.tae.__main__
import kinoflow.train.run.loop
import kinoflow.train.tasks.export
import kinoflow.train.tasks.flow_task
import kinoflow.train.tasks.precompute
import kinoflow.train.tasks.tae  # noqa: F401
from kinoflow.__main__ import main


def run(words: list[str]) -> int:
    """The exit status of a command in a process of its own."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        status = main(words)
    except BaseException:  # nothing of the parent's may run in the child, so it does not leave by raising
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
        words = line.split("\0")[:-1]
        if status := run(words):
            sys.exit(f"{words}: {status}")
