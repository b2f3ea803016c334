"""Which frames of a clip are shown at a steady pace: chosen by time, whatever the rate does."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np

from kinoflow.data import video
from kinoflow.data.video.timeline import Presentation


def times_of(path: Path) -> Presentation:
    """When each frame of a clip is shown, whatever its rate.

    Raises:
        UserError: as `video.probe`.
    """
    info = video.probe(path)
    return video.presentation(path) or Presentation.constant(info.frames, info.fps)


def usual_rate(times: Presentation) -> Fraction:
    """Frames a second while the picture moves: of the median gap, so that a few long holds do not count."""
    return 1 / (_usual_gap(times) * times.time_base)


def starts(times: Presentation, seconds: Fraction) -> int:
    """How many frames, from the first on, a window may begin with whose last frame begins `seconds` later."""
    limit = times.ticks[-1].item() - seconds / times.time_base - Fraction(_usual_gap(times), 2)
    return int(np.searchsorted(times.ticks[:-1], math.ceil(limit)))


def steady(times: Presentation, *, begin: Fraction, rate: Fraction, count: int) -> list[int]:
    """The frames shown at begin + i / rate seconds, i < count: the nearest in time, a tie going to the later.

    A frame that is held stays until half a step (of the slower of both rates) before the next one's time.
    """
    ticks, step = times.ticks[:-1], 1 / (rate * times.time_base)
    early, found = max(step, Fraction(_usual_gap(times))) / 2, []
    for i in range(count):
        at = begin / times.time_base + i * step
        frame = int(np.searchsorted(ticks, math.floor(at), side="right")) - 1
        if frame + 1 < len(ticks):
            wait = int(ticks[frame + 1]) - at
            frame += wait <= min(at - int(ticks[frame]), early)
        found.append(frame)
    return found


def _usual_gap(times: Presentation) -> int:
    """In ticks."""
    gaps = np.diff(times.ticks)
    return int(np.partition(gaps, len(gaps) // 2)[len(gaps) // 2])
