"""Training the judge on real renders of the world (configs/mini/mini_judge.yaml).

A short run on one core, so a plain loop: no shards, no resume; started again, it starts again.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional

from kinoflow.configs.errors import UserError
from kinoflow.configs.files import replacing_folder, write_json
from kinoflow.configs.pretrained import part_folder
from kinoflow.configs.schema import dump
from kinoflow.data.clips.buckets import Bucket
from kinoflow.data.world import Split, labels, sample_scene
from kinoflow.sample.evaluation.judge import ATTRIBUTES, Judge, JudgeConfig, Verdict, letter_classes
from kinoflow.sample.evaluation.world import renders
from kinoflow.sample.generate import decode_latent
from kinoflow.tae.cpu.accelerate import accelerate
from kinoflow.tae.model.pixels import from_bytes
from kinoflow.tae.model.tae import TAE
from kinoflow.train.run.config import RunConfig
from kinoflow.train.run.log import print_line, training_bar
from kinoflow.train.run.optimizer import adamw, learning_rate
from kinoflow.train.tasks.clips import read_buckets

# Kept away from the first held-out scenes, on which releases are evaluated.
VALIDATION_SEED = 1_000_000
_NUM_VALIDATION = 1024
# Between the scenes of runs with different seeds.
SEEDS_APART = 100_000_000


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
    autoencoder, one clip in four passes through it, so that its traces are not held against a clip; it, not
    the judge, computes in `deepspeed.precision`.

    Raises:
        UserError: no release or no buckets.
    """
    folder, release, buckets, tae = opened(config)
    judge = _start(config)
    started = time.perf_counter()

    def loss_of(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        video, batch = _batch(judge, tae, config, step)
        return judge_loss(judge(video), batch)

    fit(judge, config, folder, loss_of)
    with replacing_folder(release / "judge") as aside:
        judge.save_pretrained(aside)
    saved = Judge.from_pretrained(release / "judge")
    figures: dict[str, Any] = {"steps": config.steps, "seconds": round(time.perf_counter() - started)}
    figures["real"] = accuracy(saved, scenes=_NUM_VALIDATION, bucket=buckets[0])
    if tae is not None:
        figures["reconstructed"] = accuracy(saved, scenes=_NUM_VALIDATION, bucket=buckets[0], tae=tae)
    write_json(folder / "judge.json", figures)
    print(json.dumps(figures))
    return 0


def opened(config: RunConfig) -> tuple[Path, Path, tuple[Bucket, ...], TAE | None]:
    """The run's folder, the release's, the clips that are drawn, and the autoencoder where there is one.

    Raises:
        UserError: no release or no buckets.
    """
    if config.release is None:
        raise UserError("release: name the release folder that the judge is for, such as sample/mini")
    if config.threads:
        torch.set_num_threads(config.threads)
    folder, release, buckets = Path(config.run), Path(config.release), read_buckets(config.data)
    tae_folder = release / "tae"
    tae = accelerate(TAE.from_pretrained(tae_folder)) if (tae_folder / "config.json").exists() else None
    torch.manual_seed(config.seed)
    folder.mkdir(parents=True, exist_ok=True)
    dump(config, folder / "config.yaml")
    return folder, release, buckets, tae


def _start(config: RunConfig) -> Judge:
    if config.init_from is not None:
        return Judge.from_pretrained(part_folder(config.init_from, "judge"))
    judge = Judge(JudgeConfig())
    judge.init_weights()
    return judge


def fit(
    judge: nn.Module,
    config: RunConfig,
    folder: Path,
    loss_of: Callable[[int], tuple[Float[Tensor, ""], dict[str, Tensor]]],
) -> None:
    """Train by the loss of each step and its parts, which are logged into `folder`/log.jsonl."""
    optimizer = adamw(judge, config.optimizer)
    sums: dict[str, float] = {}
    judge.train()
    began = time.perf_counter()
    with (folder / "log.jsonl").open("w", encoding="utf-8") as log, training_bar() as bar:
        task = bar.add_task("judge", total=config.steps, figures="")
        for step in range(config.steps):
            loss, parts = loss_of(step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(judge.parameters(), config.optimizer.grad_clip or math.inf)
            lr = learning_rate(config.optimizer, step, config.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            bar.advance(task)
            sums = {key: sums.get(key, 0.0) + value.item() for key, value in parts.items()}
            if (step + 1) % config.log_every == 0:
                means = {key: value / config.log_every for key, value in sums.items()}
                log.write(json.dumps({"step": step + 1} | means) + "\n")
                log.flush()
                sums = {}
                if bar.disable:
                    rate = (step + 1) / (time.perf_counter() - began)
                    print_line(
                        step + 1, config.steps, loss=sum(means.values()), lr=lr,
                        rate=rate * config.data.batch_size, left=(config.steps - step - 1) / rate,
                    )  # fmt: skip


def _batch(judge: Judge, tae: TAE | None, config: RunConfig, step: int) -> tuple[Tensor, Batch]:
    """What the judge sees at this step, and the answers: from (seed, step) alone."""
    size, buckets = config.data.batch_size, read_buckets(config.data)
    first = config.seed * SEEDS_APART + step * size
    batch = draw(range(first, first + size), buckets[step % len(buckets)], judge.config, split="train")
    generator = torch.Generator().manual_seed(first)
    clips = batch.clips
    if tae is not None and size >= 4:
        rest, some = clips.tensor_split([size - size // 4])
        clips = torch.cat((rest, passed(tae, some, config, generator)))
    return degrade(judge.prepare(clips), generator), batch


def passed(
    tae: TAE, clips: UInt8[Tensor, "b f h w 3"], config: RunConfig, generator: torch.Generator
) -> UInt8[Tensor, "b f h w 3"]:
    """Clips as the autoencoder, in the run's precision, gives them back."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.deepspeed.precision == "bf16"):
        return reconstruct(tae, clips, generator)


def draw(seeds: Sequence[int], bucket: Bucket, config: JudgeConfig, *, split: Split) -> Batch:
    """Render the scenes of these seeds and look up their classes."""
    scenes = [sample_scene(seed, split=split) for seed in seeds]
    named = [labels(scene) for scene in scenes]
    return Batch(
        clips=torch.from_numpy(np.stack(renders(scenes, bucket))),
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
def reconstruct(
    tae: TAE, clips: UInt8[Tensor, "b f h w 3"], generator: torch.Generator | None = None
) -> UInt8[Tensor, "b f h w 3"]:
    """Clips as the autoencoder gives them back.

    With a generator, latents are off by noise of up to 0.3 of their deviation, as a sampled latent may be.
    """
    latent = tae.normalize(tae.encode(from_bytes(clips)).mean)
    if generator is not None:
        strength = 0.3 * torch.rand(len(latent), 1, 1, 1, 1, generator=generator)
        latent = latent + strength * torch.randn(latent.shape, generator=generator)
    return decode_latent(tae, latent, frames=clips.shape[1])


def accuracy(judge: Judge, *, scenes: int, bucket: Bucket, tae: TAE | None = None) -> dict[str, float]:
    """Share of held-out renders on which each question is answered right; word: of those with a sign.

    The scenes are none of those on which releases are evaluated. `tae` passes the renders through it first.
    """
    right, signs = dict.fromkeys((*ATTRIBUTES, "word"), 0), 0
    for start in range(0, scenes, 32):
        seeds = range(VALIDATION_SEED + start, VALIDATION_SEED + min(start + 32, scenes))
        truths = [sample_scene(seed, split="heldout") for seed in seeds]
        clips = renders(truths, bucket)
        if tae is not None:
            clips = list(reconstruct(tae, torch.from_numpy(np.stack(clips))).numpy())
        for label, truth in zip(judge.judge(clips).labels, map(labels, truths), strict=True):
            signs += bool(truth["word"])
            for key in right:
                right[key] += bool(truth[key]) and label[key] == truth[key]
    shares = {key: right[key] / scenes for key in ATTRIBUTES}
    return shares | {"word": right["word"] / max(signs, 1), "scenes": scenes, "signs": signs}
