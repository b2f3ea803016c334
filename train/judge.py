"""Training the judge on real renders of the world: `python -m train configs/mini_judge.yaml run=runs/judge`.

A short run on one core, so a plain loop: no shards, no resume; started again, it starts again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from rich.progress import track
from torch import Tensor
from torch.nn import functional

from configs import dump
from data.buckets import Bucket, parse
from data.world import Split, labels, render, sample_scene
from sample.judge import ATTRIBUTES, Judge, JudgeConfig, Verdict, letter_classes
from tae.model import TAE
from train.config import RunConfig
from train.optimizer import adamw, learning_rate

# Kept away from the first held-out scenes, on which releases are evaluated.
_VALIDATION_SEED = 1_000_000
_NUM_VALIDATION = 1024
# Between the scenes of runs with different seeds.
_SEEDS_APART = 100_000_000


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Clips and the class of each question."""

    clips: UInt8[Tensor, "b f h w 3"]
    color: Int[Tensor, " b"]
    shape: Int[Tensor, " b"]
    motion: Int[Tensor, " b"]
    letters: Int[Tensor, "b letters"]


def main(config: RunConfig) -> int:
    """Train a judge, write it to the release's judge/ and its accuracy to the run's judge.json; 0.

    `data.buckets` are the sizes, lengths and rates that are drawn. When the release already holds an
    autoencoder, one clip in eight passes through it, so that its traces are not held against a clip.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    judge = Judge(JudgeConfig())
    judge.init_weights()
    folder = Path(config.run)
    folder.mkdir(parents=True, exist_ok=True)
    dump(config, folder / "config.yaml")
    started = time.perf_counter()
    _fit(judge, config, folder)
    judge.save_pretrained(Path(config.release) / "judge")
    saved = Judge.from_pretrained(Path(config.release) / "judge")
    figures = accuracy(saved, scenes=_NUM_VALIDATION, bucket=parse(config.data.buckets[0]), split="heldout")
    figures |= {"steps": config.steps, "seconds": time.perf_counter() - started}
    (folder / "judge.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures))
    return 0


def _fit(judge: Judge, config: RunConfig, folder: Path) -> None:
    tae_folder = Path(config.release) / "tae"
    tae = TAE.from_pretrained(tae_folder) if (tae_folder / "config.json").exists() else None
    optimizer = adamw(judge, config.optimizer)
    buckets = [parse(text) for text in config.data.buckets]
    size, sums, count = config.data.batch_size, {}, 0
    judge.train()
    with (folder / "log.jsonl").open("w", encoding="utf-8") as log:
        for step in track(range(config.steps), description="judge"):
            bucket = buckets[step % len(buckets)]
            seeds = range(
                config.seed * _SEEDS_APART + step * size, config.seed * _SEEDS_APART + (step + 1) * size
            )
            batch = draw(seeds, bucket, judge.config, split="train")
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            video = degrade(judge.prepare(_reconstruct(tae, batch.clips, size // 8)), generator)
            loss, parts = judge_loss(judge(video), batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(judge.parameters(), config.optimizer.grad_clip or math.inf)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config.optimizer, step, config.steps)
            optimizer.step()
            count += 1
            sums = {key: sums.get(key, 0.0) + float(value.detach()) for key, value in parts.items()}
            if (step + 1) % config.log_every == 0:
                log.write(json.dumps({"step": step + 1} | {k: v / count for k, v in sums.items()}) + "\n")
                log.flush()
                sums, count = {}, 0


def draw(seeds: Sequence[int], bucket: Bucket, config: JudgeConfig, *, split: Split) -> Batch:
    """Render the scenes of these seeds and look up their classes."""
    scenes = [sample_scene(seed, split=split) for seed in seeds]
    size = {"frames": bucket.frames, "height": bucket.height, "width": bucket.width}
    clips = np.stack([render(scene, fps=bucket.fps, **size) for scene in scenes])
    named = [labels(scene) for scene in scenes]
    return Batch(
        clips=torch.from_numpy(clips),
        color=torch.tensor([config.colors.index(label["color"]) for label in named]),
        shape=torch.tensor([config.shapes.index(label["shape"]) for label in named]),
        motion=torch.tensor([config.motions.index(label["motion"]) for label in named]),
        letters=torch.tensor([letter_classes(label["word"], config.letters) for label in named]),
    )


def judge_loss(verdict: Verdict, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The sum of the cross entropies of the questions, in nats, and each of them."""
    parts = {key: functional.cross_entropy(getattr(verdict, key), getattr(batch, key)) for key in ATTRIBUTES}
    # Five scenes in six have no sign: without this weight the reader sees little gradient for long.
    parts["letters"] = functional.cross_entropy(verdict.letters.flatten(0, 1), batch.letters.flatten())
    return sum(parts.values(), torch.zeros(())) + parts["letters"], parts


def degrade(video: Float[Tensor, "b 3 f h w"], generator: torch.Generator) -> Float[Tensor, "b 3 f h w"]:
    """What a generator does to a clip without changing what it shows; half of the clips stay plain.

    Blur is a round trip through fewer pixels; tint scales and shifts each channel by up to 6 % of [-1, 1];
    noise has a standard deviation of up to 0.1. The strength of each is drawn anew for each clip.
    """
    some, plain = video.tensor_split(2)
    count, side = some.shape[0], some.shape[-1]
    smaller = int(side * (0.5 + 0.4 * float(torch.rand((), generator=generator))))
    blurred = some.transpose(1, 2).flatten(0, 1)
    blurred = functional.interpolate(blurred, size=(smaller, smaller), mode="area")
    blurred = functional.interpolate(blurred, size=(side, side), mode="bilinear", align_corners=False)
    blurred = blurred.unflatten(0, (count, some.shape[2])).transpose(1, 2)
    blur, tint, noise = torch.rand(3, count, 1, 1, 1, 1, generator=generator)
    gain, shift = 0.06 * tint * (2 * torch.rand(2, count, 3, 1, 1, 1, generator=generator) - 1)
    some = (some + blur * (blurred - some)) * (1 + gain) + shift
    some = some + 0.1 * noise * torch.randn(some.shape, generator=generator)
    return torch.cat((some, plain))


@torch.no_grad()
def _reconstruct(
    tae: TAE | None, clips: UInt8[Tensor, "b f h w 3"], count: int
) -> UInt8[Tensor, "b f h w 3"]:
    """The last `count` clips as the autoencoder gives them back."""
    if tae is None or count == 0:
        return clips
    video = clips[-count:].permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    decoded = tae.decode(tae.encode(video).mean, frames=clips.shape[1])
    decoded = ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)
    return torch.cat((clips[:-count], decoded))


def accuracy(judge: Judge, *, scenes: int, bucket: Bucket, split: Split) -> dict[str, float]:
    """Share of clean renders of unseen scenes on which each question is answered right; word: of signs."""
    right = {key: 0 for key in (*ATTRIBUTES, "word")}
    signs = 0
    for start in range(0, scenes, 64):
        seeds = range(_VALIDATION_SEED + start, _VALIDATION_SEED + min(start + 64, scenes))
        truths = [sample_scene(seed, split=split) for seed in seeds]
        size = {"frames": bucket.frames, "height": bucket.height, "width": bucket.width}
        said = judge.judge([render(scene, fps=bucket.fps, **size) for scene in truths]).labels
        for label, truth in zip(said, map(labels, truths), strict=True):
            signs += bool(truth["word"])
            right["word"] += bool(truth["word"]) and label["word"] == truth["word"]
            for key in ATTRIBUTES:
                right[key] += label[key] == truth[key]
    shares = {key: right[key] / scenes for key in ATTRIBUTES}
    return shares | {"word": right["word"] / max(signs, 1), "scenes": scenes, "signs": signs}
