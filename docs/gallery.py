"""README's pictures, always the same ones: `make gallery`, or `python docs/gallery.py [--out FOLDER]`.

samples.gif shows the six clips of `PROMPTS`, seed 0; samples.png eight frames each of the first twelve
prompts of the held-out evaluation, whose seeds are 0, 1, ... as there. Nothing is selected but by the
release's verifier. Both say which weights made them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL.PngImagePlugin import PngInfo

from kinoflow.configs.errors import run
from kinoflow.configs.terminal import progress_bar
from kinoflow.data.video import contact_sheet
from kinoflow.data.world import caption, sample_scene
from kinoflow.sample.picture import write_picture
from kinoflow.sample.pipeline import Pipeline
from kinoflow.sample.request import ClipRequest

PROMPTS = (
    "a red star moves left on a gray background",
    "a blue heart grows on a black background",
    "a yellow star spins on a teal background",
    "a green ring bounces on a brown background",
    "an orange square moves up on a navy background",
    'a purple circle moves right on a black background with a sign that reads "EXIT"',
)
HELD_OUT, SHEET_FRAMES = 12, 8
COLUMNS, GAP = 3, 4

Clip = UInt8[np.ndarray, "frames height width 3"]


def main(argv: Sequence[str] | None = None) -> int:
    """Write both pictures; 0."""
    parser = argparse.ArgumentParser(prog="make gallery", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, metavar="FOLDER")
    parser.add_argument("--weights", metavar="RELEASE", help="default: the shipped mini release")
    parser.add_argument("--steps", type=int, help="default: the release's")
    args = parser.parse_args(argv)
    pipeline = Pipeline.from_pretrained(args.weights, device="cpu")
    held_out = [caption(sample_scene(i, split="heldout"), i, complete=True) for i in range(HELD_OUT)]
    requests = [ClipRequest(prompt=prompt, steps=args.steps) for prompt in PROMPTS]
    requests += [ClipRequest(prompt=prompt, seed=i, steps=args.steps) for i, prompt in enumerate(held_out)]
    videos = []
    with progress_bar() as bar:
        for video in bar.track(pipeline.batch(requests), total=len(requests), description="clips"):
            videos.append(video)
    clips, release = [video.frames for video in videos], pipeline.release
    made_by = {"release": release.name, "weights": release.weights_hash}
    write_picture(args.out / "samples.gif", mosaic(clips[: len(PROMPTS)]), videos[0].fps, made_by)
    info = PngInfo()
    for key, value in made_by.items():
        info.add_itxt(key, value)
    sheet = args.out / "samples.png"
    contact_sheet(sheet, clips[len(PROMPTS) :], columns=SHEET_FRAMES, captions=held_out, info=info)
    print(f"{args.out / 'samples.gif'}\n{sheet}")
    return 0


def mosaic(clips: Sequence[Clip]) -> Clip:
    """Clips of one size and length side by side, `COLUMNS` in a row, on white."""
    framed = [np.pad(clip, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255) for clip in clips]
    rows = [np.concatenate(framed[i : i + COLUMNS], axis=2) for i in range(0, len(framed), COLUMNS)]
    return np.concatenate(rows, axis=1)[:, :-GAP, :-GAP]


if __name__ == "__main__":
    sys.exit(run(main, "make gallery"))
