"""Does a release make what prompts ask for? A judge answers on held-out scenes, beside its own accuracy.

The scenes hold combinations of colour, shape and motion that no training clip shows. Their captions name all
three. The judge sees the generated clips and real renders of the same scenes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import UInt8

from kinoflow.configs.devices import name_of, parse_device, parse_dtype
from kinoflow.configs.errors import UserError
from kinoflow.configs.terminal import progress_bar
from kinoflow.data.clips.buckets import Bucket
from kinoflow.data.world import Scene, caption, labels, render, sample_scene
from kinoflow.sample.evaluation.judge import ATTRIBUTES, Judge, Judgement
from kinoflow.sample.evaluation.statistics import Share, frechet_distance
from kinoflow.sample.generate import Sampling, generate
from kinoflow.sample.options import add_hardware, add_lora, named_as_options
from kinoflow.tae.codec.metrics import psnr
from kinoflow.tae.model.pixels import from_bytes, to_bytes
from kinoflow.tae.model.tae import TAE

if TYPE_CHECKING:
    from kinoflow.sample.release import Release

Clip = UInt8[np.ndarray, "frames height width 3"]
_SHEET_CLIPS = 12
_SHEET_FRAMES = 8


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How well generated clips show what their prompts say.

    `joint` asks for colour, shape and motion at once; `word` only of prompts with a written word (None when
    there is none). `frechet` is the distance of generated from real clips in the judge's features,
    `frechet_real` that of other real clips: the least one can expect at this number of clips.
    `autoencoder_psnr` is the mean PSNR in dB of the real clips after the release's autoencoder: no generated
    clip can be sharper.
    """

    prompts: int
    color: Share
    shape: Share
    motion: Share
    joint: Share
    word: Share | None
    frechet: float
    frechet_real: float
    autoencoder_psnr: float | None = None


def measure(
    judge: Judge,
    scenes: Sequence[Scene],
    generated: Sequence[Clip],
    real: Sequence[Clip],
    other: Sequence[Clip],
) -> Evaluation:
    """Judge `generated` and `real` clips of `scenes`; `other` are real clips of other scenes."""
    if not len(scenes) == len(generated) == len(real) >= 2 or len(other) < 2:
        raise UserError(f"prompts: {len(scenes)}; an evaluation needs at least 2, each with its clips")
    truth = [labels(scene) for scene in scenes]
    seen, known, apart = judge.judge(generated), judge.judge(real), judge.judge(other)
    shares: dict[str, Any] = {key: _share([key], truth, seen, known) for key in ATTRIBUTES}
    return Evaluation(
        prompts=len(scenes),
        **shares,
        joint=_share(ATTRIBUTES, truth, seen, known),
        word=_share(["word"], truth, seen, known) if any(label["word"] for label in truth) else None,
        frechet=frechet_distance(seen.features, known.features),
        frechet_real=frechet_distance(apart.features, known.features),
    )


def _share(keys: Sequence[str], truth: Sequence[dict[str, str]], seen: Judgement, known: Judgement) -> Share:
    asked = [i for i, label in enumerate(truth) if all(label[key] for key in keys)]

    def right(judgement: Judgement) -> int:
        return sum(all(judgement.labels[i][key] == truth[i][key] for key in keys) for i in asked)

    return Share.of(right(seen), len(asked), real=right(known))


def evaluate(
    release: Release,
    *,
    prompts: int,
    seed: int = 0,
    sampling: Sampling,
    sheet: Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[], None] | None = None,
) -> Evaluation:
    """Generate a clip for each of the first held-out scenes on `device` and judge them on the CPU.

    `dtype` is the transformer's. `sheet`: a PNG with the first clips, one a row. `progress` is called after
    each clip.
    """
    from kinoflow.data.video import contact_sheet

    if prompts < 2:
        raise UserError(f"prompts: {prompts}; an evaluation needs at least 2")
    bucket = release.bucket()
    judge, dit, tae, encoder = (
        Judge.from_pretrained(release.folder / "judge"),
        release.backbone(device, dtype),
        release.tae(device),
        release.encoder(device=device),
    )
    scenes = [sample_scene(index, split="heldout") for index in range(prompts)]
    texts = [caption(scene, index, complete=True) for index, scene in enumerate(scenes)]
    clips: list[Clip] = []
    size = {"frames": bucket.frames, "height": bucket.height, "width": bucket.width, "fps": bucket.fps}
    for index, text in enumerate(texts):
        clip = generate(dit, tae, encoder, [text], **size, **asdict(sampling), seeds=[seed + index])
        clips.append(clip[0].numpy())
        if progress is not None:
            progress()
    if sheet is not None:
        contact_sheet(sheet, clips[:_SHEET_CLIPS], columns=_SHEET_FRAMES, captions=texts[:_SHEET_CLIPS])
    others = [sample_scene(prompts + index, split="heldout") for index in range(prompts)]
    real = renders(scenes, bucket)
    evaluation = measure(judge, scenes, clips, real, renders(others, bucket))
    return replace(evaluation, autoencoder_psnr=reconstruction_psnr(tae, real))


@torch.no_grad()
def reconstruction_psnr(tae: TAE, clips: Sequence[Clip]) -> float:
    """Mean PSNR in dB over all frames of clips that went through the autoencoder and came back as bytes."""
    values, device = [], next(tae.parameters()).device
    for clip in clips:
        source = torch.from_numpy(clip)
        latent = tae.encode(from_bytes(source[None].to(device))).mean
        decoded = to_bytes(tae.decode(latent, len(clip)))[0].cpu()
        values.append(psnr(*(frames.movedim(-1, 1).float() / 255 for frames in (decoded, source))))
    return float(torch.cat(values).mean())


def renders(scenes: Sequence[Scene], bucket: Bucket) -> list[Clip]:
    """Real clips of the scenes in the shape of the bucket."""
    size = {"frames": bucket.frames, "height": bucket.height, "width": bucket.width, "fps": bucket.fps}
    return [render(scene, **size) for scene in scenes]


def main(argv: list[str]) -> int:
    """`kinoflow sample evaluate`: print a table, or one JSON object with every figure."""
    from kinoflow.sample.release import Release

    args = _parser().parse_args(argv)
    release = Release.load(args.release, args.lora)
    if release.config.classes:
        raise UserError(f"{release.folder}: makes classes, and the world's scenes are asked for in prompts; "
                        "take a release that reads them")  # fmt: skip
    with named_as_options():
        sampling = release.sampling(num_steps=args.steps, guidance_scale=args.guidance)
    if args.threads < 1:
        raise UserError(f"threads: {args.threads}; use 1 or more")
    torch.set_num_threads(args.threads)
    device = parse_device(args.device)
    dtype = parse_dtype(args.dtype, device)
    started = time.perf_counter()
    with progress_bar() as bar:
        task = bar.add_task("clips", total=args.prompts)
        evaluation = evaluate(
            release,
            prompts=args.prompts,
            seed=args.seed,
            sampling=sampling,
            sheet=args.sheet,
            device=device,
            dtype=dtype,
            progress=lambda: bar.advance(task),
        )
    settings = {
        "release": release.name,
        "weights": release.weights_hash,
        "clip": str(release.bucket()),
        "seed": args.seed,
        "device": device.type,
        "dtype": name_of(dtype),
        "threads": args.threads,
        "seconds": round(time.perf_counter() - started, 1),
    }
    figures = settings | asdict(sampling) | asdict(evaluation)
    print(json.dumps(figures) if args.json else _table(evaluation, settings | asdict(sampling)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kinoflow sample evaluate",
        description="Share of clips that show the colour, shape, motion and word of their prompts.",
    )
    add = parser.add_argument
    add("--release", metavar="RELEASE", help="release folder or hub id (default: the shipped mini release)")
    add_lora(add)
    add("--prompts", type=int, default=200, help="number of held-out scenes (default 200)")
    add("--seed", type=int, default=0, help="seed of the first clip; the others follow")
    add("--steps", type=int, help="intervals of the time grid")
    add("--guidance", type=float, help="weight of the prompt")
    add("--sheet", type=Path, metavar="PNG", help="write a contact sheet of the first clips")
    add_hardware(add)
    add("--json", action="store_true", help="print one JSON object with every figure")
    return parser


def _table(evaluation: Evaluation, settings: dict[str, object]) -> str:
    lines = ["  ".join(f"{key} {value}" for key, value in settings.items()), ""]
    lines.append(f"{'':8}{'generated':>10}  {'95 % interval':>15}{'clips':>7}{'judge on real':>15}")
    for key in (*ATTRIBUTES, "joint", "word"):
        s: Share | None = getattr(evaluation, key)
        if s is not None:
            interval = f"{100 * s.low:.1f} to {100 * s.high:.1f}"
            lines.append(f"{key:8}{100 * s.share:>8.1f} %  {interval:>15}{s.count:>7}{100 * s.real:>13.1f} %")
    floor = f"{evaluation.frechet_real:.2f} between real clips"
    lines.append(f"\nFréchet distance {evaluation.frechet:.2f} ({floor})")
    return "\n".join(lines)
