"""The seam between the server and what makes clips: a Maker checks a request and makes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from kinoflow.data.clips.buckets import Bucket
from kinoflow.sample.request import ClipRequest


@runtime_checkable
class Maker(Protocol):
    """What makes clips, up to `at_once` at a time, each in a thread; `check` may be called meanwhile.

    Attributes:
        name: what clients call the model.
        clips: those that it can make, the default one first.
        at_once: the most calls of `make` at a time.
        defaults: the settings of a request that gives none, for people to see.
        rewrites: whether a request may have its prompt reworded.
        takes_pictures: whether a clip may begin and end with pictures.
    """

    name: str
    clips: tuple[Bucket, ...]
    at_once: int
    defaults: ClipRequest
    rewrites: bool
    takes_pictures: bool

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
