"""Peak memory of encoding and of decoding a short and a long clip: `python tests/bench/memory.py [--json]`.

Both clips are drawn on the fly, and each step runs in a process of its own, whose largest resident size the
kernel tells (VmHWM, Linux only). A codec that streams takes the same for 6 seconds and for 60.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

from kinoflow.data.video import VideoWriter

FPS = 24
ROOT = Path(__file__).parents[2]
# The process reads its own mark when the command has ended.
CHILD = """
import sys
from kinoflow.tae.__main__ import main
status = main(sys.argv[1:])
print("status of the process:", open("/proc/self/status").read(), file=sys.stderr)
sys.exit(status)
"""


def gradients(frames: int, width: int, height: int) -> Iterator[np.ndarray]:
    """Colours that drift across the picture, one frame at a time."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    for index in range(frames):
        phase = index / FPS
        channels = (
            x / width + 0.2 * phase,
            y / height + 0.1 * phase,
            (x + y) / (width + height) - 0.3 * phase,
        )
        yield np.stack([127.5 + 127.5 * np.sin(2 * np.pi * channel) for channel in channels], -1).astype(
            np.uint8
        )


def make(path: Path, frames: int, width: int, height: int) -> None:
    """Write a clip without holding it."""
    with VideoWriter(path, fps=Fraction(FPS), width=width, height=height) as writer:
        for frame in gradients(frames, width, height):
            writer.write(frame[None])


def peak_of(*words: object) -> int:
    """Largest resident size, in bytes, of `kinoflow tae` with these words."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    found = re.search(r"VmHWM:\s+(\d+) kB", done.stderr)
    if done.returncode or found is None:
        raise SystemExit(f"{' '.join(map(str, words))}: failed\n{done.stderr}")
    return 1024 * int(found[1])


def measured(folder: Path, frames: int, size: tuple[int, int], options: list[str]) -> dict[str, int]:
    """Peaks of encoding and decoding one clip."""
    clip, latents = folder / f"{frames}.mp4", folder / f"{frames}.kino"
    make(clip, frames, *size)
    encode = peak_of("encode", clip, latents, "--json", *options)
    decode = peak_of("decode", latents, folder / f"{frames}-back.mp4", "--json", *options)
    return {"encode": encode, "decode": decode}


def main() -> None:
    """Measure both clips and say how much more the long one takes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, nargs=2, default=(6 * FPS, 60 * FPS), metavar=("SHORT", "LONG"))
    parser.add_argument("--size", default="1280x720", help="WIDTHxHEIGHT (default: 1280x720)")
    parser.add_argument("--tiling", default="halo", choices=("halo", "blend"))
    parser.add_argument("--memory", default="4GiB", help="budget given to the command (default: 4GiB)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    width, height = map(int, arguments.size.split("x"))
    options = ["--tiling", arguments.tiling, "--memory", arguments.memory]
    with tempfile.TemporaryDirectory() as folder:
        short, long = (measured(Path(folder), n, (width, height), options) for n in arguments.frames)
    growth = {step: long[step] / short[step] - 1 for step in short}
    figures = {"size": arguments.size, "frames": list(arguments.frames), "tiling": arguments.tiling}
    figures |= {"memory": arguments.memory, "short": short, "long": long, "growth": growth}
    if arguments.json:
        print(json.dumps(figures))
        return
    for step, more in growth.items():
        for frames, peak in zip(arguments.frames, (short, long), strict=True):
            print(f"{step} {frames} frames: {peak[step] / 2**20:.0f} MiB")
        print(f"{step}: the long clip takes {more:+.1%}")


if __name__ == "__main__":
    main()
