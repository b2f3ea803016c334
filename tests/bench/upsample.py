"""How much an upsampler gains on bilinear resizing: PSNR against the toy world's own larger renders.

    python tests/bench/upsample.py --release UPSAMPLER --scenes 8 --frames 8 --sheet upsampled.png

Of held-out scenes, drawn small and large. `given` is the small render itself, `generated` is what the
release's autoencoder makes of it, as a sampled clip has been through it; `bound` is the large render through
the autoencoder, frame by frame: no upsampler can do better. The sheet has bilinear on top, then upsampled,
then the render.
"""

import argparse
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from kinoflow.data.video import write
from kinoflow.data.video.sheet import contact_sheet
from kinoflow.data.world import render, sample_scene
from kinoflow.sample.larger import of_frames
from kinoflow.sample.pipeline import Pipeline
from kinoflow.sample.release import Release
from kinoflow.sample.request import ClipRequest
from kinoflow.tae.model.pixels import from_bytes, to_bytes
from kinoflow.tae.model.stills import encode_stills, resized
from kinoflow.tae.model.tae import TAE

RATE = Fraction(16)


def main() -> None:
    """Print one JSON object."""
    args = arguments()
    torch.set_num_threads(1)
    pipeline = Pipeline(Release.load(args.release))
    tae = pipeline.decoder
    assert isinstance(tae, TAE)
    errors: dict[str, list[float]] = {}
    rows: list[list[np.ndarray]] = [[], [], []]
    for number in range(args.scenes):
        scene = sample_scene(number, split="heldout")
        size = {"frames": args.frames, "fps": RATE}
        large, small = (
            render(scene, height=side, width=side, **size) for side in (args.size, args.size // 2)
        )
        found = {"bound": framewise(tae, large)}
        for name, clip in (("given", small), ("generated", reconstructed(tae, small))):
            found[f"bilinear {name}"] = bilinear(clip, args.size)
            found[f"upsampled {name}"] = upsampled(pipeline, clip, number, args.steps)
        for name, frames in found.items():
            errors.setdefault(name, []).append(mean_square(frames, large))
        shown = (found["bilinear generated"], found["upsampled generated"], large)
        for row, frames in zip(rows, shown, strict=True):
            row.append(frames[len(frames) // 2])
        if args.keep:
            args.keep.mkdir(parents=True, exist_ok=True)
            write(args.keep / f"{number}.mp4", found["upsampled given"], fps=RATE, crf=8)
    if args.sheet:
        contact_sheet(args.sheet, [np.stack(row) for row in rows], columns=args.scenes)
    psnr = {name: round(sum(map(decibel, each)) / len(each), 2) for name, each in errors.items()}
    each = {name: [round(decibel(value), 2) for value in values] for name, values in errors.items()}
    print(json.dumps({"psnr": psnr, "each": each, **{k: str(v) for k, v in vars(args).items()}}))


def arguments() -> argparse.Namespace:
    """The command's words."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--release", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=8)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--keep", type=Path, help="folder for the clips")
    return parser.parse_args()


def upsampled(pipeline: Pipeline, small: np.ndarray, seed: int, steps: int | None) -> np.ndarray:
    """What the release makes of the clip."""
    request = ClipRequest(prompt="", seed=seed, steps=steps)
    return pipeline.make(of_frames(pipeline.release, request, small, RATE, "scene")).frames


def bilinear(small: np.ndarray, side: int) -> np.ndarray:
    """Each frame resized."""
    return to_bytes(resized(from_bytes(torch.from_numpy(small)[None]), side, side))[0].numpy()


@torch.no_grad()
def reconstructed(tae: TAE, clip: np.ndarray) -> np.ndarray:
    """The clip through the autoencoder."""
    video = from_bytes(torch.from_numpy(clip)[None])
    return to_bytes(tae.decode(tae.encode(video).mean, len(clip)))[0].numpy()


@torch.no_grad()
def framewise(tae: TAE, clip: np.ndarray) -> np.ndarray:
    """Each frame through the autoencoder."""
    latent = encode_stills(lambda video: tae.encode(video).mean, from_bytes(torch.from_numpy(clip)[None]))
    frames = [to_bytes(tae.decode(still, 1))[0] for still in latent.split(1, dim=2)]
    return torch.cat(frames).numpy()


def mean_square(one: np.ndarray, other: np.ndarray) -> float:
    """Of values in 0..1."""
    return float(((one.astype(float) - other) ** 2).mean()) / 255**2


def decibel(error: float) -> float:
    """PSNR."""
    return -10 * math.log10(error)


if __name__ == "__main__":
    main()
