"""When each frame of a clip is shown, and what another rate makes of that."""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from jaxtyping import Int64


@dataclass(frozen=True, kw_only=True)
class Presentation:
    """Frame i is shown from `ticks[i]` to `ticks[i + 1]`, in units of `time_base` seconds; `ticks[0]` is 0.

    The end of the last frame is as exact as the container tells it; all others are exact.

    Raises:
        ValueError: no frame, or ticks that do not rise.
    """

    ticks: Int64[np.ndarray, " boundaries"]
    time_base: Fraction

    def __post_init__(self) -> None:
        rising = len(self.ticks) > 1 and self.ticks[0] == 0 and (np.diff(self.ticks) > 0).all()
        if not rising or self.time_base <= 0:
            raise ValueError("presentation: time stamps must begin at 0 and rise")

    @classmethod
    def constant(cls, frames: int, fps: Fraction) -> "Presentation":
        """Frames of one length."""
        return cls(ticks=np.arange(frames + 1, dtype=np.int64), time_base=1 / fps)

    def cut(self, start: int, end: int) -> "Presentation":
        """Frames start..end-1, from time 0."""
        return Presentation(ticks=self.ticks[start : end + 1] - self.ticks[start], time_base=self.time_base)

    def time_of(self, index: int) -> Fraction:
        """Seconds from the start of the clip to where frame `index` begins."""
        return int(self.ticks[index]) * self.time_base

    def repeats(self, fps: Fraction) -> Int64[np.ndarray, " frames"]:
        """How often each frame is shown at a constant rate (0: dropped); each begins at the nearest slot."""
        slots = [math.floor(self.time_of(index) * fps + Fraction(1, 2)) for index in range(len(self.ticks))]
        slots[-1] = max(slots[-1], 1)  # a clip keeps one frame at any rate
        return np.diff(np.array(slots, np.int64))


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """The frames of a stream in the order in which they are shown.

    `stamps` are the time stamps that the decoder gives its frames, in order; None where they tell nothing,
    and the frames are counted. `times` is when each frame is shown, rising, in the same ticks; None where
    the container does not say it. `last` is how long the last frame is shown, in ticks, 0 where nothing says
    it. `sequential` says that a frame is found only by decoding from the first one on. `truncated` says that
    the container promises more than the file holds, `lost` how many damaged packets a broadcast has.
    """

    frames: int
    stamps: Int64[np.ndarray, " frames"] | None
    times: Int64[np.ndarray, " frames"] | None
    fps: Fraction
    variable: bool
    truncated: bool
    last: int = 0
    sequential: bool = False
    lost: int = 0

    def presentation(self, time_base: Fraction) -> Presentation | None:
        """The exact times of a variable frame rate; None where the rate is constant or no times are known."""
        if self.times is None or not self.variable:
            return None
        end = int(self.times[-1]) + (self.last or max(1, round(1 / (self.fps * time_base))))
        return Presentation(ticks=np.append(self.times, end) - self.times[0], time_base=time_base)

    def index_of(self, stamp: int | None, following: int) -> int:
        """Frame whose stamp is nearest to `stamp`; `following` where it may be that one, or none is known."""
        if self.stamps is None or stamp is None:
            return following
        if following < self.frames and self.stamps[following] == stamp:
            return following
        left = int(np.searchsorted(self.stamps, stamp))
        if left == self.frames:
            return left - 1
        if self.stamps[left] == stamp:  # equal stamps are taken one after the other
            return left
        if left > 0 and self.stamps[left] - stamp > stamp - self.stamps[left - 1]:
            return left - 1
        return left
