"""Clips of an evaluation with what they took, kept in a folder so that none is made twice."""

import hashlib
import json
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from kinoflow.configs.errors import UserError, os_error_line
from kinoflow.configs.files import replacing
from kinoflow.sample.pipeline import Pipeline
from kinoflow.sample.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Made:
    """A clip, the seconds and the passes through the backbone that it took, and the passes it did not."""

    frames: UInt8[np.ndarray, "frames height width 3"]
    seconds: float
    passes: int
    reused: int


def make(pipeline: Pipeline, plan: Plan, folder: Path | None) -> Made:
    """The clip of a plan; read from the folder where it was made before with the same settings and weights.

    Raises:
        UserError: the folder cannot be written.
    """
    if folder is None:
        return _made(pipeline, plan)
    told = json.dumps(pipeline.metadata(plan), sort_keys=True)
    path = folder / f"{hashlib.sha256(told.encode()).hexdigest()[:24]}.npz"
    found = _read(path)
    if found is not None:
        return found
    made = _made(pipeline, plan)
    try:
        with replacing(path) as aside:
            np.savez_compressed(aside, **vars(made), settings=told)
    except OSError as error:
        raise UserError(os_error_line(path, error)) from None
    return made


def _made(pipeline: Pipeline, plan: Plan) -> Made:
    pipeline.load()
    started = time.perf_counter()
    video = pipeline.make(plan)
    seconds, passes = time.perf_counter() - started, video.passes
    return Made(frames=video.frames, seconds=seconds, passes=passes.computed, reused=passes.reused)


def _read(path: Path) -> Made | None:
    try:
        with path.open("rb") as file, np.load(file) as values:
            seconds, passes, reused = (values[key].item() for key in ("seconds", "passes", "reused"))
            return Made(frames=values["frames"], seconds=seconds, passes=passes, reused=reused)
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None  # not there, or damaged: it is made again
