"""Does a release make what prompts ask for? A judge answers on held-out scenes, beside its own accuracy.

The scenes hold combinations of colour, shape and motion that no training clip shows. Their captions name all
three. The judge sees the generated clips and real renders of the same scenes. Captions of pictures name no
motion; the judge, which knows clips, sees a picture for as long as the release's clips last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from kinoflow.configs.errors import UserError
from kinoflow.data.clips.buckets import Bucket
from kinoflow.data.world import Scene, caption, labels, render, sample_scene
from kinoflow.sample.evaluation.judge import ATTRIBUTES, Judge, Judgement
from kinoflow.sample.evaluation.kept import make
from kinoflow.sample.evaluation.statistics import Share, frechet_distance
from kinoflow.sample.evaluation.strict import StrictJudge
from kinoflow.sample.evaluation.whole import Whole, measure_whole
from kinoflow.sample.pipeline import Pipeline
from kinoflow.sample.request import ClipRequest
from kinoflow.tae.codec.metrics import psnr
from kinoflow.tae.model.pixels import from_bytes, to_bytes
from kinoflow.tae.model.tae import TAE

Clip = UInt8[np.ndarray, "frames height width 3"]
_SHEET_CLIPS = 12
_SHEET_FRAMES = 8


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How well generated clips show what their prompts say.

    `joint` asks for colour, shape and motion at once; pictures have no motion (None). `word` asks only of
    prompts with a written word (None when there is none). `frechet` is the distance of generated from real
    clips in the judge's features, `frechet_real` that of other real clips: the least one can expect at this
    number of clips. `classes` is `joint` of the prompts of each colour, shape and motion apart: a release may
    be weak where few ask. `autoencoder_psnr` is the mean PSNR in dB of the real clips after the release's
    autoencoder: no generated clip can be sharper. `strict` is what the strict judge says of everything that
    the prompts name (None where the release has none).
    """

    prompts: int
    color: Share
    shape: Share
    motion: Share | None
    joint: Share
    word: Share | None
    classes: dict[str, dict[str, Share]]
    frechet: float
    frechet_real: float
    autoencoder_psnr: float | None = None
    strict: Whole | None = None


def measure(
    judge: Judge,
    scenes: Sequence[Scene],
    generated: Sequence[Clip],
    real: Sequence[Clip],
    other: Sequence[Clip],
    *,
    still: bool = False,
) -> Evaluation:
    """Judge `generated` and `real` clips of `scenes`; `other` are real clips of other scenes.

    Of clips that stand `still`, as pictures do, nobody asks how they move.
    """
    if not len(scenes) == len(generated) == len(real) >= 2 or len(other) < 2:
        raise UserError(f"prompts: {len(scenes)}; an evaluation needs at least 2, each with its clips")
    truth = [labels(scene) for scene in scenes]
    seen, known, apart = judge.judge(generated), judge.judge(real), judge.judge(other)
    asked = [key for key in ATTRIBUTES if not (still and key == "motion")]
    shares: dict[str, Any] = dict.fromkeys(ATTRIBUTES) | {k: _share([k], truth, seen, known) for k in asked}
    return Evaluation(
        prompts=len(scenes),
        **shares,
        joint=_share(asked, truth, seen, known),
        word=_share(["word"], truth, seen, known) if any(label["word"] for label in truth) else None,
        classes={key: _of_each(key, asked, truth, seen, known) for key in asked},
        frechet=frechet_distance(seen.features, known.features),
        frechet_real=frechet_distance(apart.features, known.features),
    )


def _of_each(
    key: str, asked: Sequence[str], truth: Sequence[dict[str, str]], seen: Judgement, known: Judgement
) -> dict[str, Share]:
    """The share of the prompts of each class of `key`, in the order of their names."""
    names = sorted({label[key] for label in truth})
    return {name: _share(asked, truth, seen, known, where={key: name}) for name in names}


def _share(
    keys: Sequence[str],
    truth: Sequence[dict[str, str]],
    seen: Judgement,
    known: Judgement,
    where: Mapping[str, str] = MappingProxyType({}),
) -> Share:
    """How many have all `keys` right, of those that name them and are what `where` says."""
    asked = [
        i
        for i, label in enumerate(truth)
        if all(label[key] for key in keys) and where.items() <= label.items()
    ]

    def right(judgement: Judgement) -> int:
        return sum(all(judgement.labels[i][key] == truth[i][key] for key in keys) for i in asked)

    return Share.of(right(seen), len(asked), real=right(known))


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a clip took, on average."""

    seconds: float
    """Text, flow and decoder, one clip at a time, without loading."""
    passes: float
    """Through the backbone; a guided velocity takes two."""
    reused: float
    """Passes that the cache saved."""


class HeldOut:
    """Some held-out scenes, and what is the same for all settings of one release.

    Args:
        first: number of the first scene; the others follow.
        kept: a folder in which clips stay: those that are there already are not made again.
        frames: of each clip (default: the release's); 1 makes pictures.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        prompts: int,
        *,
        first: int = 0,
        kept: Path | None = None,
        frames: int | None = None,
    ) -> None:
        if prompts < 2:
            raise UserError(f"prompts: {prompts}; an evaluation needs at least 2")
        if first < 0:
            raise UserError(f"first: {first} is below 0; 0 is the first scene")
        self._pipeline, self._first, self._kept = pipeline, first, kept
        self.bucket = pipeline.release.bucket(frames=frames)
        folder = pipeline.release.folder
        self._judge = Judge.from_pretrained(folder / "judge")
        strict = folder / "strict"
        self._strict = StrictJudge.from_pretrained(strict) if strict.is_dir() else None
        self.scenes = _scenes(first, prompts)
        self._still = self.bucket.frames == 1
        words = {"complete": True, "image": self._still}
        self.texts = [caption(scene, index, **words) for index, scene in enumerate(self.scenes, first)]

    @cached_property
    def _real(self) -> list[Clip]:
        return renders(self.scenes, self.bucket)

    @cached_property
    def _other(self) -> list[Clip]:
        return renders(_scenes(self._first + len(self.scenes), len(self.scenes)), self.bucket)

    def _shown(self, clips: Sequence[Clip]) -> list[UInt8[np.ndarray, "shown height width 3"]]:
        """As the judges see them: a picture as often as the release's clips have frames."""
        times = self._pipeline.release.bucket().frames if self._still else 1
        return [np.repeat(clip, times, axis=0) for clip in clips]

    @cached_property
    def _psnr(self) -> float | None:
        tae = self._pipeline.decoder
        return reconstruction_psnr(tae, self._real) if isinstance(tae, TAE) else None

    def evaluate(
        self,
        common: ClipRequest,
        *,
        sheet: Path | None = None,
        progress: Callable[[], None] | None = None,
    ) -> tuple[Evaluation, Costs]:
        """Make a clip of every scene with the settings of a request, and judge them.

        The seed of the first is that of the request, and the others follow. `sheet`: a PNG with the first
        clips, one a row, with what the strict judge misses. `progress` is called after each clip.

        Raises:
            UserError: settings that the release does not have.
        """
        from kinoflow.data.video import contact_sheet

        made = []
        for index, text in enumerate(self.texts):
            seed = common.seed + index
            request = replace(common, prompt=text, seed=seed, frames=self.bucket.frames)
            made.append(make(self._pipeline, self._pipeline.plan(request), self._kept))
            if progress is not None:
                progress()
        clips = [clip.frames for clip in made]
        whole = self._whole(clips)
        if sheet is not None:
            captions = [_captioned(text, whole) for text in self.texts[:_SHEET_CLIPS]]
            contact_sheet(sheet, clips[:_SHEET_CLIPS], columns=_SHEET_FRAMES, captions=captions)
        found = measure(
            self._judge, self.scenes, *map(self._shown, (clips, self._real, self._other)), still=self._still
        )
        costs = Costs(
            seconds=round(fmean(clip.seconds for clip in made), 3),
            passes=fmean(clip.passes for clip in made),
            reused=fmean(clip.reused for clip in made),
        )
        return replace(found, autoencoder_psnr=self._psnr, strict=whole), costs

    def _whole(self, clips: Sequence[Clip]) -> Whole | None:
        if self._strict is None:
            return None
        fps = self._pipeline.release.bucket().fps
        return measure_whole(self._strict, self.texts, self._shown(clips), self._shown(self._real), fps)


def _scenes(first: int, count: int) -> list[Scene]:
    return [sample_scene(index, split="heldout") for index in range(first, first + count)]


def _captioned(text: str, whole: Whole | None) -> str:
    """The prompt, and what the strict judge saw instead."""
    missed = {} if whole is None else {each.prompt: str(each) for each in whole.missed}
    return f"{text} ({missed[text]})" if text in missed else text


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
