"""What a clip says of itself: all that makes it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from kinoflow.sample import settings
from kinoflow.sample.output import installed
from kinoflow.sample.plan import Plan
from kinoflow.sample.release import Release


def metadata(
    plan: Plan,
    release: Release,
    lora: Sequence[str],
    upsampler: Release | None,
    computed: Mapping[str, Any],
) -> dict[str, str]:
    """All that decides the frames on a machine of one kind; `computed` is where and in what they were."""
    values = {
        "label" if release.config.classes else "prompt": plan.prompt or None,
        "negative": plan.negative,
        "seed": plan.seed,
        **_chosen(plan, release),
        **settings.described(plan.sampling),
        **({} if plan.source is None else plan.source.given.described),
        "seconds": float(plan.added / plan.bucket.fps) if plan.added else None,
        "clip": plan.bucket,
        "release": release.name,
        "weights": release.weights_hash,
        "lora": shlex.join(lora) or None,
        "text_dtype": None if release.config.classes else release.config.text.dtype,
        **_larger(plan, upsampler),
        **computed,
        "kinoflow": installed("kinoflow"),
        "torch": installed("torch"),
    }
    return {key: str(value) for key, value in values.items() if value is not None}


def _chosen(plan: Plan, release: Release) -> dict[str, Any]:
    """Of how many clips it is the best, and what said so."""
    if plan.best_of == 1:
        return {}
    return {"best_of": plan.best_of, "verifier": release.verifier_hash}


def _larger(plan: Plan, upsampler: Release | None) -> dict[str, Any]:
    """What made the clip larger, and how."""
    if plan.larger is None or upsampler is None:
        return {}
    told = {f"upsampler_{key}": value for key, value in settings.described(plan.larger.sampling).items()}
    return {"upsampler": upsampler.name, "upsampler_weights": upsampler.weights_hash, **told}
