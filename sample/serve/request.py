"""The seam between the server and what makes clips: a request, and a Maker that checks and makes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from kinoflow.data.clips.buckets import Bucket


@dataclass(frozen=True, kw_only=True)
class ClipRequest:
    """One clip that is asked for; None stands for the default, until `Maker.check` has filled it in."""

    prompt: str
    """What it shows."""
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

    def dumps(self) -> str:
        """As JSON, which `loads` reads."""
        return json.dumps(asdict(self) | {"fps": None if self.fps is None else str(self.fps)})

    @classmethod
    def loads(cls, text: str) -> ClipRequest:
        """Read what `dumps` wrote."""
        values = json.loads(text)
        return cls(**values | {"fps": None if values["fps"] is None else Fraction(values["fps"])})


@runtime_checkable
class Maker(Protocol):
    """What makes clips, one at a time; `check` may be called meanwhile, from another thread.

    Attributes:
        name: what clients call the model.
        clips: those that it can make, the default one first.
        defaults: the settings of a request that gives none, for people to see.
    """

    name: str
    clips: tuple[Bucket, ...]
    defaults: ClipRequest

    def check(self, request: ClipRequest) -> ClipRequest:
        """The request with its defaults filled in.

        Raises:
            UserError: what cannot be made, in one line that names the key and the remedy.
        """
        ...

    def make(self, request: ClipRequest, path: Path, progress: Callable[[float], None]) -> dict[str, Any]:
        """Write the clip of a checked request as an mp4, whole or not at all; returns its figures, for JSON.

        `progress` gets the share that is done, 0 .. 1. What it raises ends the work and comes out of here.

        Raises:
            UserError: the clip cannot be made or written here and now.
        """
        ...
