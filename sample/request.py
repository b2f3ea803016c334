"""What is asked of a release: one clip, with the settings that are given."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kinoflow.sample.generate import SolverName
    from kinoflow.sample.guidance import GuidanceKind


@dataclass(frozen=True, kw_only=True)
class ClipRequest:
    """One clip that is asked for; None stands for the release's default."""

    prompt: str
    """What it shows; of a release of classes the name or number of one."""
    negative: str | None = None
    """What it is steered away from."""
    seed: int = 0
    """Of the noise that it starts from, 0 .. 2^63 - 1."""
    frames: int | None = None
    """How many."""
    width: int | None = None
    """In pixels."""
    height: int | None = None
    """In pixels."""
    fps: Fraction | None = None
    """Frames per second."""
    steps: int | None = None
    """Intervals of the time grid."""
    guidance: float | None = None
    """Weight of the prompt."""
    guidance_kind: GuidanceKind | None = None
    """Plain, CFG-Zero* or adaptive projected guidance."""
    guidance_interval: tuple[float, float] | None = None
    """Flow times, 0 noise and 1 data, outside of which there is no guidance."""
    guidance_rescale: float | None = None
    """How much of the spread is given back that guidance adds, 0 to 1."""
    cache: float | None = None
    """How far a velocity may be off that is not computed, 0 to 1; 0 computes all."""
    solver: SolverName | None = None
    """How an interval is crossed."""
    diffusion: float | None = None
    """Noise of the solver "sde"."""
    best_of: int | None = None
    """How many clips may be made to keep the one that shows the prompt best."""
    image: str | None = None
    """Picture that the clip begins with."""
    last: str | None = None
    """Picture that it ends with."""
    extend: str | None = None
    """Clip that it goes on from."""
    seconds: float | None = None
    """How much is added to that."""
    edit: str | None = None
    """Clip that is changed."""
    mask: str | None = None
    """Picture, white where that is made anew."""
    upsample: str | None = None
    """Clip that is made larger, by an upsampler."""
    rewrite: bool = False
    """Of a server: whether its language model makes a caption of the prompt first."""

    def dumps(self) -> str:
        """As JSON, which `loads` reads."""
        return json.dumps(asdict(self) | {"fps": None if self.fps is None else str(self.fps)})

    @classmethod
    def loads(cls, text: str) -> ClipRequest:
        """Read what `dumps` wrote."""
        values = json.loads(text)
        fps, interval = values["fps"], values.get("guidance_interval")
        values["fps"] = None if fps is None else Fraction(fps)
        values["guidance_interval"] = None if interval is None else tuple(interval)
        return cls(**values)
