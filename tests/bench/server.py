"""The server beside the command, part "server" of `sample.py`, which `make bench-sample` runs.

Clients on loopback order clips from a `kinoflow sample serve` process for so many seconds, each waiting for
one before it orders the next; then `kinoflow sample --prompts` makes as many with the same settings and seeds
in one load. Clips/s and processor seconds a clip are those from the first clips on, as many as are made at
once, to the last: loading and warming up count in neither. Of the server's processor seconds those of HTTP
are a part, of the clients' none. Linux only: /proc says what a process took.
"""

import argparse
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PROMPT = "a red star moves left on a gray background"
SERVE = [sys.executable, "-m", "kinoflow.sample", "serve", "--port", "0", "--keep", "1000000"]
# As many as both make by default on a CPU of one thread a clip.
AT_ONCE = max(1, os.cpu_count() or 1)
TICKS = os.sysconf("SC_CLK_TCK")


def processor_seconds(pid: int) -> float:
    """What a process took until now, in all of its threads."""
    values = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(values[11]) + int(values[12])) / TICKS  # utime and stime


class Watch:
    """Counts the clips in a folder while a process works, and what it took until each."""

    def __init__(self, pid: int, folder: Path) -> None:
        self._pid, self._folder, self._ended = pid, folder, threading.Event()
        self._found: list[tuple[int, float, float]] = []  # clips, when, processor seconds
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(0.02):
            self._look()

    def _look(self) -> None:
        count = sum(path.suffix == ".mp4" and path.name[0] != "." for path in self._folder.iterdir())
        if not self._found or count > self._found[-1][0]:
            self._found.append((count, time.perf_counter(), processor_seconds(self._pid)))

    def rates(self, after: int) -> dict[str, float]:
        """Figures from the `after`th clip on; the process must live until then."""
        self._ended.set()
        self._thread.join()
        first = next(found for found in self._found if found[0] >= after)
        count, seconds, taken = (last - begun for last, begun in zip(self._found[-1], first, strict=True))
        return {"clips_per_second": round(count / seconds, 4), "processor_seconds": round(taken / count, 4)}


@dataclass
class Orders:
    """What the clients ordered, and how long they waited for it."""

    waited: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    seeds: set[int] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next_seed(self) -> int:
        """One that nobody has."""
        with self.lock:
            self.seeds.add(len(self.seeds))
            return len(self.seeds) - 1


def _client(port: int, steps: int, poll: float, end: float, orders: Orders) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)

    def ask(method: str, path: str, body: Any = None) -> bytes:
        text, headers = (
            (None, {}) if body is None else (json.dumps(body), {"Content-Type": "application/json"})
        )
        connection.request(method, path, text, headers)
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{method} {path}: {answer.status} {content[:200]!r}")
        return content

    while time.perf_counter() < end:
        started, seed = time.perf_counter(), orders.next_seed()
        try:
            order = {"prompt": PROMPT, "seed": seed, "num_inference_steps": steps}
            path = f"/v1/videos/{json.loads(ask('POST', '/v1/videos', order))['id']}"
            while (video := json.loads(ask("GET", path)))["status"] in ("queued", "in_progress"):
                time.sleep(poll)
            if video["status"] != "completed" or ask("GET", f"{path}/content")[4:8] != b"ftyp":
                raise RuntimeError(str(video["error"]))
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            orders.lost.append(str(error))
            return
        orders.waited.append(time.perf_counter() - started)


def _served(folder: Path, options: argparse.Namespace) -> tuple[Orders, dict[str, float]]:
    words = [*SERVE, "--folder", str(folder), "--batch", str(AT_ONCE)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline().partition("  ")[0].rpartition(":")[2])
            orders, watch = Orders(), Watch(server.pid, folder / "clips")
            end = time.perf_counter() + options.seconds
            words = (port, options.batch_steps, options.poll, end, orders)
            threads = [threading.Thread(target=_client, args=words) for _ in range(options.clients)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            rates = watch.rates(AT_ONCE)
        finally:
            server.send_signal(signal.SIGTERM)
        if server.wait(60) != 0:
            orders.lost.append(f"the server ended with {server.returncode}")
    return orders, rates


def _listed(folder: Path, options: argparse.Namespace, clips: int) -> dict[str, float]:
    lines = [
        json.dumps({"prompt": PROMPT, "seed": seed, "steps": options.batch_steps}) for seed in range(clips)
    ]
    (folder / "list.jsonl").write_text("\n".join(lines), encoding="utf-8")
    words = ["--prompts", str(folder / "list.jsonl"), "--out", str(folder), "--batch", str(AT_ONCE)]
    command = [sys.executable, "-m", "kinoflow.sample", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        watch = Watch(process.pid, folder)
        for _ in process.stdout:  # it lives, if only as a zombie, until it is waited for
            pass
        rates = watch.rates(AT_ONCE)
    if process.returncode != 0:
        raise RuntimeError(f"kinoflow sample ended with {process.returncode}")
    return rates


def server(options: argparse.Namespace) -> dict[str, Any]:
    """Clips/s and processor seconds of both, the clients' waiting, and what was lost."""
    with TemporaryDirectory() as folder:
        orders, served = _served(Path(folder, "serve"), options)
        for line in orders.lost:
            print(f"lost: {line}", file=sys.stderr)
        clips = Path(folder, "clips")
        clips.mkdir()
        listed = _listed(clips, options, len(orders.seeds))
    hundredths = statistics.quantiles(orders.waited, n=100, method="inclusive")
    ratios = {f"{name}_ratio": round(value / listed[name], 4) for name, value in served.items()}
    return {
        "clips": len(orders.waited),
        "lost": len(orders.seeds) - len(orders.waited),
        "clients": options.clients,
        "p50_seconds": round(hundredths[49], 3),
        "p95_seconds": round(hundredths[94], 3),
        **{f"server_{name}": value for name, value in served.items()},
        **{f"command_{name}": value for name, value in listed.items()},
        **ratios,
    }
