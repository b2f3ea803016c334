"""Plans of larger clips: of a clip that is given to an upsampler, or of one that is still to be made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from kinoflow.configs.errors import UserError
from kinoflow.configs.pretrained import resolve_folder
from kinoflow.data.clips.buckets import Bucket
from kinoflow.data.video import probe, read
from kinoflow.sample import settings
from kinoflow.sample.generate import check_negative, check_seed
from kinoflow.sample.given import Given, Source
from kinoflow.sample.known import Windows
from kinoflow.sample.plan import Plan
from kinoflow.sample.release import DEFAULT_RELEASE, UPSAMPLER, Release
from kinoflow.sample.request import ClipRequest

_STILL = Fraction(16)  # frames a second of a picture, as buckets have it


def upsampled(release: Release, request: ClipRequest) -> Plan:
    """What an upsampler makes of the clip or picture `request.upsample`; its prompt may be empty.

    Raises:
        UserError: no such clip, one whose size does not fit, or settings that an upsampler has none of.
    """
    if request.upsample is None:
        remedy = "give it a clip (kinoflow sample upsample), or name it in --upsample beside what makes one"
        raise UserError(f"weights: {release.name} is an upsampler and makes clips larger; {remedy}")
    Given(**{key: getattr(request, key) for key in ("image", "extend", "edit", "mask", "last", "upsample")})
    if request.seconds is not None:
        raise UserError("seconds: how much extend adds; an upsampler adds none, leave it out")
    if request.best_of not in (None, 1):
        raise UserError("best_of: an upsampler makes a clip once; leave it out")
    path = Path(request.upsample)
    return of_frames(release, request, read(path), probe(path).fps, path.name)


def of_frames(
    release: Release,
    request: ClipRequest,
    small: UInt8[np.ndarray, "frames _ _ 3"],
    fps: Fraction,
    name: str,
) -> Plan:
    """What an upsampler makes of frames, which messages call `name`.

    Raises:
        UserError: their size does not fit, or settings that an upsampler has none of.
    """
    count, height, width, _ = small.shape
    rate = _STILL if count == 1 else fps
    bucket, windows = _fitted(release, name, Bucket(frames=count, height=height, width=width, fps=rate))
    for key in ("frames", "height", "width", "fps"):
        if getattr(request, key) not in (None, getattr(bucket, key)):
            made = f"{bucket.frames} frames of {bucket.width}x{bucket.height} at {bucket.fps} fps"
            raise UserError(f"{key}: an upsampler makes of {name} {made}; leave it out")
    sampling = settings.chosen(release.config.sampling, request)
    check_negative(request.negative, sampling.guidance_scale)
    check_seed(request.seed)
    source = Source(given=Given(upsample=request.upsample), bucket=bucket, clip=small)
    return Plan(
        prompt=request.prompt, negative=request.negative, seed=request.seed, bucket=bucket, sampling=sampling,
        windows=windows, source=source, stills=True,
    )  # fmt: skip


def enlarged(release: Release, plan: Plan) -> Plan:
    """The plan, and what an upsampler then makes of its clip, with the same prompt and seed.

    Raises:
        UserError: clips of that size are none that it takes.
    """
    shape = replace(plan.bucket, frames=plan.frames)
    bucket, windows = _fitted(release, "upsample", shape)
    larger = Plan(
        prompt=plan.prompt, negative=None, seed=plan.seed, bucket=bucket, sampling=release.config.sampling,
        windows=windows, stills=True,
    )  # fmt: skip
    return replace(plan, larger=larger)


def with_clip(plan: Plan, small: UInt8[np.ndarray, "frames _ _ 3"]) -> Plan:
    """The upsampler's part of a plan, of the clip that was made."""
    assert plan.larger is not None
    return replace(plan.larger, source=Source(given=Given(), bucket=plan.larger.bucket, clip=small))


def own_upsampler(named: str | Path | None, release: Path) -> str | Path | None:
    """Where the upsampler of this name is: a folder or hub id, or `upsampler`, which lies in a release.

    Raises:
        UserError: the release has none.
    """
    if named is None or str(named) != UPSAMPLER or Path(named).is_dir():
        return named
    if not (release / UPSAMPLER).is_dir():
        raise UserError(f"upsample: {release} has no upsampler of its own; name one, a release or a hub id")
    return release / UPSAMPLER


def upsampler_of(source: str | Path | None) -> str | Path:
    """The upsampler that a release has, of the shipped one where none is named; else `source` itself.

    Raises:
        UserError: no such release.
    """
    folder = resolve_folder(DEFAULT_RELEASE if source is None else source)
    return folder / UPSAMPLER if (folder / UPSAMPLER).is_dir() else folder


def require_upsampler(release: Release) -> None:
    """Refuse a release that makes clips of prompts where an upsampler is wanted.

    Raises:
        UserError: it is one.
    """
    if not release.config.upsample.factor:
        raise UserError(
            f"upsample: {release.name} makes clips of prompts, and has no upsampler; name one, "
            "of configs/mini/mini_upsampler.yaml for example"
        )


def _fitted(release: Release, name: str, small: Bucket) -> tuple[Bucket, Windows | None]:
    """The larger clip, and its windows where it is longer than one."""
    require_upsampler(release)
    card = release.config.upsample
    height, width = small.height * card.factor, small.width * card.factor
    lengths = [each.frames for each in release.buckets if (each.height, each.width) == (height, width)]
    if not lengths:
        sizes = ", ".join(dict.fromkeys(_sizes(release)))
        raise UserError(f"{name}: {small.width}x{small.height} pixels, and {release.name} takes {sizes}; "
                        "bring it to one of them first")  # fmt: skip
    bucket = replace(small, height=height, width=width)
    if small.frames <= max(lengths):
        return bucket, None
    return bucket, Windows(length=max(lengths), overlap=min(card.overlap, max(lengths) - 1))


def _sizes(release: Release) -> Iterator[str]:
    factor = release.config.upsample.factor
    return (f"{each.width // factor}x{each.height // factor}" for each in release.buckets)
