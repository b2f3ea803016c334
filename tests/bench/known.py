"""How well does a release use what it is given? First and last frames, going on, changing in places.

    python tests/bench/known.py --release RELEASE --prompts 40 [--steps 16] [--lora eight] [--sheet PNG]

Pictures and clips are real renders of held-out scenes, whose captions are the prompts. `seam` is how much
changes from the last frame given to the first frame made, over how much changes between neighbours in the
real clip: 1 is no seam.
"""

import argparse
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from kinoflow.configs.terminal import print_json, progress_bar
from kinoflow.data.video import contact_sheet, write
from kinoflow.data.world import caption, labels, render, sample_scene
from kinoflow.sample.evaluation.judge import ATTRIBUTES, Judge
from kinoflow.sample.pipeline import Pipeline

SHOWN = 6
WAYS = ("text", "image", "both", "extend", "edit")


def main() -> None:
    args = options()
    pipeline = Pipeline.from_pretrained(args.release, lora=args.lora)
    judge = Judge.from_pretrained(pipeline.release.folder / "judge")
    bucket = pipeline.release.bucket()
    size = {"height": bucket.height, "width": bucket.width, "fps": bucket.fps}
    scenes = [sample_scene(index, split="heldout") for index in range(args.prompts)]
    texts = [caption(scene, index, complete=True) for index, scene in enumerate(scenes)]
    real = [render(scene, frames=bucket.frames, **size) for scene in scenes]
    made: dict[str, list[np.ndarray]] = {way: [] for way in args.ways}
    with TemporaryDirectory() as folder, progress_bar() as bar:
        for index in bar.track(range(len(scenes)), description="clips"):
            given = files(Path(folder), real[index], bucket)
            for way in args.ways:
                video = pipeline(texts[index], seed=index, steps=args.steps, best_of=1, **given[way])
                made[way].append(video.frames)
    truth = [labels(scene) for scene in scenes]
    figures = {way: measured(way, clips, real, truth, judge) for way, clips in made.items()}
    if args.sheet:
        rows = [(way, index) for index in range(min(SHOWN, len(scenes))) for way in args.ways]
        captions = [f"{way}: {texts[index]}" for way, index in rows]
        contact_sheet(args.sheet, [made[way][index] for way, index in rows], columns=8, captions=captions)
    common = {"weights": pipeline.release.weights_hash, "prompts": args.prompts, "steps": args.steps}
    print_json(common | figures)


def files(folder: Path, clip: np.ndarray, bucket) -> dict[str, dict]:
    """What is given in each way, from a real clip: its ends, its first half, all but its middle."""
    Image.fromarray(clip[0]).save(folder / "first.png")
    Image.fromarray(clip[-1]).save(folder / "last.png")
    write(folder / "half.mp4", clip[: len(clip) // 2], fps=bucket.fps, crf=0)
    write(folder / "whole.mp4", clip, fps=bucket.fps, crf=0)
    mask = np.zeros(clip.shape[1:3], np.uint8)
    height, width = mask.shape
    mask[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return {
        "text": {},
        "image": {"image": folder / "first.png"},
        "both": {"image": folder / "first.png", "last": folder / "last.png"},
        "extend": {"extend": folder / "half.mp4", "seconds": float(len(clip) / 2 / bucket.fps)},
        "edit": {"edit": folder / "whole.mp4", "mask": folder / "mask.png"},
    }


def measured(way: str, clips: list, real: list, truth: list, judge: Judge) -> dict[str, float]:
    seen = judge.judge(clips)
    right = [all(seen.labels[i][key] == truth[i][key] for key in ATTRIBUTES) for i in range(len(clips))]
    found = {"joint": fmean(right)}
    if way in ("image", "both"):
        found["first_psnr"] = fmean(close(clip[0], own[0]) for clip, own in zip(clips, real, strict=True))
    if way == "both":
        found["last_psnr"] = fmean(close(clip[-1], own[-1]) for clip, own in zip(clips, real, strict=True))
    if way == "extend":
        half = len(real[0]) // 2
        found["seam"] = fmean(seam(clip, own, half) for clip, own in zip(clips, real, strict=True))
        ends = judge.judge([clip[half:] for clip in clips])
        known = judge.judge([clip[half:] for clip in real])
        for name, verdict in (("second_half", ends), ("real_second_half", known)):
            found[name] = fmean(
                all(verdict.labels[i][key] == truth[i][key] for key in ATTRIBUTES) for i in range(len(clips))
            )
    if way == "edit":
        height, width = real[0].shape[1:3]
        outside = np.ones((height, width), bool)
        outside[height // 4 - 4 : 3 * height // 4 + 4, width // 4 - 4 : 3 * width // 4 + 4] = False
        found["rest_psnr"] = fmean(
            close(clip[:, outside], own[:, outside]) for clip, own in zip(clips, real, strict=True)
        )
    return {key: round(value, 4) for key, value in found.items()}


def close(one: np.ndarray, other: np.ndarray) -> float:
    """PSNR in dB, at most 60."""
    error = np.square(one.astype(np.float64) - other).mean()
    return min(10 * np.log10(255**2 / max(error, 1e-9)), 60.0)


def seam(clip: np.ndarray, own: np.ndarray, at: int) -> float:
    """Change across the seam, over the real clip's mean change between neighbours around it."""
    around = range(at - 3, at + 3)
    return change(clip[at - 1], clip[at]) / fmean(change(own[i], own[i + 1]) for i in around)


def change(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(np.int16) - other.astype(np.int16)).mean()) + 0.05


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--release", help="default: the shipped one")
    parser.add_argument("--lora", action="append", default=[], help="adapters, a student's for example")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--steps", type=int, help="default: the release's")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--sheet", type=Path, metavar="PNG")
    return parser.parse_args()


if __name__ == "__main__":
    main()
