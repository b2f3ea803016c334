"""What launchers need around them, where this machine has none of it: stand-ins for programs, a free port."""

import os
import random
import socket
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
WAIT = 900  # seconds, for the slowest machine


def put(folder: Path, **programs: str) -> Path:
    """Scripts by name, to be found before all others of that name; their folder."""
    folder.mkdir(exist_ok=True)
    for name, text in programs.items():
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(stat.S_IRWXU)
    return folder


def free_port() -> str:
    """One that nobody listens at, below those that systems hand out: so nothing takes it meanwhile."""
    # Each test begins with the same seed: two that run at once would choose the same of random's own.
    for port in random.SystemRandom().sample(range(10_000, 30_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return str(port)
    raise RuntimeError("none of a hundred ports is free")


def begin(words: list[str], programs: Path, **variables: str) -> subprocess.Popen:
    """A command with this repository's code on a CPU; its output is one stream."""
    path = os.pathsep.join([str(programs), str(BIN), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", **variables}
    return subprocess.Popen(words, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)  # fmt: skip


def end(started: list[subprocess.Popen]) -> tuple[list[int], str]:
    """Exit codes and outputs of commands that need each other; what is left of them is killed."""
    try:
        outputs = [each.communicate(timeout=WAIT)[0] for each in started]
    finally:
        for each in started:
            each.kill()
    return [each.returncode for each in started], "".join(outputs)
