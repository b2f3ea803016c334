"""Clips side by side as one animated picture for a page: `python docs/animate.py OUT.gif CLIP.mp4 …`."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from kinoflow.data.video import probe, read

COLUMNS, SCALE, GAP = 3, 1, 4


def main(out: str, *paths: str) -> None:
    """Write a looping picture of clips of one size and length, three in a row."""
    clips = [np.pad(read(path), ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255) for path in paths]
    rows = [np.concatenate(clips[i : i + COLUMNS], axis=2) for i in range(0, len(clips), COLUMNS)]
    frames = [Image.fromarray(frame) for frame in np.concatenate(rows, axis=1)]
    large = [
        frame.resize((frame.width * SCALE, frame.height * SCALE), Image.Resampling.NEAREST)
        for frame in frames
    ]
    duration = round(1000 / probe(Path(paths[0])).fps)
    large[0].save(out, save_all=True, append_images=large[1:], duration=duration, loop=0)


if __name__ == "__main__":
    main(*sys.argv[1:])
