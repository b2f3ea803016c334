"""The log of a run: log.jsonl, boards, and a bar or lines to watch it by; written by rank 0."""

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import Progress
from torch import Tensor

from kinoflow.configs.files import write_text
from kinoflow.configs.terminal import progress_bar
from kinoflow.train.run.boards import Boards
from kinoflow.train.run.task import Parts

LOG, SHARE = "log.jsonl", " share"
# Dense bf16 FLOP/s of one device, by a part of its name.
_PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def peak_flops(device: torch.device) -> float | None:
    """The peak of this device, None when it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_FLOPS.items() if part in name), None)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most the device allocator held, or on a CPU the largest resident set so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def training_bar() -> Progress:
    """The bar of a training, with figures; disabled unless a person watches: else there are lines."""
    return progress_bar(figures=True, quiet=not sys.stdout.isatty())


def print_line(step: int, steps: int, *, loss: float, lr: float, rate: float, left: float) -> None:
    """What cluster logs and pipes get in the bar's place: `rate` in samples/s, `left` in seconds."""
    figures = f"loss {loss:.4g}  lr {lr:.3g}  {rate:.1f} samples/s  {left:.0f} s left"
    print(f"step {step}/{steps}  {figures}", flush=True)


class Log:
    """Means of each interval of `log_every` steps. Figures stay tensors until an interval is written.

    A figure whose name with ` share` behind it is one too counts only for that share of the samples: its mean
    is divided by the other's, and where that is 0 there is none.
    """

    def __init__(self, folder: Path, *, device: torch.device, rank: int, processes: int, start: int,
                 steps: int, wandb: str | None = None,
                 pending: dict[str, list[float]] | None = None) -> None:  # fmt: skip
        self._values: dict[str, list[Tensor | float]] = {}
        for key, values in (pending or {}).items():
            self._values[key] = [*values]
        self._device, self._processes, self._start, self._steps = device, processes, start, steps
        self._samples = self._tokens = self._flops = self._paused = 0.0
        self._clock = self._began = time.perf_counter()
        self._file, self._board, self._bar, self._open = None, None, None, ExitStack()
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            self._board = self._open.enter_context(closing(Boards(folder, start, wandb)))
            _cut(folder / LOG, start)
            self._file = self._open.enter_context((folder / LOG).open("a", encoding="utf-8"))
            self._bar = self._open.enter_context(training_bar())
            self._bar.add_task("", total=steps, completed=start, figures="")

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def add(self, *parts: Parts) -> None:
        """Take in figures of this rank: scalars or 0-d tensors, kept as they are."""
        for part in parts:
            for key, value in part.items():
                self._values.setdefault(key, []).append(value)

    def count(self, samples: float, tokens: float, flops: float = 0.0) -> None:
        """End a step: what this rank processed in it."""
        self._samples += samples
        self._tokens += tokens
        self._flops += flops
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0])

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What is done here is no training: speeds do without its time."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - begin

    def pending(self) -> dict[str, list[float]]:
        """The figures of the unfinished interval, for a checkpoint."""
        return {key: [float(value) for value in values] for key, values in self._values.items()}

    def write(self, step: int, more: Parts | None = None, *, lr: float) -> None:
        """End an interval after `step` steps, with `more` figures as they are; every rank calls it."""
        means = self._means()
        now = time.perf_counter()
        elapsed = max(now - self._clock - self._paused, 1e-9)
        line: dict[str, Any] = {"step": step, **means, **(more or {}), "lr": lr}
        line["samples_per_second"] = self._samples * self._processes / elapsed
        line["tokens_per_second"] = self._tokens * self._processes / elapsed
        line["peak_memory_bytes"] = peak_memory(self._device)
        line["seconds"] = now - self._began
        peak = peak_flops(self._device)
        if peak and self._flops:
            line["mfu"] = self._flops / elapsed / peak
        self._values, self._samples, self._tokens, self._clock = {}, 0, 0, now
        self._flops = self._paused = 0.0
        if self._file is not None:
            self._publish(line)

    def _means(self) -> dict[str, float]:
        keys = list(self._values)
        means = [sum(torch.as_tensor(v, dtype=torch.float64, device=self._device) for v in self._values[key])
                 / len(self._values[key]) for key in keys]  # fmt: skip
        if not means:
            return {}
        stacked = torch.stack([torch.as_tensor(mean) for mean in means])
        if self._processes > 1:
            dist.all_reduce(stacked)
            stacked /= self._processes
        return _shared(dict(zip(keys, stacked.tolist(), strict=True)))

    def _publish(self, line: dict[str, Any]) -> None:
        assert self._file is not None and self._board is not None
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._board.show(line["step"], {key: value for key, value in line.items() if key != "step"})
        assert self._bar is not None
        loss, rate = line.get("loss", float("nan")), line["samples_per_second"]
        if self._bar.disable:
            left = line["seconds"] * (self._steps - line["step"]) / max(line["step"] - self._start, 1)
            print_line(line["step"], self._steps, loss=loss, lr=line["lr"], rate=rate, left=left)
        self._bar.update(self._bar.task_ids[0], figures=f"loss {loss:.4g}  {rate:.1f} samples/s")


def _shared(means: dict[str, float]) -> dict[str, float]:
    """Each figure of a share of the samples divided by that share."""
    found = {}
    for key, mean in means.items():
        if not key.endswith(SHARE):
            share = means.get(key + SHARE, 1.0)
            found |= {key: mean / share} if share > 0 else {}
    return found


def _cut(path: Path, start: int) -> None:
    """Drop the lines that a killed run wrote after the checkpoint it now resumes from."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            if json.loads(line)["step"] <= start:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            continue  # the line that the kill cut in half
    write_text(path, "".join(kept))
