"""Training strict judges on real renders (configs/mini/mini_strict.yaml), by the first judge's loop.

The one that evaluates is strict/ of a release, the one that chooses among clips verifier/.

What is rare in the world, a moving camera, is drawn more often, and some scenes have what the world never
draws: a generator's mistakes are no scenes of the world, and the judge must not take from one attribute what
another has to be.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional

from kinoflow.configs.files import replacing_folder, write_json
from kinoflow.configs.pretrained import load_pretrained, resolve_folder
from kinoflow.data.clips.buckets import Bucket
from kinoflow.data.world import CAMERAS, TEXTURES, WORDS, Scene, caption, sample_scene
from kinoflow.data.world.questions import QUESTIONS, answers, asked, wrong
from kinoflow.sample.evaluation.judge import JudgeConfig, letter_classes
from kinoflow.sample.evaluation.strict import Answers, StrictConfig, StrictJudge
from kinoflow.sample.evaluation.world import renders
from kinoflow.tae.model.tae import TAE
from kinoflow.train.mini.judge import (
    SEEDS_APART,
    VALIDATION_SEED,
    degrade,
    fit,
    opened,
    passed,
    reconstruct,
)
from kinoflow.train.run.config import RunConfig
from kinoflow.train.tasks.clips import read_buckets

_NUM_VALIDATION = 1024
# Of eight scenes one has a moving camera (in the world one in thirty), and two at least a second thing.
_KINDS = ("camera", "pair", "any", "sign", "pair", "any", "any", "any")
_SEEDS_OF_A_STEP = 2000
# The autoencoder takes longer than the judge: in every fourth batch a quarter of the clips passes through it.
_STEPS_A_PASS = 4
_SETTLING_SEED = 50_000_000
_NUM_SETTLING = 16


@dataclass(frozen=True, kw_only=True)
class Truth:
    """How long clips last, and the class of each question."""

    seconds: Float[Tensor, " b"]
    classes: Mapping[str, Int[Tensor, " b"]]
    letters: Int[Tensor, "b letters"]


def main(config: RunConfig) -> int:
    """Train a strict judge, write it into the release and its accuracy into the run, under one name; 0.

    The name is `config.model`, strict or verifier. It starts from what `init_from` has of that name, where
    that has none from the levels of its judge. The rest is as in the judge's training.

    Raises:
        UserError: no release or no buckets.
    """
    folder, release, buckets, tae = opened(config)
    judge = _start(config)
    started = time.perf_counter()

    def loss_of(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        video, truth = _batch(judge, tae if step % _STEPS_A_PASS == 0 else None, config, step)
        return strict_loss(judge(video, truth.seconds), truth)

    fit(judge, config, folder, loss_of)
    settle(judge, buckets[0])
    with replacing_folder(release / config.model) as aside:
        judge.save_pretrained(aside)
    saved = StrictJudge.from_pretrained(release / config.model)
    figures: dict[str, Any] = {"steps": config.steps, "seconds": round(time.perf_counter() - started)}
    figures["real"] = accuracy(saved, scenes=_NUM_VALIDATION, bucket=buckets[0])
    if tae is not None:
        figures["reconstructed"] = accuracy(saved, scenes=_NUM_VALIDATION // 8, bucket=buckets[0], tae=tae)
    write_json(folder / f"{config.model}.json", figures)
    print(json.dumps(figures))
    return 0


def _start(config: RunConfig) -> StrictJudge:
    judge = StrictJudge(StrictConfig())
    judge.init_weights()
    if config.init_from is None:
        return judge
    folder = resolve_folder(config.init_from, [f"{config.model}/*", "judge/*"])
    if (folder / config.model).is_dir():
        return StrictJudge.from_pretrained(folder / config.model)
    _, known = load_pretrained(folder / "judge", JudgeConfig)
    own = judge.state_dict()
    taken = {
        name: known[name].float() for name in known if name in own and own[name].shape == known.shape(name)
    }
    judge.load_state_dict(own | taken)
    return judge


def _batch(
    judge: StrictJudge, tae: TAE | None, config: RunConfig, step: int
) -> tuple[Float[Tensor, "b 3 f h w"], Truth]:
    """What the judge sees at this step, and the answers: from (seed, step) alone.

    The clips of a batch are of several buckets: what is normalized over one length is off for others.
    """
    first = config.seed * SEEDS_APART + step * _SEEDS_OF_A_STEP
    generator, buckets = torch.Generator().manual_seed(first), read_buckets(config.data)
    drawn, size = scenes(first, config.data.batch_size), len(_KINDS)
    videos, truths = [], []
    for start in range(0, len(drawn), size):
        bucket = buckets[(step + start // size) % len(buckets)]
        clips, truth = draw(drawn[start : start + size], bucket, judge.config)
        if tae is not None and start + size >= len(drawn):
            clips = passed(tae, clips, config, generator)
        videos.append(judge.prepare(clips))
        truths.append(truth)
    return degrade(torch.cat(videos), generator), joined(truths)


def scenes(first: int, count: int) -> list[Scene]:
    """`count` scenes of train's seeds from `first` on, with every kind among each eight."""
    found: list[Scene] = []
    seeds = iter(range(first, first + _SEEDS_OF_A_STEP))
    for index in range(count):
        kind = _KINDS[index % len(_KINDS)]
        found.append(next(scene for scene in _stirred(seeds) if kind in ("any", _kind(scene))))
    return found


def _stirred(seeds: Iterator[int]) -> Iterator[Scene]:
    return (stirred(sample_scene(seed), seed) for seed in seeds)


def _kind(scene: Scene) -> str:
    if scene.camera != "still":
        return "camera"
    return "pair" if len(scene.things) > 1 else "sign" if scene.word else "alone"


def stirred(scene: Scene, seed: int) -> Scene:
    """The scene, or one that the world doesn't draw: a textured second thing, its sign, a filmed motion."""
    random = Random(f"strict/{seed}")
    first, *others = scene.things
    if others:
        (second,) = others
        if random.random() < 0.3:
            second = replace(second, texture=random.choice(TEXTURES[1:]))
        scene = replace(scene, things=(first, second))
        if scene.relation == "next to" and random.random() < 0.25:
            return replace(scene, word=random.choice(WORDS), word_place=random.choice(("top", "bottom")))
        return scene
    filmed = first.motion in ("spins", "bounces", "stays still")
    if filmed and scene.word is None and " " in scene.background and random.random() < 0.15:
        return replace(scene, camera=random.choice(CAMERAS[1:]))
    return scene


def draw(
    scenes: Sequence[Scene], bucket: Bucket, config: StrictConfig
) -> tuple[UInt8[Tensor, "b f h w 3"], Truth]:
    """Render scenes and look up their classes."""
    named = [answers(scene) for scene in scenes]
    truth = Truth(
        seconds=torch.full((len(scenes),), float((bucket.frames - 1) / bucket.fps)),
        classes={
            key: torch.tensor([names.index(label[key]) for label in named])
            for key, names in config.questions.items()
        },
        letters=torch.tensor([letter_classes(label["word"], config.letters) for label in named]),
    )
    return torch.from_numpy(np.stack(renders(scenes, bucket))), truth


def joined(truths: Sequence[Truth]) -> Truth:
    """One after the other."""
    return Truth(
        seconds=torch.cat([truth.seconds for truth in truths]),
        classes={key: torch.cat([truth.classes[key] for truth in truths]) for key in truths[0].classes},
        letters=torch.cat([truth.letters for truth in truths]),
    )


@torch.no_grad()
def settle(judge: StrictJudge, bucket: Bucket) -> None:
    """Measure the means and variances of its layers anew, on plain renders of the bucket.

    Those that training leaves behind are of degraded clips of all lengths as well, and with them it takes
    slow things for faster ones (arXiv:2105.07576, section 3).
    """
    judge.train()
    norms = [part for part in judge.modules() if isinstance(part, nn.BatchNorm2d | nn.BatchNorm3d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
    for index in range(_NUM_SETTLING):
        clips, truth = draw(scenes(_SETTLING_SEED + index * _SEEDS_OF_A_STEP, 32), bucket, judge.config)
        judge(judge.prepare(clips), truth.seconds)
    judge.eval()


def strict_loss(seen: Answers, truth: Truth) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The sum of the cross entropies of the questions, in nats, and each of them."""
    parts = {key: functional.cross_entropy(seen.classes[key], truth.classes[key]) for key in seen.classes}
    parts["letters"] = functional.cross_entropy(seen.letters.flatten(0, 1), truth.letters.flatten())
    return sum(parts.values(), torch.zeros(())), parts


def accuracy(judge: StrictJudge, *, scenes: int, bucket: Bucket, tae: TAE | None = None) -> dict[str, float]:
    """Share of held-out renders on which each question is answered right, and that are wholly right.

    The scenes are none of those on which releases are evaluated, each with its own complete caption. `tae`
    passes the renders through it first. What a second thing or a sign is, is of the scenes that have one, and
    camera of those where it moves; that there is none where there is none is part of the whole.
    """
    right, counts = dict.fromkeys((*QUESTIONS, "word", "wholly"), 0), dict.fromkeys((*QUESTIONS, "word"), 0)
    for start in range(0, scenes, 32):
        seeds = range(VALIDATION_SEED + start, VALIDATION_SEED + min(start + 32, scenes))
        drawn = [sample_scene(seed, split="heldout") for seed in seeds]
        clips = renders(drawn, bucket)
        if tae is not None:
            clips = list(reconstruct(tae, torch.from_numpy(np.stack(clips))).numpy())
        for seed, scene, label in zip(seeds, drawn, judge.judge(clips, bucket.fps), strict=True):
            truth = answers(scene)
            right["wholly"] += not wrong(asked(caption(scene, seed, complete=True)), label)
            for key in counts:
                there = key in ("speed", "pattern") or truth[key] not in ("", "still")
                counts[key] += there
                right[key] += there and label[key] == truth[key]
    shares = {key: right[key] / max(counts[key], 1) for key in counts}
    return shares | {"wholly": right["wholly"] / scenes, "scenes": scenes}
