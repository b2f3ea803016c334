"""The settings of a sampling as a clip's metadata has them, and read back from there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kinoflow.sample.generate import Sampling
from kinoflow.sample.options import parse_interval
from kinoflow.sample.request import ClipRequest


def chosen(defaults: Sampling, request: ClipRequest) -> Sampling:
    """The defaults, with what a request gives in their place.

    Raises:
        UserError: a value outside its range.
    """
    guidance = {
        "kind": request.guidance_kind,
        "interval": request.guidance_interval,
        "rescale": request.guidance_rescale,
    }
    given = {
        "num_steps": request.steps,
        "guidance_scale": request.guidance,
        "guidance": replace(defaults.guidance, **_there(guidance)),
        "cache": request.cache,
        "solver": request.solver,
        "diffusion": request.diffusion,
    }
    return replace(defaults, **_there(given))


def filled(request: ClipRequest, sampling: Sampling) -> ClipRequest:
    """The request with all that `chosen` found."""
    guidance = sampling.guidance
    return replace(
        request, steps=sampling.num_steps, guidance=sampling.guidance_scale, guidance_kind=guidance.kind,
        guidance_interval=guidance.interval, guidance_rescale=guidance.rescale, cache=sampling.cache,
    )  # fmt: skip


def described(sampling: Sampling) -> dict[str, Any]:
    """All of it that decides the frames, by the names that metadata has; None where it has no effect."""
    sde, score = sampling.solver == "sde", sampling.objective == "score"
    guidance, guided = sampling.guidance, sampling.is_guided
    apg, interval = guided and guidance.kind == "apg", guidance.interval
    return {
        "steps": sampling.num_steps,
        "guidance": sampling.guidance_scale,
        "guidance_kind": guidance.kind if guided and guidance.kind != "cfg" else None,
        "guidance_interval": interval_text(interval) if guided and interval != (0, 1) else None,
        "guidance_rescale": guidance.rescale if guided and guidance.rescale else None,
        "guidance_zero_steps": sampling.zero_steps or None,
        "guidance_momentum": guidance.momentum if apg else None,
        "guidance_threshold": guidance.threshold if apg else None,
        "guidance_parallel": guidance.parallel if apg else None,
        "cache": sampling.cache or None,
        "schedule": sampling.schedule,
        "shift": sampling.shift if sampling.is_shifted else None,
        "solver": sampling.solver,
        "diffusion": sampling.diffusion if sde else None,
        "path": sampling.path if sde or score or apg else None,
        "objective": sampling.objective if score else None,
    }


def asked(written: Mapping[str, str]) -> dict[str, Any]:
    """Settings of a ClipRequest that asks for what metadata describe; nothing in it is left to the release.

    Raises:
        KeyError: a setting is missing.
        ValueError: a setting that cannot be read.
    """
    return {
        "steps": int(written["steps"]),
        "guidance": float(written["guidance"]),
        "guidance_kind": written.get("guidance_kind", "cfg"),
        "guidance_interval": parse_interval(written.get("guidance_interval", "0:1")),
        "guidance_rescale": float(written.get("guidance_rescale", 0)),
        "cache": float(written.get("cache", 0)),
        "solver": written["solver"],
        "diffusion": float(written["diffusion"]) if "diffusion" in written else None,
    }


def interval_text(interval: tuple[float, float]) -> str:
    """As `parse_interval` reads it."""
    return ":".join(map(str, interval))


def _there(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
