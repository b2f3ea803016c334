"""Does a release draw a colour that it was not trained on? configs/mini/mini_lora.yaml teaches it one.

    python tests/bench/new_color.py --lora adapters/cyan --list clips/cyan --prompts 12 --sheet cyan.png
    python tests/bench/new_color.py --lora adapters/cyan --list clips/cyan --steps 16 --old 200 --keep kept

The prompts are captions of scenes of the world's split `new` whose colour, shape and motion no clip of the
list has together. A clip is right where most of the pixels that are nearer to a thing's colour than to all
else are of the new one; real renders of the same scenes are judged as well. With --old the release with and
without the adapters makes clips of so many held-out prompts with the old colours, from equal seeds, and the
judge of `kinoflow sample evaluate` looks at both: the difference has the standard error of pairs.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from kinoflow.configs.terminal import print_json, progress_bar
from kinoflow.data.video import contact_sheet
from kinoflow.data.world import NEW_COLORS, caption, labels, render, sample_scene
from kinoflow.data.world.draw import COLOR_VALUES, GROUND_CONTRAST, GROUND_VALUES, TEXTURE_SHADE
from kinoflow.sample.evaluation.judge import ATTRIBUTES, Judge
from kinoflow.sample.evaluation.kept import make
from kinoflow.sample.evaluation.world import HeldOut
from kinoflow.sample.generate import generate
from kinoflow.sample.pipeline import Pipeline
from kinoflow.sample.release import Release
from kinoflow.sample.request import ClipRequest

FIRST_SEED = 100_000
SIGN = ((240, 230, 200), (36, 26, 24))


def main() -> None:
    args = options()
    release = Release.load(args.release, args.lora)
    trained = {
        combination(json.loads(line)) for line in (args.list / "manifest.jsonl").open(encoding="utf-8")
    }
    scenes, seed = [], FIRST_SEED
    while len(scenes) < args.prompts:
        scene = sample_scene(seed, split="new")
        truth = labels(scene)
        if truth["color"] in NEW_COLORS and combination(truth) not in trained:
            scenes.append((seed, scene))
        seed += 1
    bucket, sampling = release.bucket(), release.config.sampling
    if args.steps is not None:
        sampling = replace(sampling, num_steps=args.steps)
    size = {"frames": bucket.frames, "height": bucket.height, "width": bucket.width, "fps": bucket.fps}
    models = release.backbone(), release.tae(), release.encoder()
    texts = [caption(scene, seed, complete=True) for seed, scene in scenes]
    clips = []
    with progress_bar() as bar:
        for index, text in enumerate(bar.track(texts, description="clips")):
            clips.append(generate(*models, [text], **size, **vars(sampling), seeds=[index])[0].numpy())
    if args.sheet:
        contact_sheet(args.sheet, clips, columns=8, captions=texts)
    seen = [color_of(clip) for clip in clips]
    real = [color_of(render(scene, **size)) for _, scene in scenes]
    wanted = [scene.things[0].color for _, scene in scenes]
    shown, known = (sum(a == b for a, b in zip(found, wanted, strict=True)) for found in (seen, real))
    figures = {"prompts": len(scenes), "right": shown, "real_right": known, "colors": Counter(seen)}
    if args.old:
        figures["old"] = old_prompts(args)
    print_json({"weights": release.weights_hash, "steps": sampling.num_steps} | figures)


def old_prompts(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Percent right before and after, and the standard error of the difference of pairs."""
    before, after = (right(args, lora) for lora in ([], args.lora))
    return {
        key: {
            "before": 100 * np.mean(before[key]).item(),
            "after": 100 * np.mean(after[key]).item(),
            "error": 100 * np.std(after[key] - before[key], ddof=1).item() / math.sqrt(args.old),
        }
        for key in before
    }


def right(args: argparse.Namespace, lora: Sequence[str]) -> dict[str, np.ndarray]:
    """Of each held-out prompt with the old colours 1.0 where its clip shows what it says."""
    pipeline = Pipeline.from_pretrained(args.release, lora=lora)
    held_out = HeldOut(pipeline, args.old)
    clips = []
    with progress_bar() as bar:
        for index, text in enumerate(bar.track(held_out.texts, description="old prompts")):
            plan = pipeline.plan(ClipRequest(prompt=text, seed=index, steps=args.steps, best_of=1))
            clips.append(make(pipeline, plan, args.keep).frames)
    seen = Judge.from_pretrained(pipeline.release.folder / "judge").judge(clips).labels
    truth = [labels(scene) for scene in held_out.scenes]
    found = {
        key: np.array([float(a[key] == b[key]) for a, b in zip(seen, truth, strict=True)])
        for key in ATTRIBUTES
    }
    return {**found, "all": np.prod(list(found.values()), axis=0)}


def combination(truth: dict) -> tuple[str, str, str]:
    return truth["color"], truth["shape"], truth["motion"]


def color_of(clip: np.ndarray) -> str:
    """The colour of most of a clip's pixels, those of grounds and signs aside."""
    names, tones = [], []
    for name, value in COLOR_VALUES.items():
        for factor in (1.0, TEXTURE_SHADE):
            names.append(name)
            tones.append([factor * part for part in value])
    grounds = [
        [part + more for part in value] for value in GROUND_VALUES.values() for more in (0, GROUND_CONTRAST)
    ]
    tones += [*grounds, *SIGN]
    pixels = clip[::8].reshape(-1, 3).astype(np.float32)
    nearest = np.argmin([((pixels - np.float32(tone)) ** 2).sum(1) for tone in tones], axis=0)
    counts = Counter()
    for index in nearest[nearest < len(names)]:
        counts[names[index]] += 1
    return counts.most_common(1)[0][0] if counts else ""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--release", help="default: the shipped one")
    parser.add_argument("--lora", action="append", default=[], metavar="FOLDER[:SCALE]")
    parser.add_argument("--list", type=Path, required=True, metavar="FOLDER", help="what was trained on")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--sheet", type=Path, metavar="PNG")
    parser.add_argument("--old", type=int, default=0, help="held-out prompts with old colours (default: 0)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the clips of --old there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
